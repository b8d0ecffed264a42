"""Sum over neighbours on a GPU: one program a row and block of columns, rows gathered straight from memory.

No values are read, as all are ones, and long rows are cut into pieces so that a popular item does not hold up the rest:
the pieces of a row are added by a second pass over the few rows that have several.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

PIECE = 512
"""Neighbours that one program sums."""


@triton.jit
def _sum_rows(x, begin, end, index, out, width: tl.constexpr, block: tl.constexpr, unroll: tl.constexpr):
    piece = tl.program_id(0).to(tl.int64)
    first = tl.load(begin + piece).to(tl.int64)
    last = tl.load(end + piece).to(tl.int64)
    column = tl.arange(0, block)
    inside = column < width
    lane = tl.arange(0, unroll)
    total = tl.zeros((unroll, block), dtype=out.dtype.element_ty)
    for place in range(first, last, unroll):
        real = place + lane < last
        row = tl.load(index + place + lane, mask=real, other=0).to(tl.int64)
        total += tl.load(x + row[:, None] * width + column[None, :], mask=real[:, None] & inside[None, :], other=0.0)
    tl.store(out + piece * width + column, tl.sum(total, axis=0), mask=inside)


class TritonSum:
    """Sum over neighbours by Triton.

    Args:
        indptr: rows.
        indices: columns.
        device: a GPU.

    Shapes:
        indptr: (num_rows + 1,) integers. indices: (nnz,) integers.
    """

    def __init__(self, indptr: np.ndarray, indices: np.ndarray, device: torch.device) -> None:
        counts = np.diff(indptr)
        pieces = np.maximum(-(-counts // PIECE), 1)
        owner = np.repeat(np.arange(len(counts)), pieces)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        begin = np.asarray(indptr[:-1])[owner] + within * PIECE
        end = np.minimum(begin + PIECE, np.asarray(indptr[1:])[owner])
        self.num_rows = len(counts)
        self.begin, self.end = (torch.from_numpy(a).to(device) for a in (begin, end))
        self.index = torch.from_numpy(np.array(indices, np.int32)).to(device)
        cut = pieces > 1
        first_piece = np.cumsum(pieces) - pieces
        self.plain = None if not cut.any() else torch.from_numpy(first_piece).to(device)
        self.rest = torch.from_numpy(np.flatnonzero(within > 0)).to(device)
        self.rest_owner = torch.from_numpy(owner[within > 0]).to(device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        width = x.shape[1]
        out = x.new_empty(len(self.begin), width)
        if len(self.begin):
            block = triton.next_power_of_2(width)
            unroll = max(1, min(32, 1024 // block))
            _sum_rows[(len(self.begin),)](x, self.begin, self.end, self.index, out, width, block, unroll, num_warps=2)
        if self.plain is None:
            return out
        result = out.index_select(0, self.plain)
        return result.index_add_(0, self.rest_owner, out.index_select(0, self.rest))
