"""Log-probabilities of the children of many beams' nodes at once, without a copy of the table for every beam.

The children of a node are consecutive rows of the node table. On a CPU beams are sorted by node and every node is one
small matrix product; on a GPU each beam is a program that reads its rows straight from the table (Triton). The gather
that `ChildHead.forward` makes, rows x children x width, is left where nothing else fits, cut to GATHER_BYTES.

Shape legend: R rows (users x beams), C children (padded to the widest node of the level), N width, K codes.
"""

from __future__ import annotations

import importlib.util
from typing import Literal, Protocol

import torch

from genrec_dist.errors import ConfigError
from genrec_dist.generator.heads import DeviceTrie

Kernel = Literal["auto", "gather", "grouped", "triton"]
NEG = float("-inf")
GATHER_BYTES = 1 << 28
"""Gathered rows at a time, at most."""
GROUP_FLOATS = 4096
"""A product of its own is worth while for a node whose beams would otherwise gather more than so many floats."""
TRITON_CHILDREN = 2048
"""Children of a node that a Triton program holds, at most."""


class ChildScores(Protocol):
    """Scores of the children of nodes: log-softmax over a node's children, plus the score of the beam."""

    def by_query(
        self, query_RN: torch.Tensor, table: torch.Tensor, nodes_R: torch.Tensor, scores_R: torch.Tensor, level: int
    ) -> torch.Tensor:
        """Logits are products of the query and the rows of the children; (R, C) float32, -inf where no child is."""

    def by_code(
        self, logits_RK: torch.Tensor, nodes_R: torch.Tensor, scores_R: torch.Tensor, level: int
    ) -> torch.Tensor:
        """Logits are those of the children's codes; (R, C) float32, -inf where no child is."""


def choose_kernel(kernel: Kernel, device: torch.device) -> Kernel:
    """What 'auto' means on a device: triton on a GPU that has it, gather on one without, grouped on a CPU.

    Raises:
        ConfigError: a kernel that the device does not have.
    """
    if kernel == "auto":
        if device.type != "cuda":
            return "grouped"
        return "triton" if importlib.util.find_spec("triton") else "gather"
    if kernel == "grouped" and device.type == "cuda":
        raise ConfigError(
            "kernel does not run on this device",
            where="search kernel",
            got=f"grouped on {device.type}",
            expected="auto, gather or triton",
        )
    return kernel


def make_child_scores(trie: DeviceTrie, kernel: Kernel) -> ChildScores:
    """The kernel over one tree, on the tree's device."""
    kernel = choose_kernel(kernel, trie.first_child.device)
    if kernel == "triton":
        from genrec_dist.generator.child_scores_triton import TritonChildScores

        return TritonChildScores(trie)
    return TorchChildScores(trie, kernel == "grouped")


def finish(logits: torch.Tensor, scores_R: torch.Tensor) -> torch.Tensor:
    """Log-softmax over the finite logits of a row, plus its score; a row without any stays -inf."""
    return torch.nan_to_num(logits.log_softmax(1), nan=NEG, neginf=NEG) + scores_R[:, None]


class TorchChildScores:
    """In plain torch.

    Args:
        trie: tree.
        grouped: one product a node where that pays; waits for the device, so for a CPU only.
    """

    def __init__(self, trie: DeviceTrie, grouped: bool) -> None:
        self.trie, self.grouped = trie, grouped

    def by_query(
        self, query_RN: torch.Tensor, table: torch.Tensor, nodes_R: torch.Tensor, scores_R: torch.Tensor, level: int
    ) -> torch.Tensor:
        if self.grouped:
            return finish(self._grouped(query_RN, table, nodes_R, level), scores_R)
        return finish(self._gathered(query_RN, table, nodes_R, level), scores_R)

    def by_code(
        self, logits_RK: torch.Tensor, nodes_R: torch.Tensor, scores_R: torch.Tensor, level: int
    ) -> torch.Tensor:
        children, valid = self.trie.children_of(nodes_R, level)
        codes = self.trie.code[children].clamp(min=0)
        return finish(logits_RK.gather(1, codes).masked_fill(~valid, NEG), scores_R)

    def _gathered(self, query_RN: torch.Tensor, table: torch.Tensor, nodes_R: torch.Tensor, level: int) -> torch.Tensor:
        at_once = max(1, GATHER_BYTES // (4 * self.trie.widths[level] * table.shape[1]))
        parts = []
        for query, nodes in zip(query_RN.split(at_once), nodes_R.split(at_once)):
            children, valid = self.trie.children_of(nodes, level)
            parts.append(torch.einsum("rn,rcn->rc", query, table[children]).masked_fill(~valid, NEG))
        return torch.cat(parts)

    def _grouped(self, query_RN: torch.Tensor, table: torch.Tensor, nodes_R: torch.Tensor, level: int) -> torch.Tensor:
        trie, (rows, dim) = self.trie, query_RN.shape
        order = nodes_R.argsort()
        parents, sizes = torch.unique_consecutive(nodes_R[order], return_counts=True)
        # A dead beam is at the root, which may have more children than any node of this level.
        children = trie.num_children[parents].clamp(max=trie.widths[level])
        gathered = (sizes * children).clamp(min=1) * dim
        if int((gathered > GROUP_FLOATS).sum()) * 2 < len(parents):  # many nodes of few beams and few children
            return self._gathered(query_RN, table, nodes_R, level)
        out = query_RN.new_full((rows, trie.widths[level]), NEG)
        query, row = query_RN[order], 0
        for first, count, size in zip(trie.first_child[parents].tolist(), children.tolist(), sizes.tolist()):
            if count:
                torch.mm(query[row : row + size], table[first : first + count].T, out=out[row : row + size, :count])
            row += size
        return torch.empty_like(out).index_copy_(0, order, out)
