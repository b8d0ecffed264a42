"""KV-cached beam search over the trie, and the exact scorer that checks it.

Beam search can emit existing items only: at each step a beam is extended by the children of its node.
Shape legend: B users, W beams, C children, D width.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, cast

import torch

from genrec_dist.generator.heads import DeviceTrie, Head
from genrec_dist.generator.transformer import KeyValue

NEG = float("-inf")
EXACT_TOKENS = 1 << 17
"""Tokens of a pass of the exact scorer at most."""


class CodeGenerator(Protocol):
    """What search needs of a generator."""

    trie: DeviceTrie
    head: Head

    @property
    def max_history(self) -> int: ...

    @property
    def dense_token(self) -> Literal["none", "start", "end"]:
        """Where a token that scores items densely stands; such a model is a `DenseGenerator`."""

    def begin(self, history: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, Any, list[KeyValue] | None]:
        """States (B, T, D), of which the last predicts the first code, memory of the users, cache of the beams."""

    def start_tokens(self, batch: int) -> torch.Tensor:
        """Inputs between memory and codes, (B, T, D), T may be 0."""

    def path_tokens(self, nodes: torch.Tensor, first_level: int = 1) -> torch.Tensor:
        """Inputs of path nodes at levels first_level, first_level + 1, ...: (B, T) -> (B, T, D)."""

    def decode(
        self, x: torch.Tensor, memory: Any, cache: list[KeyValue] | None = None, beams: int = 1
    ) -> tuple[torch.Tensor, list[KeyValue]]:
        """States of inputs and the grown cache; the batch is users x beams, the memory has one row a user."""


class DenseGenerator(CodeGenerator, Protocol):
    """A generator with a distillation token."""

    def dis_token(self) -> torch.Tensor: ...

    def distilled(self, hidden: torch.Tensor) -> torch.Tensor: ...

    def dense_logits(self, query_BN: torch.Tensor, candidates: torch.Tensor | None = None) -> torch.Tensor: ...


@torch.no_grad()
def beam_search(
    model: CodeGenerator,
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
    mix_weight = mix_weight if model.dense_token != "none" else 0.0
    hidden, memory, cache = model.begin(history, mask)
    log_p = _log_softmax(model.head(hidden[:, -1], torch.zeros(batch, dtype=torch.int64, device=device), 0))
    scores, pick = log_p.topk(min(width, log_p.shape[1]), 1)
    nodes = pick + trie.first_child[0]
    user_query = None
    if mix_weight and model.dense_token == "start":
        user_query = cast(DenseGenerator, model).distilled(hidden[:, 0])
    beams = nodes.shape[1]
    if cache is not None:
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
        if level + 1 < trie.max_depth:
            cache = [(k[source.view(-1)], v[source.view(-1)]) for k, v in cache]
    items = torch.where(torch.isfinite(scores), trie.node_item[nodes], -1)
    log_p = scores
    if mix_weight:
        scorer = cast(DenseGenerator, model)
        if user_query is None:
            dense = _end_token_logits(scorer, memory, items)
        else:
            dense = scorer.dense_logits(user_query[:, None].expand(-1, beams, -1), items.clamp(min=0))
        scores = torch.where(items >= 0, log_p + mix_weight * dense, NEG)
        order = scores.argsort(dim=1, descending=True, stable=True)
        items, scores, log_p = items.gather(1, order), scores.gather(1, order), log_p.gather(1, order)
    return items, scores, log_p


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Log-softmax over existing children; a row without any stays -inf."""
    return torch.nan_to_num(logits.log_softmax(1), nan=NEG, neginf=NEG)


def _spread(tensor: torch.Tensor, beams: int) -> torch.Tensor:
    return tensor.repeat_interleave(beams, 0)


def _end_token_logits(model: DenseGenerator, memory: Any, items: torch.Tensor) -> torch.Tensor:
    """Dense logit of each finished beam by the token behind its codes, (B, W)."""
    batch, beams = items.shape
    chosen = items.clamp(min=0).reshape(-1)
    path, depth = model.trie.item_path[chosen], model.trie.depth[chosen]
    x = torch.cat([model.start_tokens(len(chosen)), model.path_tokens(path)], 1)
    x = torch.cat([x, x.new_zeros(len(chosen), 1, x.shape[2])], 1)
    place = (depth + 1)[:, None] == torch.arange(x.shape[1], device=x.device)
    x = torch.where(place[..., None], model.dis_token().to(x.dtype), x)
    hidden, _ = model.decode(x, memory, beams=beams)
    query = model.distilled(hidden[torch.arange(len(chosen), device=x.device), depth + 1])
    return model.dense_logits(query, chosen).view(batch, beams)


@torch.no_grad()
def exact_log_probabilities(model: CodeGenerator, history: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Log-probability of every item for every user: the whole tree, teacher-forced, no cache, no pruning.

    The reference that beam search is checked against; cost grows with the number of nodes that have a choice of
    children (an only child has the probability of its parent).

    Shapes:
        history: (B, S). Returns (B, num_items) float32; exp sums to 1 for each user.
    """
    trie, batch, device = model.trie, len(history), history.device
    state, memory, _ = model.begin(history, mask)
    log_p = torch.full((batch, trie.num_nodes), NEG, device=device)
    log_p[:, 0] = 0.0
    ancestors = torch.zeros(1, 0, dtype=torch.int64, device=device)
    inner = torch.zeros(1, dtype=torch.int64, device=device)
    for level in range(trie.max_depth):
        children, valid = trie.children_of(inner, level)
        only = trie.num_children[inner] == 1
        log_p[:, children[only, 0]] = log_p[:, inner[only]]
        for part in (~only).nonzero()[:, 0].split(max(1, EXACT_TOKENS // (batch * (level + 2)))):
            if not len(part):
                break
            if level:
                state = _path_states(model, memory, ancestors[part], batch)
            logits = model.head(state[:, -1], inner[part].repeat(batch), level).view(batch, len(part), -1)
            steps = logits.log_softmax(2) + log_p[:, inner[part], None]
            log_p[:, children[part][valid[part]]] = steps[:, valid[part]]
        below = children[valid]
        source = torch.arange(len(inner), device=device)[:, None].expand_as(children)[valid]
        keep = trie.num_children[below] > 0
        ancestors = torch.cat([ancestors[source[keep]], below[keep, None]], 1)
        inner = below[keep]
        if not len(inner):
            break
    leaf = trie.item_path[:, -1]
    return log_p[:, leaf]


def _path_states(model: CodeGenerator, memory: Any, paths: torch.Tensor, batch: int) -> torch.Tensor:
    """States over teacher-forced paths (count, T) for every user, (users x count, ., D)."""
    count = len(paths)
    tokens = torch.cat([model.start_tokens(count), model.path_tokens(paths)], 1)
    x = tokens[None].expand(batch, -1, -1, -1).reshape(batch * count, *tokens.shape[1:])
    return model.decode(x, memory, beams=count)[0]
