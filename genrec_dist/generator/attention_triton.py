"""Attention over short sequences on a GPU, forward and backward: one program a head of a sample, all in registers.

Histories and codes have tens of places, and kernels made for thousands fill tiles of 64 or 128 rows with six. Here a
program holds the whole score matrix of its head, so nothing is kept for the backward pass: it computes the weights
again, dropout included, whose random numbers are a function of (seed, place). Sums and softmax are float32.

Shape legend: B rows, H heads, Q queries, S keys, E width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from genrec_dist.generator.fused_triton import kept

LONGEST = 64
"""Queries and keys at most."""
WIDTHS = (16, 32, 64, 128)
PRODUCTS_OF_A_WARP = {"ieee": 1 << 14, "tf32": 1 << 16}
"""Multiply-adds of a matrix product that a warp holds without spilling, as ptxas reports for compute capability 9."""


@triton.jit
def _weights(
    q, k, mask, b, num_queries, num_keys, scale, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr,
    BQ: tl.constexpr, BS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax weights (BQ, BS) of query rows (BQ, E) and keys (E, BS); rows without any key are zero."""
    rows, cols = tl.arange(0, BQ), tl.arange(0, BS)
    scores = tl.dot(q, k, input_precision=PRECISION) * scale
    keep = (cols[None, :] < num_keys) & (rows[:, None] < num_queries)
    if HAS_MASK:
        allowed = tl.load(mask + b * num_keys + cols, cols < num_keys, 0)
        keep = keep & (allowed[None, :] != 0)
    if CAUSAL:
        keep = keep & (cols[None, :] <= rows[:, None] + (num_keys - num_queries))
    scores = tl.where(keep, scores, -float("inf"))
    peak = tl.max(scores, 1)
    weights = tl.where(keep, tl.exp(scores - tl.where(peak == -float("inf"), 0.0, peak)[:, None]), 0.0)
    total = tl.sum(weights, 1)
    return weights / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def _forward(
    q, k, v, mask, seed, out, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, num_heads, num_queries, num_keys, scale,
    dropout, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, DROPS: tl.constexpr, BQ: tl.constexpr, BS: tl.constexpr,
    E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b, h = (pid // num_heads).to(tl.int64), pid % num_heads
    rows, cols, e = tl.arange(0, BQ), tl.arange(0, BS), tl.arange(0, E)
    q_t = tl.load(q + b * q_b + h * q_h + rows[:, None] * q_s + e[None, :], rows[:, None] < num_queries, 0.0)
    k_t = tl.load(k + b * k_b + h * k_h + cols[None, :] * k_s + e[:, None], cols[None, :] < num_keys, 0.0)
    weights = _weights(q_t, k_t, mask, b, num_queries, num_keys, scale, HAS_MASK, CAUSAL, BQ, BS, PRECISION)
    if DROPS:
        weights = weights * kept(seed, pid * BQ, dropout, BQ, BS)
    v_t = tl.load(v + b * v_b + h * v_h + cols[:, None] * v_s + e[None, :], cols[:, None] < num_keys, 0.0)
    found = tl.dot(weights.to(v_t.dtype), v_t, input_precision=PRECISION)
    place = ((b * num_queries + rows) * num_heads + h)[:, None] * E + e[None, :]
    tl.store(out + place, found.to(out.dtype.element_ty), rows[:, None] < num_queries)


@triton.jit
def _backward(
    q, k, v, mask, seed, grad, to_q, to_k, to_v, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, g_b, g_s, g_h, num_heads,
    num_queries, num_keys, scale, dropout, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, DROPS: tl.constexpr,
    BQ: tl.constexpr, BS: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b, h = (pid // num_heads).to(tl.int64), pid % num_heads
    rows, cols, e = tl.arange(0, BQ), tl.arange(0, BS), tl.arange(0, E)
    here_q, here_k = rows[:, None] < num_queries, cols[:, None] < num_keys
    q_t = tl.load(q + b * q_b + h * q_h + rows[:, None] * q_s + e[None, :], here_q, 0.0)
    k_t = tl.load(k + b * k_b + h * k_h + cols[:, None] * k_s + e[None, :], here_k, 0.0)
    v_t = tl.load(v + b * v_b + h * v_h + cols[:, None] * v_s + e[None, :], here_k, 0.0)
    g_t = tl.load(grad + b * g_b + h * g_h + rows[:, None] * g_s + e[None, :], here_q, 0.0)
    weights = _weights(q_t, tl.trans(k_t), mask, b, num_queries, num_keys, scale, HAS_MASK, CAUSAL, BQ, BS, PRECISION)
    to_weights = tl.dot(g_t, tl.trans(v_t), input_precision=PRECISION)
    dropped = weights
    if DROPS:
        keep = kept(seed, pid * BQ, dropout, BQ, BS)
        dropped = weights * keep
        to_weights = to_weights * keep
    found_v = tl.dot(tl.trans(dropped).to(g_t.dtype), g_t, input_precision=PRECISION)
    to_scores = weights * (to_weights - tl.sum(weights * to_weights, 1)[:, None]) * scale
    found_q = tl.dot(to_scores.to(k_t.dtype), k_t, input_precision=PRECISION)
    found_k = tl.dot(tl.trans(to_scores).to(q_t.dtype), q_t, input_precision=PRECISION)
    place_q = ((b * num_queries + rows) * num_heads + h)[:, None] * E + e[None, :]
    place_k = ((b * num_keys + cols) * 2 * num_heads + h)[:, None] * E + e[None, :]
    tl.store(to_q + place_q, found_q.to(to_q.dtype.element_ty), here_q)
    tl.store(to_k + place_k, found_k.to(to_k.dtype.element_ty), here_k)
    tl.store(to_v + place_k, found_v.to(to_v.dtype.element_ty), here_k)


def fits(length: int, width: int) -> bool:
    """Whether so many places and heads so wide are what the kernels are made for."""
    return length <= LONGEST and width in WIDTHS


def short_attention(
    query: torch.Tensor,
    keys_values: torch.Tensor,
    mask_BS: torch.Tensor | None,
    causal: bool,
    dropout: float,
) -> torch.Tensor:
    """Scaled dot-product attention of short sequences.

    Args:
        query, keys_values: the last dimension contiguous.
        mask_BS: True at keys that exist.
        causal: query i of Q stands at place S - Q + i and sees itself and those before it.
        dropout: of the weights.

    Shapes:
        query: (B, H, Q, E). keys_values: (B, S, 2, H, E). mask_BS: (B, S) bool. Returns (B, Q, H, E), contiguous.
    """
    return _ShortAttention.apply(query, keys_values, mask_BS, causal, dropout)


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        both: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
        dropout: float,
    ) -> torch.Tensor:
        batch, heads, queries, width = query.shape
        key, value = both.permute(2, 0, 3, 1, 4)
        seed = torch.randint(2**31 - 1, (1,), device=query.device) if dropout else query.new_zeros(1, dtype=torch.int64)
        mask = mask.contiguous() if mask is not None else None
        out = query.new_empty(batch, queries, heads, width)
        ctx.shape = (heads, queries, key.shape[2], width**-0.5, dropout)
        ctx.kinds = {
            "HAS_MASK": mask is not None,
            "CAUSAL": causal and queries > 1,
            "DROPS": dropout > 0,
            "BQ": max(16, triton.next_power_of_2(queries)),
            "BS": max(16, triton.next_power_of_2(key.shape[2])),
            "E": width,
            "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
        }
        _forward[(batch * heads,)](
            query, key, value, query if mask is None else mask, seed, out, *_strides(query, key, value), *ctx.shape,
            **ctx.kinds, num_warps=_warps(ctx.kinds),
        )  # fmt: skip
        ctx.save_for_backward(query, both, mask, seed)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        query, both, mask, seed = ctx.saved_tensors
        key, value = both.permute(2, 0, 3, 1, 4)
        grad = grads[0] if grads[0].stride(3) == 1 else grads[0].contiguous()
        batch, heads, queries, width = query.shape
        to_query, to_both = query.new_empty(batch, queries, heads, width), both.new_empty(both.shape)
        _backward[(batch * heads,)](
            query, key, value, query if mask is None else mask, seed, grad, to_query, to_both, to_both[:, :, 1],
            *_strides(query, key, value), *grad.stride()[:3], *ctx.shape, **ctx.kinds, num_warps=_warps(ctx.kinds),
        )  # fmt: skip
        return to_query.transpose(1, 2), to_both, None, None, None


def _strides(*tensors: torch.Tensor) -> list[int]:
    assert all(tensor.stride(3) == 1 for tensor in tensors)
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _warps(kinds: dict[str, Any]) -> int:
    """So many that a thread's numbers fit into its registers: else they go to memory, and compiling takes a minute."""
    weights, width = kinds["BQ"] * kinds["BS"], kinds["E"]
    share = PRODUCTS_OF_A_WARP[kinds["PRECISION"]]
    if weights <= 1024 and width <= 64 and weights * width <= 2 * share:
        return 1
    return max(4 if weights > 1024 else 1, min(weights * width // share, 16))
