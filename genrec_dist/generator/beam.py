"""KV-cached beam search over the trie, and the exact scorer that checks it.

Beam search can emit existing items only: at each step a beam is extended by the children of its node.
Shape legend: B users, W beams, C children, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch

from genrec_dist.generator.attention import KeyValue
from genrec_dist.generator.child_scores import NEG
from genrec_dist.generator.heads import DeviceTrie, Head
from genrec_dist.generator.search_tables import SearchTables

EXACT_TOKENS = 1 << 17
"""Tokens of a pass of the exact scorer at most."""


class CodeGenerator(Protocol):
    """What search needs of a generator."""

    trie: DeviceTrie
    head: Head

    @property
    def max_history(self) -> int: ...

    @property
    def reads_times(self) -> bool: ...

    @property
    def dense_token(self) -> Literal["none", "start", "end"]:
        """Where a token that scores items densely stands; such a model is a `DenseGenerator`."""

    def begin(
        self, history: torch.Tensor, mask: torch.Tensor, times: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Any, list[KeyValue] | None]:
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
    tables: SearchTables | None = None,
    static: bool | None = None,
    times: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best items of each user.

    Args:
        model: generator in eval mode.
        history, mask: batch of histories.
        width: beams kept at every step.
        mix_weight: the result is ordered by log p + mix_weight x dense logit of the distillation token.
        tables: made of the model's present weights; None makes them, which costs more than a few users' search.
        static: all shapes follow from the shape of the batch and nothing waits for the device, so that the search can
            be captured in a CUDA graph; otherwise beams that have ended are not decoded. None: on a GPU.
        times: of the history's items, for a model that reads them.

    Shapes:
        history: (B, S) int64. mask: (B, S) bool. times: (B, S) int64 seconds.
        returns: items (B, W) int64, best first, -1 where fewer than W items exist; scores (B, W) float32 (mixed);
            log-probabilities (B, W) float32 in the same order.

    Raises:
        RuntimeError: the weights changed after the tables were made.
    """
    search = BeamSearch(model, width, tables, history.is_cuda if static is None else static)
    mix_weight = mix_weight if model.dense_token != "none" else 0.0
    beams = search.begin(history, mask, times)
    for level in range(1, model.trie.max_depth):
        if not search.extend(beams, level):
            break
    items = torch.where(torch.isfinite(beams.scores), model.trie.node_item[beams.nodes], -1)
    if not mix_weight:
        return items, beams.scores, beams.scores
    scorer = cast(DenseGenerator, model)
    if model.dense_token == "start":
        query = scorer.distilled(beams.start[:, 0])
        dense = scorer.dense_logits(query[:, None].expand(-1, items.shape[1], -1), items.clamp(min=0))
    else:
        dense = _end_token_logits(scorer, beams.memory, items)
    scores = torch.where(items >= 0, beams.scores + mix_weight * dense, NEG)
    order = scores.argsort(dim=1, descending=True, stable=True)
    return items.gather(1, order), scores.gather(1, order), beams.scores.gather(1, order)


@dataclass
class Beams:
    """State of a search between two levels.

    Shapes:
        nodes: (B, W) int64, 0 where dead. scores: (B, W) float32, best first, -inf where dead.
        source: (B, W) int64 row of each beam in the decoder's state, which holds the beams of the level before.
        start: (B, T, D) states of the start tokens.
    """

    nodes: torch.Tensor
    scores: torch.Tensor
    source: torch.Tensor
    state: Any
    memory: Any
    start: torch.Tensor


class BeamSearch:
    """The steps of `beam_search`, which says what the arguments are."""

    def __init__(self, model: CodeGenerator, width: int, tables: SearchTables | None, static: bool) -> None:
        self.model, self.width, self.static = model, width, static
        self.tables = SearchTables(model) if tables is None else tables
        self.tables.check()

    def begin(self, history: torch.Tensor, mask: torch.Tensor, times: torch.Tensor | None = None) -> Beams:
        """Run the histories and choose first codes."""
        batch, device = len(history), history.device
        hidden, memory, cache = self.model.begin(history, mask, times)
        root = torch.zeros(batch, dtype=torch.int64, device=device)
        totals = self.tables.child_scores(hidden[:, -1], root, torch.zeros(batch, device=device), 0)
        scores, pick = totals.topk(min(self.width, totals.shape[1]), 1)
        source = torch.arange(batch, device=device)[:, None].expand_as(pick)
        return Beams(
            pick + 1, scores, source, self.tables.decoder.start(cache, memory), memory, hidden
        )  # children of the root are nodes 1, 2, ...

    def extend(self, beams: Beams, level: int) -> bool:
        """Go on from nodes at `level` to their children; False where every path has ended."""
        trie, (batch, count) = self.model.trie, beams.nodes.shape
        nodes, scores, source, kept = beams.nodes, beams.scores, beams.source, None
        if self.tables.leaves_above(level):  # paths that have ended compete with those that go on
            goes_on = (trie.num_children[nodes] > 0) & torch.isfinite(scores)
            kept = scores.masked_fill(goes_on, NEG)
            if not self.static:
                count = int(goes_on.sum(1).max())
                if not count:
                    return False
                first = (~goes_on).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
                nodes, scores, source = (part.gather(1, first) for part in (nodes, scores, source))
        flat_nodes = nodes.reshape(-1)
        last = level + 1 == trie.max_depth
        rows = self.tables.token_rows(flat_nodes)
        hidden, state = self.tables.decoder.step(rows, source.reshape(-1), beams.memory, beams.state, count, last)
        totals = self.tables.child_scores(hidden, flat_nodes, scores.reshape(-1), level)
        children = totals.shape[1]
        totals = totals.view(batch, -1)
        if kept is not None:
            totals = torch.cat([totals, kept], 1)
        scores, pick = totals.topk(min(self.width, totals.shape[1]), 1)
        beam = (pick // children).clamp(max=count - 1)
        found = trie.first_child[nodes.gather(1, beam)] + pick % children
        if kept is not None:
            behind = pick - count * children
            found = torch.where(behind < 0, found, beams.nodes.gather(1, behind.clamp(min=0)))
        beams.nodes, beams.scores, beams.state = torch.where(torch.isfinite(scores), found, 0), scores, state
        beams.source = beam + torch.arange(batch, device=pick.device)[:, None] * count
        return True


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
def exact_log_probabilities(
    model: CodeGenerator,
    history: torch.Tensor,
    mask: torch.Tensor,
    tables: SearchTables | None = None,
    times: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-probability of every item for every user: the reference that beam search is checked against.

    Shapes:
        history: (B, S). Returns (B, num_items) float32; exp sums to 1 for each user.
    """
    return node_log_probabilities(model, history, mask, tables, times)[:, model.trie.item_path[:, -1]]


def node_log_probabilities(
    model: CodeGenerator,
    history: torch.Tensor,
    mask: torch.Tensor,
    tables: SearchTables | None = None,
    times: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-probability of every prefix of codes for every user: the whole tree, teacher-forced, no cache, no pruning.

    Cost grows with the number of nodes that have a choice of children (an only child has the probability of its
    parent).

    Shapes:
        history: (B, S). Returns (B, num_nodes) float32; exp of a node is the sum over its children.
    """
    trie, batch, device = model.trie, len(history), history.device
    tables = SearchTables(model) if tables is None else tables
    tables.check()
    state, memory, _ = model.begin(history, mask, times)
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
                state = _path_states(model, tables, memory, ancestors[part], batch)
            above = log_p[:, inner[part]].reshape(-1)
            steps = tables.child_scores(state[:, -1], inner[part].repeat(batch), above, level)
            log_p[:, children[part][valid[part]]] = steps.view(batch, len(part), -1)[:, valid[part]]
        below = children[valid]
        source = torch.arange(len(inner), device=device)[:, None].expand_as(children)[valid]
        keep = trie.num_children[below] > 0
        ancestors = torch.cat([ancestors[source[keep]], below[keep, None]], 1)
        inner = below[keep]
        if not len(inner):
            break
    return log_p


def _path_states(
    model: CodeGenerator, tables: SearchTables, memory: Any, paths: torch.Tensor, batch: int
) -> torch.Tensor:
    """States over teacher-forced paths (count, T) for every user, (users x count, ., D)."""
    count = len(paths)
    tokens = torch.cat([model.start_tokens(count), tables.tokens(paths)], 1)
    x = tokens[None].expand(batch, -1, -1, -1).reshape(batch * count, *tokens.shape[1:])
    return model.decode(x, memory, beams=count)[0]
