"""KV-cached beam search over the trie, and the exact scorer that checks it.

Beam search can emit existing items only: at each step a beam is extended by the children of its node.
Shape legend: B users, W beams, C children, D width.
"""

from __future__ import annotations

import torch

from genrec_dist.generator.model import Generator

NEG = float("-inf")


@torch.no_grad()
def beam_search(
    model: Generator,
    history: torch.Tensor,
    mask: torch.Tensor,
    width: int,
    mix_weight: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best items of each user.

    Args:
        model: generator in eval mode.
        history, mask: batch of histories.
        width: beams kept at every step.
        mix_weight: the result is ordered by log p + mix_weight x dense logit of the distillation token.

    Shapes:
        history: (B, S) int64. mask: (B, S) bool.
        returns: items (B, W) int64, best first, -1 where fewer than W items exist; scores (B, W) float32 (mixed);
            log-probabilities (B, W) float32 in the same order.
    """
    trie, batch, device = model.trie, len(history), history.device
    mix_weight = mix_weight if model.config.distill_weight else 0.0
    memory = model.encode(history, mask)
    hidden, cache = model.decode(model.start_tokens(batch), memory)
    log_p = _log_softmax(model.head(hidden[:, -1], torch.zeros(batch, dtype=torch.int64, device=device), 0))
    scores, pick = log_p.topk(min(width, log_p.shape[1]), 1)
    nodes = pick + trie.first_child[0]
    user_query = None
    if mix_weight and model.config.distill_position == "start":
        user_query = model.distilled(hidden[:, 0])
    beams = nodes.shape[1]
    cache = [(_spread(k, beams), _spread(v, beams)) for k, v in cache]
    for level in range(1, trie.max_depth):
        x = model.path_tokens(nodes.reshape(-1, 1), level)
        hidden, cache = model.decode(x, memory, cache, beams)
        children, valid = trie.children_of(nodes.reshape(-1), level)
        log_p = _log_softmax(model.head(hidden[:, -1], nodes.reshape(-1), level))
        total = scores.reshape(-1, 1) + log_p.masked_fill(~valid, NEG)
        # A beam that ended above goes on as its own only child.
        ended = trie.num_children[nodes.reshape(-1)] == 0
        total[:, 0] = torch.where(ended, scores.reshape(-1), total[:, 0])
        children[:, 0] = torch.where(ended, nodes.reshape(-1), children[:, 0])
        flat = total.view(batch, -1)
        scores, pick = flat.topk(min(width, flat.shape[1]), 1)
        nodes = children.view(batch, -1).gather(1, pick)
        source = pick // children.shape[1] + torch.arange(batch, device=device)[:, None] * beams
        beams = nodes.shape[1]
        if level + 1 < trie.max_depth or (mix_weight and model.config.distill_position == "end"):
            cache = [(k[source.view(-1)], v[source.view(-1)]) for k, v in cache]
    items = torch.where(torch.isfinite(scores), trie.node_item[nodes], -1)
    log_p = scores
    if mix_weight:
        if user_query is None:
            dense = _end_token_logits(model, memory, items)
        else:
            dense = model.dense_logits(user_query[:, None].expand(-1, beams, -1), items.clamp(min=0))
        scores = torch.where(items >= 0, log_p + mix_weight * dense, NEG)
        order = scores.argsort(dim=1, descending=True, stable=True)
        items, scores, log_p = items.gather(1, order), scores.gather(1, order), log_p.gather(1, order)
    return items, scores, log_p


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Log-softmax over existing children; a row without any stays -inf."""
    return torch.nan_to_num(logits.log_softmax(1), nan=NEG, neginf=NEG)


def _spread(tensor: torch.Tensor, beams: int) -> torch.Tensor:
    return tensor.repeat_interleave(beams, 0)


def _end_token_logits(model: Generator, memory, items: torch.Tensor) -> torch.Tensor:
    """Dense logit of each finished beam by the token behind its codes, (B, W)."""
    batch, beams = items.shape
    chosen = items.clamp(min=0).reshape(-1)
    path, depth = model.trie.item_path[chosen], model.trie.depth[chosen]
    x = torch.cat([model.start_tokens(len(chosen)), model.path_tokens(path)], 1)
    x = torch.cat([x, x.new_zeros(len(chosen), 1, x.shape[2])], 1)
    place = (depth + 1)[:, None] == torch.arange(x.shape[1], device=x.device)
    x = torch.where(place[..., None], model._dis_token().to(x.dtype), x)
    hidden, _ = model.decode(x, memory, beams=beams)
    query = model.distilled(hidden[torch.arange(len(chosen), device=x.device), depth + 1])
    return model.dense_logits(query, chosen).view(batch, beams)


@torch.no_grad()
def exact_log_probabilities(model: Generator, history: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Log-probability of every item for every user: the whole tree, teacher-forced, no cache, no pruning.

    The reference that beam search is checked against; cost grows with the number of inner nodes.

    Shapes:
        history: (B, S). Returns (B, num_items) float32; exp sums to 1 for each user.
    """
    trie, batch, device = model.trie, len(history), history.device
    memory = model.encode(history, mask)
    log_p = torch.full((batch, trie.num_nodes), NEG, device=device)
    log_p[:, 0] = 0.0
    ancestors = torch.zeros(1, 0, dtype=torch.int64, device=device)
    inner = torch.zeros(1, dtype=torch.int64, device=device)
    for level in range(trie.max_depth):
        count = len(inner)
        tokens = torch.cat([model.start_tokens(count), model.path_tokens(ancestors)], 1)
        x = tokens[None].expand(batch, -1, -1, -1).reshape(batch * count, *tokens.shape[1:])
        hidden, _ = model.decode(x, memory, beams=count)
        logits = model.head(hidden[:, -1], inner.repeat(batch), level).view(batch, count, -1)
        children, valid = trie.children_of(inner, level)
        steps = logits.log_softmax(2) + log_p[:, inner, None]
        log_p[:, children[valid]] = steps[:, valid]
        below = children[valid]
        source = torch.arange(count, device=device)[:, None].expand_as(children)[valid]
        keep = trie.num_children[below] > 0
        ancestors = torch.cat([ancestors[source[keep]], below[keep, None]], 1)
        inner = below[keep]
        if not len(inner):
            break
    leaf = trie.item_path[:, -1]
    return log_p[:, leaf]
