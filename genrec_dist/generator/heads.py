"""Output heads of the generators: which child of a trie node comes next, and the loss of an item's codes.

Both heads score the children of given nodes and nothing else, so nothing but an existing item can be emitted.
Shape legend: B rows, C children (padded to the widest node of the level), D width, K codes, L code length.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from genrec_dist.collaborative.losses import scale_of
from genrec_dist.generator.child_logits import child_logits
from genrec_dist.generator.soft_codes import SoftCodes
from genrec_dist.identifiers.trie import Trie

TABLE_SHARE = 4
"""A step makes the whole table of node embeddings if that is at most so many times the children of its rows."""


class DeviceTrie(nn.Module):
    """The trie as buffers: they move with the model and never enter its state.

    Dense first level: the root's children are the nodes 1..K1. Below it, a node's children are the range
    `first_child .. first_child + num_children`.
    """

    item_path: torch.Tensor
    depth: torch.Tensor
    first_child: torch.Tensor
    num_children: torch.Tensor
    code: torch.Tensor
    level: torch.Tensor
    parent: torch.Tensor
    node_item: torch.Tensor

    def __init__(self, trie: Trie) -> None:
        super().__init__()
        for name in ("item_path", "depth", "num_children", "code", "level", "parent", "node_item"):
            self.register_buffer(name, _int64(getattr(trie, name)), persistent=False)
        # A leaf has no first child: 0, so that every entry is a node.
        first_child = _int64(trie.first_child[:-1]).masked_fill_(self.num_children == 0, 0)
        self.register_buffer("first_child", first_child, persistent=False)
        self.num_nodes, self.num_items, self.num_codes = trie.num_nodes, trie.num_items, trie.num_codes
        self.max_depth = trie.max_depth
        self.widths = [trie.max_children(level) for level in range(trie.max_depth)]
        self.level_start = [int(start) for start in trie.level_start]

    def children_of(self, nodes_B: torch.Tensor, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Children of nodes at `level`, padded.

        Shapes:
            nodes_B: (B,) int64. Returns (B, C) int64 node numbers (0 where padded) and (B, C) bool.
        """
        offset = torch.arange(self.widths[level], device=nodes_B.device)
        valid = offset < self.num_children[nodes_B][:, None]
        return (self.first_child[nodes_B][:, None] + offset) * valid, valid


def _int64(array: np.ndarray) -> torch.Tensor:
    """A copy that torch can index with; a mapped array is read."""
    return torch.from_numpy(np.array(array, np.int64))


class RatedEmbedding(nn.Embedding):
    """A table that learns `rate` times as fast as other weights, from given start values.

    Steps of Adam do not depend on the scale of a parameter: the weight is kept divided by the rate. It decays as other
    weights do, whatever the rate.

    Args:
        start: values; copied.
        rate: 0 keeps them as they are.

    Shapes:
        start: (rows, N) float32.
    """

    def __init__(self, start: torch.Tensor, rate: float = 1.0) -> None:
        weight = start / rate if rate else start.clone()
        super().__init__(weight.shape[0], weight.shape[1], _weight=weight, _freeze=rate == 0)
        self.scale = rate or 1.0

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Embeddings of rows, (..., N)."""
        return self._scaled(super().forward(rows))

    @property
    def table(self) -> torch.Tensor:
        """All embeddings, (rows, N)."""
        return self._scaled(self.weight)

    def _scaled(self, values: torch.Tensor) -> torch.Tensor:
        return values if self.scale == 1 else values * self.scale


class ChildHead(nn.Module):
    """Softmax over the children of a node, by similarity with learned node embeddings.

    Node embeddings start from Stage I: a leaf from its item, an inner node from the mean of its items.

    Args:
        trie: tree.
        dim: D of the decoder.
        node_embeddings: start values.
        kind, temperature: similarity of query and node.
        rate: learning rate of the node embeddings over that of other weights; 0 keeps them as they start.

    Shapes:
        node_embeddings: (num_nodes, N) float32.
    """

    def __init__(
        self,
        trie: DeviceTrie,
        dim: int,
        node_embeddings: torch.Tensor,
        kind: str,
        temperature: float,
        rate: float = 1.0,
    ) -> None:
        super().__init__()
        self.trie, self.kind, self.scale = [trie], kind, scale_of(kind, temperature)
        self.nodes = RatedEmbedding(node_embeddings, rate)
        self.query = nn.Linear(dim, node_embeddings.shape[1])

    def table(self, rows: float) -> torch.Tensor | None:
        """Embeddings of all nodes, at length 1 for cosines, where that is less than the children of so many rows.

        Args:
            rows: of the loss on a worker, the same on all.

        Shapes:
            returns: (num_nodes, N) float32.
        """
        trie = self.trie[0]
        if trie.num_nodes > TABLE_SHARE * rows * sum(trie.widths[1:]):
            return None
        with torch.autocast(self.nodes.weight.device.type, enabled=False):
            return self._unit(self.nodes(torch.arange(trie.num_nodes, device=trie.parent.device)))

    def forward(
        self, hidden_BD: torch.Tensor, nodes_B: torch.Tensor, level: int, table: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of the children of `nodes_B`, (B, C) float32, -inf where padded.

        Args:
            table: from `table`, made once for all levels of a step.
        """
        trie = self.trie[0]
        query = self.query(hidden_BD)
        with torch.autocast(query.device.type, enabled=False):
            query = query.float()
            if self.kind == "cosine":
                query = F.normalize(query, dim=-1)
            if table is not None:
                start, stop = trie.level_start[level + 1 : level + 3]
                if level == 0:
                    return query @ table[start:stop].T * self.scale
                count = trie.num_children[nodes_B] * (trie.level[nodes_B] == level)
                first = (trie.first_child[nodes_B] - start) * (count > 0)
                return child_logits(query * self.scale, table[start:stop], first, count, trie.widths[level])
            if level == 0:  # dense first level: one matrix product, the same children for every row
                table = self._unit(self.nodes(torch.arange(1, 1 + trie.widths[0], device=query.device)))
                return query @ table.T * self.scale
            children, valid = trie.children_of(nodes_B, level)
            table_BCN = self._unit(self.nodes(children))
            logits = torch.einsum("bn,bcn->bc", query, table_BCN) * self.scale
            return logits.masked_fill(~valid, float("-inf"))

    def _unit(self, rows: torch.Tensor) -> torch.Tensor:
        return F.normalize(rows, dim=-1) if self.kind == "cosine" else rows


class PerLevelHead(nn.Module):
    """One K-way linear head a level, as the paper writes it.

    In training (`constrain=False`) the softmax runs over all K codes; in search only over codes that exist
    below the node.
    """

    def __init__(self, trie: DeviceTrie, dim: int) -> None:
        super().__init__()
        self.trie = [trie]
        self.levels = nn.ModuleList(nn.Linear(dim, trie.num_codes) for _ in range(trie.max_depth))

    def code_logits(self, hidden_BD: torch.Tensor, level: int) -> torch.Tensor:
        """Logits over all K codes of a level, (B, K) float32."""
        return self.levels[level](hidden_BD).float()

    def forward(self, hidden_BD: torch.Tensor, nodes_B: torch.Tensor, level: int) -> torch.Tensor:
        """Logits of the children of `nodes_B`, (B, C) float32, -inf where padded."""
        children, valid = self.trie[0].children_of(nodes_B, level)
        codes = self.trie[0].code[children].clamp(min=0)
        return self.code_logits(hidden_BD, level).gather(1, codes).masked_fill(~valid, float("-inf"))


Head = ChildHead | PerLevelHead


def _level_logits(
    head: Head,
    trie: DeviceTrie,
    hidden_BLD: torch.Tensor,
    path_BL: torch.Tensor,
    depth_B: torch.Tensor,
    table: torch.Tensor | None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Nodes, logits of what follows them and labels, level by level; the label is -100 past an item's depth."""
    for level in range(path_BL.shape[1]):
        node = path_BL[:, level]
        parent = trie.parent[node] if level else torch.zeros_like(node)
        if isinstance(head, PerLevelHead):
            logits, label = head.code_logits(hidden_BLD[:, level], level), trie.code[node]
        else:
            logits, label = head(hidden_BLD[:, level], parent, level, table), node - trie.first_child[parent]
        here = depth_B > level
        label = label.where(here, torch.full_like(label, -100))
        # A row without children here would give -inf - (-inf): its logits are replaced, its label ignored.
        yield parent, logits.masked_fill(~here[:, None], 0.0), label


def code_losses(
    head: Head,
    trie: DeviceTrie,
    hidden_BLD: torch.Tensor,
    path_BL: torch.Tensor,
    depth_B: torch.Tensor,
    smoothing: float,
    table: torch.Tensor | None = None,
    soft: SoftCodes | None = None,
) -> list[torch.Tensor]:
    """Cross-entropy of the codes of each level, summed over rows; levels past an item's depth do not count.

    Args:
        head: its logits are the model.
        trie: tree of the path nodes.
        hidden_BLD: state that predicts the code of each level.
        path_BL: nodes of each item, one a level, as deep as any of these items.
        depth_B: code length of each item.
        smoothing: share of the label that goes to all classes alike.
        table: of a child head, `ChildHead.table`.
        soft: a teacher's codes, labels beside the true ones.

    Returns:
        One float32 scalar a level.
    """
    losses, by_code = [], isinstance(head, PerLevelHead)
    for level, (node, logits, label) in enumerate(_level_logits(head, trie, hidden_BLD, path_BL, depth_B, table)):
        loss = _cross_entropy(logits, label, smoothing)
        losses.append(loss if soft is None else soft.mixed(loss, logits, node, label, level, by_code))
    return losses


def item_nats(
    head: Head, trie: DeviceTrie, hidden_BLD: torch.Tensor, path_BL: torch.Tensor, depth_B: torch.Tensor
) -> torch.Tensor:
    """Negative log-probability of each item, the sum over the levels of its code, (B,) float32 in nats.

    With a child head the probabilities of all items add up to 1: codes and items are in bijection, and every softmax
    runs over the children that exist. With a per-level head it runs over all K codes, so what the model gives to codes
    that no item has counts against it: the items' probabilities add up to less than 1.

    Args: as `code_losses`.
    """
    table = head.table(len(path_BL)) if isinstance(head, ChildHead) else None
    levels = _level_logits(head, trie, hidden_BLD, path_BL, depth_B, table)
    nats = [F.cross_entropy(logits, label, ignore_index=-100, reduction="none") for _, logits, label in levels]
    return torch.stack(nats).sum(0)


def _cross_entropy(logits: torch.Tensor, label: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Summed cross-entropy, smoothing spread over the existing (finite) classes only."""
    plain = F.cross_entropy(logits, label, ignore_index=-100, reduction="sum")
    if not smoothing:
        return plain
    log_p = logits.log_softmax(1)
    finite = torch.isfinite(log_p)
    uniform = -(log_p.masked_fill(~finite, 0.0).sum(1) / finite.sum(1))
    return (1 - smoothing) * plain + smoothing * uniform.where(label >= 0, uniform.new_zeros(())).sum()


def node_means(trie: Trie, embeddings: torch.Tensor) -> torch.Tensor:
    """Start values of the node embeddings: mean over the items below each node.

    Shapes:
        embeddings: (num_items, N). Returns (num_nodes, N) float32.
    """
    path, depth = _int64(trie.item_path), _int64(trie.depth)
    sums = torch.zeros(trie.num_nodes, embeddings.shape[1], dtype=torch.float64)
    counts = torch.zeros(trie.num_nodes, dtype=torch.float64)
    sums[0], counts[0] = embeddings.double().sum(0), len(embeddings)
    for level in range(trie.max_depth):
        here = depth > level
        sums.index_add_(0, path[here, level], embeddings[here].double())
        counts.index_add_(0, path[here, level], torch.ones(int(here.sum()), dtype=torch.float64))
    return (sums / counts[:, None]).float()
