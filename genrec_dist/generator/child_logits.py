"""Products of queries with the children of nodes, in training: forward and gradients without a copy of every child.

The children of a node are consecutive rows of its level of the node table. On a CPU rows of one node make one small
product. On a GPU all rows meet all nodes of the level in one product, and each row's children are picked out of it, as
long as that product is small enough; else children are gathered.

Shape legend: B rows, C children (padded to the widest node of the level), M nodes of the level, N width.
"""

from __future__ import annotations

from typing import Any

import torch

NEG = float("-inf")
LEVEL_FLOATS = 1 << 27
"""Entries of the product of all rows and all nodes of a level, at most."""


def child_logits(
    query_BN: torch.Tensor, level_MN: torch.Tensor, first_B: torch.Tensor, count_B: torch.Tensor, width: int
) -> torch.Tensor:
    """Products of each query with its node's children.

    Args:
        query_BN: one a row.
        level_MN: embeddings of the level's nodes.
        first_B: place of the first child among them.
        count_B: number of children; may be 0.
        width: C.

    Shapes:
        query_BN: (B, N) float. level_MN: (M, N). first_B, count_B: (B,) int64. Returns (B, C), -inf where no child is.
    """
    if query_BN.device.type == "cpu":
        return _Grouped.apply(query_BN, level_MN, first_B, count_B, width)
    return on_gpu(query_BN, level_MN, first_B, count_B, width)


def on_gpu(
    query_BN: torch.Tensor, level_MN: torch.Tensor, first_B: torch.Tensor, count_B: torch.Tensor, width: int
) -> torch.Tensor:
    """As `child_logits`, by a few large kernels that nobody has to wait for."""
    offset = torch.arange(width, device=query_BN.device)
    valid = offset < count_B[:, None]
    place = (first_B[:, None] + offset) * valid
    if len(query_BN) * len(level_MN) <= LEVEL_FLOATS:
        logits = (query_BN @ level_MN.T).gather(1, place)
    else:
        logits = torch.einsum("bn,bcn->bc", query_BN, level_MN[place])
    return logits.masked_fill(~valid, NEG)


class _Grouped(torch.autograd.Function):
    """Rows sorted by node: one product a node, forward and twice backward."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, level: torch.Tensor, first: torch.Tensor, count: torch.Tensor, width: int
    ) -> torch.Tensor:
        first = first.where(count > 0, -1)  # a node without children is not the level's first
        order = first.argsort()
        starts, sizes = torch.unique_consecutive(first[order], return_counts=True)
        last = order[sizes.cumsum(0) - 1]  # any row of each group
        groups = list(zip(starts.tolist(), count[last].tolist(), sizes.tolist()))
        query = query[order]
        out = query.new_full((len(query), width), NEG)
        row = 0
        for start, children, size in groups:
            if children:
                torch.mm(
                    query[row : row + size], level[start : start + children].T, out=out[row : row + size, :children]
                )
            row += size
        ctx.save_for_backward(query, level, order)
        ctx.groups = groups
        return torch.empty_like(out).index_copy_(0, order, out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        query, level, order = ctx.saved_tensors
        grad = grads[0][order]
        to_query, to_level = torch.zeros_like(query), torch.zeros_like(level)
        row = 0
        for start, children, size in ctx.groups:
            if children:
                part, rows, nodes = (
                    grad[row : row + size, :children],
                    slice(row, row + size),
                    slice(start, start + children),
                )
                torch.mm(part, level[nodes], out=to_query[rows])
                torch.mm(part.T, query[rows], out=to_level[nodes])
            row += size
        return torch.empty_like(to_query).index_copy_(0, order, to_query), to_level, None, None, None
