"""Log-probabilities of the children of beams' nodes on a GPU: one program a beam, in full float32.

A program holds the logits of its node's children in registers, reads their rows of the node table once, from
neighbouring places of memory, and writes log-softmax + score of its beam, -inf behind the last child. Programs of
beams at one node read the same rows, which the second-level cache then holds. Nothing is rounded to TF32: products are
sums of float32 multiplications. Shape legend as in child_scores.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from genrec_dist.generator.child_scores import TRITON_CHILDREN, TorchChildScores
from genrec_dist.generator.heads import DeviceTrie

TILE = 8192
"""Floats of the table that a program holds at a time."""


@triton.jit
def _finish(logits, here, count, score):
    peak = tl.max(logits, 0)
    peak = tl.where(count > 0, peak, 0.0)
    total = tl.sum(tl.exp(logits - peak), 0)
    log_total = tl.log(tl.where(count > 0, total, 1.0))
    return tl.where(here, logits - peak - log_total + score, -float("inf"))


@triton.jit
def _by_query(
    query,
    table,
    nodes,
    first_child,
    num_children,
    scores,
    out,
    width,
    DIM: tl.constexpr,
    CHILDREN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    node = tl.load(nodes + row)
    first = tl.load(first_child + node)
    count = tl.minimum(tl.load(num_children + node), width)
    child = tl.arange(0, CHILDREN)
    here = child < count
    products = tl.zeros((CHILDREN, BLOCK), tl.float32)
    for at in range(0, DIM, BLOCK):
        column = at + tl.arange(0, BLOCK)
        part = tl.load(query + row * DIM + column, column < DIM, 0.0)
        place = (first + child)[:, None] * DIM + column[None, :]
        products += tl.load(table + place, here[:, None] & (column < DIM)[None, :], 0.0) * part[None, :]
    logits = tl.where(here, tl.sum(products, 1), -float("inf"))
    total = _finish(logits, here, count, tl.load(scores + row))
    tl.store(out + row * width + child, total, child < width)


@triton.jit
def _by_code(
    logits,
    code,
    nodes,
    first_child,
    num_children,
    scores,
    out,
    width,
    num_codes,
    CHILDREN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    node = tl.load(nodes + row)
    first = tl.load(first_child + node)
    count = tl.minimum(tl.load(num_children + node), width)
    child = tl.arange(0, CHILDREN)
    here = child < count
    codes = tl.load(code + first + child, here, 0)
    found = tl.load(logits + row * num_codes + codes, here, -float("inf"))
    total = _finish(found, here, count, tl.load(scores + row))
    tl.store(out + row * width + child, total, child < width)


class TritonChildScores:
    """By Triton; levels whose nodes have more than TRITON_CHILDREN children go to torch.

    Args:
        trie: tree, on the GPU.
    """

    def __init__(self, trie: DeviceTrie) -> None:
        self.trie, self.plain = trie, TorchChildScores(trie, grouped=False)

    def by_query(
        self, query_RN: torch.Tensor, table: torch.Tensor, nodes_R: torch.Tensor, scores_R: torch.Tensor, level: int
    ) -> torch.Tensor:
        trie, width = self.trie, self.trie.widths[level]
        if width > TRITON_CHILDREN:
            return self.plain.by_query(query_RN, table, nodes_R, scores_R, level)
        query, out = query_RN.contiguous(), query_RN.new_empty(len(query_RN), width)
        children = triton.next_power_of_2(width)
        block = max(1, min(triton.next_power_of_2(table.shape[1]), max(16, TILE // children)))
        _by_query[(len(query),)](
            query,
            table,
            nodes_R.contiguous(),
            trie.first_child,
            trie.num_children,
            scores_R.contiguous(),
            out,
            width,
            DIM=table.shape[1],
            CHILDREN=children,
            BLOCK=block,
            num_warps=8 if children * block >= TILE else 4,
        )
        return out

    def by_code(
        self, logits_RK: torch.Tensor, nodes_R: torch.Tensor, scores_R: torch.Tensor, level: int
    ) -> torch.Tensor:
        trie, width = self.trie, self.trie.widths[level]
        if width > TRITON_CHILDREN:
            return self.plain.by_code(logits_RK, nodes_R, scores_R, level)
        logits, out = logits_RK.contiguous(), logits_RK.new_empty(len(logits_RK), width)
        _by_code[(len(logits),)](
            logits,
            trie.code,
            nodes_R.contiguous(),
            trie.first_child,
            trie.num_children,
            scores_R.contiguous(),
            out,
            width,
            logits.shape[1],
            CHILDREN=triton.next_power_of_2(width),
        )
        return out
