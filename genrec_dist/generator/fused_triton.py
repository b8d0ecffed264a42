"""What stands between the products of a Transformer layer, on a GPU, each as one kernel forward and one backward.

`add_norm`: the residual sum with a dropped-out branch, and its layer norm in the type that the next product reads.
`gelu_dropout`: activation and dropout of a feed-forward layer. Dropout's random numbers are a function of (seed,
place), so no mask is kept. Norms and sums are float32.

Shape legend: R rows (samples x places), D width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

TILE = 2048
"""Numbers that a program of `add_norm` holds of one tensor, at least."""
WIDEST = 8192
ROOT_HALF = tl.constexpr(0.7071067811865476)
ROOT_TWO_PI = tl.constexpr(2.5066282746310002)


@triton.jit
def kept(seed, row, dropout, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """1 / (1 - dropout) where a number of rows row .. row + ROWS is kept, 0 elsewhere; (ROWS, COLUMNS).

    One call of Philox gives four numbers; of 64-bit places it would cost three times as much.
    """
    quads = (row + tl.arange(0, ROWS))[:, None] * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)[None, :]
    a, b, c, d = tl.rand4x(tl.load(seed), quads.to(tl.uint32), 7)
    drawn = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (ROWS, COLUMNS))
    return tl.where(drawn >= dropout, 1.0 / (1.0 - dropout), 0.0)


@triton.jit
def _norm_forward(
    x, branch, weight, bias, seed, total, normed, means, scales, num_rows, dropout, eps, ADDS: tl.constexpr,
    DROPS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BD)
    here = (rows[:, None] < num_rows) & (cols[None, :] < D)
    place = rows[:, None] * D + cols[None, :]
    value = tl.load(x + place, here, 0.0).to(tl.float32)
    if ADDS:
        added = tl.load(branch + place, here, 0.0).to(tl.float32)
        if DROPS:
            added = added * kept(seed, tl.program_id(0) * ROWS, dropout, ROWS, BD)
        value = value + added
        tl.store(total + place, value.to(total.dtype.element_ty), here)
    mean = tl.sum(value, 1) / D
    centred = tl.where(here, value - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    w, b = tl.load(weight + cols, cols < D, 0.0), tl.load(bias + cols, cols < D, 0.0)
    tl.store(normed + place, (centred * scale[:, None] * w[None, :] + b[None, :]).to(normed.dtype.element_ty), here)
    tl.store(means + rows, mean, rows < num_rows)
    tl.store(scales + rows, scale, rows < num_rows)


@triton.jit
def _norm_backward(
    to_normed, to_total, total, weight, seed, means, scales, to_x, to_branch, to_weight, to_bias, num_rows, dropout,
    ADDS: tl.constexpr, DROPS: tl.constexpr, CARRIES: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BD)
    w = tl.load(weight + cols, cols < D, 0.0)
    sum_weight, sum_bias = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)
        here = (rows[:, None] < num_rows) & (cols[None, :] < D)
        place = rows[:, None] * D + cols[None, :]
        mean, scale = tl.load(means + rows, rows < num_rows, 0.0), tl.load(scales + rows, rows < num_rows, 0.0)
        unit = (tl.load(total + place, here, 0.0).to(tl.float32) - mean[:, None]) * scale[:, None]
        unit = tl.where(here, unit, 0.0)
        grad = tl.load(to_normed + place, here, 0.0).to(tl.float32)
        sum_weight += tl.sum(grad * unit, 0)
        sum_bias += tl.sum(grad, 0)
        grad = grad * w[None, :]
        along, level = tl.sum(grad * unit, 1) / D, tl.sum(grad, 1) / D
        found = (grad - level[:, None] - unit * along[:, None]) * scale[:, None]
        if CARRIES:
            found = found + tl.load(to_total + place, here, 0.0).to(tl.float32)
        tl.store(to_x + place, found.to(to_x.dtype.element_ty), here)
        if ADDS:
            if DROPS:
                found = found * kept(seed, first, dropout, ROWS, BD)
            tl.store(to_branch + place, found.to(to_branch.dtype.element_ty), here)
    tl.store(to_weight + tl.program_id(0) * D + cols, sum_weight, cols < D)
    tl.store(to_bias + tl.program_id(0) * D + cols, sum_bias, cols < D)


def add_norm(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dropout: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + dropout(branch), and its layer norm.

    Args:
        branch: None: x alone.
        dtype: of the norm.

    Shapes:
        x, branch: (..., D). weight, bias: (D,). Returns two (..., D), the sum in the type of x.
    """
    return _AddNorm.apply(x, branch, weight, bias, eps, dropout, dtype)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        branch: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
        dropout: float,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        x = x.contiguous()
        width, rows = x.shape[-1], x.numel() // x.shape[-1]
        adds = branch is not None
        branch_2d = x if branch is None else branch.contiguous()
        drops = adds and dropout > 0
        seed = torch.randint(2**31 - 1, (1,), device=x.device) if drops else None
        total = torch.empty_like(x) if adds else x
        normed = torch.empty_like(x, dtype=dtype)
        means, scales = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
        block = triton.next_power_of_2(width)
        ctx.kinds = {"ADDS": adds, "DROPS": drops, "D": width, "BD": block, "ROWS": max(1, TILE // block)}
        _norm_forward[(triton.cdiv(rows, ctx.kinds["ROWS"]),)](
            x, branch_2d, weight, bias, _or(seed, x), total, normed, means, scales, rows, dropout, eps, **ctx.kinds
        )
        ctx.save_for_backward(total, weight, means, scales, seed)
        ctx.dropout, ctx.branch_type = dropout, branch_2d.dtype
        if not adds:
            return x.view_as(x), normed
        return total, normed

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple:
        total, weight, means, scales, seed = ctx.saved_tensors
        to_total, to_normed = grads
        if to_normed is None:
            to_normed = torch.zeros_like(total)
        width, rows = total.shape[-1], len(means)
        programs = min(triton.cdiv(rows, ctx.kinds["ROWS"]), 4 * _processors(total.device))
        to_x = torch.empty_like(total)
        to_branch = torch.empty_like(total, dtype=ctx.branch_type) if ctx.kinds["ADDS"] else None
        partial = total.new_empty(2, programs, width, dtype=torch.float32)
        _norm_backward[(programs,)](
            to_normed.contiguous(), total if to_total is None else to_total.contiguous(), total, weight,
            _or(seed, total), means, scales, to_x, _or(to_branch, total), partial[0], partial[1], rows, ctx.dropout,
            CARRIES=to_total is not None, **ctx.kinds,
        )  # fmt: skip
        to_weight, to_bias = partial.sum(1)
        return to_x, to_branch, to_weight, to_bias, None, None, None


@triton.jit
def _gelu_forward(x, seed, out, count, dropout, DROPS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place, place < count, 0.0).to(tl.float32)
    value = 0.5 * value * (1.0 + tl.erf(value * ROOT_HALF))
    if DROPS:
        value = value * tl.reshape(kept(seed, tl.program_id(0), dropout, 1, BLOCK), (BLOCK,))
    tl.store(out + place, value.to(out.dtype.element_ty), place < count)


@triton.jit
def _gelu_backward(x, grad, seed, out, count, dropout, DROPS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place, place < count, 0.0).to(tl.float32)
    found = tl.load(grad + place, place < count, 0.0).to(tl.float32)
    if DROPS:
        found = found * tl.reshape(kept(seed, tl.program_id(0), dropout, 1, BLOCK), (BLOCK,))
    slope = 0.5 * (1.0 + tl.erf(value * ROOT_HALF)) + value * tl.exp(-0.5 * value * value) / ROOT_TWO_PI
    tl.store(out + place, (found * slope).to(out.dtype.element_ty), place < count)


def gelu_dropout(x: torch.Tensor, dropout: float) -> torch.Tensor:
    """dropout(GELU(x)), of the same shape and type; the exact GELU."""
    return _GeluDropout.apply(x, dropout)


class _GeluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dropout: float) -> torch.Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        seed = torch.randint(2**31 - 1, (1,), device=x.device) if dropout else None
        _gelu_forward[(triton.cdiv(x.numel(), 1024),)](
            x, _or(seed, x), out, x.numel(), dropout, DROPS=dropout > 0, BLOCK=1024
        )
        ctx.save_for_backward(x, seed)
        ctx.dropout = dropout
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        x, seed = ctx.saved_tensors
        out = torch.empty_like(x)
        _gelu_backward[(triton.cdiv(x.numel(), 1024),)](
            x, grads[0].contiguous(), _or(seed, x), out, x.numel(), ctx.dropout, DROPS=ctx.dropout > 0, BLOCK=1024
        )
        return out, None


def _or(tensor: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    """A kernel's argument that it does not read still has to be a pointer."""
    return stand_in if tensor is None else tensor


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
