"""Losses over item tables: full-catalog and sampled softmax, InfoNCE. Pure functions on one device.

Every loss is a sum; the caller divides by the global count, so that averaging gradients over workers gives
the gradient of the global mean.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Half precision as float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def similarity(a: torch.Tensor, b: torch.Tensor, kind: str) -> torch.Tensor:
    """All pairs of rows: dot products ('dot', 'inner') or cosines ('cosine'), (A, B) float32 or float64.

    Always in float32 (TF32 on GPUs): bfloat16 has too few digits to rank a catalog.
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b = at_least_float32(a), at_least_float32(b)
        if kind == "cosine":
            a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
        return a @ b.T


def scale_of(kind: str, temperature: float) -> float:
    """Factor on a similarity to make it a logit: 1/temperature for cosine, 1 for dot products."""
    return 1.0 / temperature if kind == "cosine" else 1.0


def full_softmax(logits_BN: torch.Tensor, targets_B: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Summed cross-entropy over the whole catalog (equation 4); a target of -100 does not count.

    Args:
        smoothing: share of the label that goes to all items alike.
    """
    return F.cross_entropy(at_least_float32(logits_BN), targets_B, reduction="sum", label_smoothing=smoothing)


def counted(
    states_BLD: torch.Tensor, targets_BL: torch.Tensor, mask_BL: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """States and targets of the places that count, one a row.

    On a CPU the others are left out. On a GPU they stay, with the target -100: their rows cost less than waiting for
    their number, and all batches have the same shape.
    """
    if states_BLD.device.type == "cpu":
        return states_BLD[mask_BL], targets_BL[mask_BL]
    return states_BLD.flatten(0, 1), targets_BL.masked_fill(~mask_BL, -100).flatten()


def blocked_softmax(
    query_BD: torch.Tensor, table_ND: torch.Tensor, targets_B: torch.Tensor, scale: float, block: int = 1 << 16
) -> torch.Tensor:
    """`full_softmax` of products scale x query . table without the (B, N) logits: by blocks of the table, which the
    backward pass computes again.

    Shapes:
        query_BD: (B, D) float32. table_ND: (N, D) float32. targets_B: (B,) int64.
    """
    with torch.autocast(query_BD.device.type, enabled=False):
        own = (query_BD * F.embedding(targets_B, table_ND)).sum(1) * scale
        return (_BlockedLogSumExp.apply(query_BD, table_ND, scale, block) - own).sum()


class _BlockedLogSumExp(torch.autograd.Function):
    """log sum over n of exp(scale x query . table_n), (B,)."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, table: torch.Tensor, scale: float, block: int) -> torch.Tensor:
        total = query.new_full((len(query),), -math.inf)
        for rows in table.split(block):
            total = torch.logaddexp(total, torch.logsumexp(query @ rows.T * scale, 1))
        ctx.save_for_backward(query, table, total)
        ctx.scale, ctx.block = scale, block
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple:
        query, table, total = ctx.saved_tensors
        to_query, to_table = torch.zeros_like(query), torch.zeros_like(table) if ctx.needs_input_grad[1] else None
        for start in range(0, len(table), ctx.block):
            rows = table[start : start + ctx.block]
            share = (query @ rows.T * ctx.scale - total[:, None]).exp() * (grads[0][:, None] * ctx.scale)
            to_query += share @ rows
            if to_table is not None:
                torch.mm(share.T, query, out=to_table[start : start + ctx.block])
        return to_query, to_table, None, None


def sampled_softmax(
    positive_B: torch.Tensor, negative_BM: torch.Tensor, hit_BM: torch.Tensor, odds: float | torch.Tensor
) -> torch.Tensor:
    """Summed cross-entropy with negatives shared by the batch, logQ-corrected.

    A valid draw of item j stands for odds_j / (valid draws) items, so log of that is added to its logit; draws that
    hit the positive are left out. With q the chance of a draw, odds_j = (1 - q_target) / q_j: num_items - 1 for
    uniform draws.

    Shapes:
        positive_B: (B,) logit of the target.
        negative_BM: (B, M) logits of the draws.
        hit_BM: (B, M) bool, True where the draw is the target.
        odds: a number, or (B, M).

    Source: Bengio and Senecal (2008).
    """
    negative = at_least_float32(negative_BM).masked_fill(hit_BM, -math.inf)
    valid = (~hit_BM).sum(1, keepdim=True).clamp(min=1)
    negative = negative + torch.log(odds / valid.to(negative.dtype))
    joined = torch.cat([at_least_float32(positive_B)[:, None], negative], 1)
    return (torch.logsumexp(joined, 1) - joined[:, 0]).sum()


def bpr(positive_B: torch.Tensor, negative_BM: torch.Tensor) -> torch.Tensor:
    """Summed Bayesian personalised ranking loss, -log sigmoid(positive - negative), averaged over the negatives.

    Shapes:
        positive_B: (B,). negative_BM: (B, M).

    Source: Rendle et al. (2009).
    """
    return F.softplus(negative_BM - positive_B[:, None]).mean(1).sum()


def info_nce(
    anchors: torch.Tensor,
    candidates: torch.Tensor,
    positives: torch.Tensor,
    *,
    kind: str,
    temperature: float,
    positive_in_denominator: bool = True,
    num_candidates: torch.Tensor | None = None,
) -> torch.Tensor:
    """Summed InfoNCE of each anchor with its positive among the candidates (equation 3).

    Args:
        anchors: E_C of the items.
        candidates: E_T of the batch's distinct items.
        positives: index of each anchor's own item among the candidates.
        kind: 'cosine' or 'dot'; both are divided by the temperature, as equation 3 writes it.
        positive_in_denominator: False keeps j != i, as equation 3 writes it; True is the usual InfoNCE.
        num_candidates: how many of the candidates count, on the device; those behind them are padding, and so are
            anchors whose positive is one of these. None: all.

    Shapes:
        anchors: (A, D). candidates: (C, D). positives: (A,) int64.

    Source: PRORec equation 3. Its logarithm of a sum over items is read as the sum of logarithms.
    """
    logits = similarity(anchors, candidates, kind) / temperature
    own = logits.gather(1, positives[:, None]).squeeze(1)
    if num_candidates is not None:
        padding = torch.arange(len(candidates), device=logits.device) >= num_candidates
        logits = logits.masked_fill(padding, -math.inf)
        if not positive_in_denominator:
            alone = logits.scatter(1, positives[:, None], -math.inf)
            logits = torch.where(num_candidates < 2, logits, alone)  # a lone item loses nothing
        loss = torch.logsumexp(logits, 1) - own
        return loss.where(~padding[positives], loss.new_zeros(())).sum()
    if not positive_in_denominator:
        if len(candidates) < 2:  # a lone item has nothing to be told apart from
            return own.sum() * 0.0
        logits = logits.scatter(1, positives[:, None], -math.inf)
    return (torch.logsumexp(logits, 1) - own).sum()
