"""The two inner passes of k-means on a GPU, in Triton: nearest centroids, and sums of the rows that changed.

A pass of plain torch writes and reads back rows x K scores, and its full float32 product runs on the scalar cores.
Here scores stay in registers, and the product runs on the tensor cores: every float32 is split into two float16 of
eleven bits each, x = x1 + x2, and x·c = x1·c1 + x1·c2 + x2·c1 in float32 sums. What is dropped, x2·c2, is 2^-22 of the
product, so that a label differs from the full product's only where two centroids are as near as that.

Source: splitting after Ootomo and Yokota (2022), Recovering single precision accuracy from Tensor Cores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import triton
import triton.language as tl

from genrec_dist.identifiers.device_points import TorchPasses

LARGEST = 2.0**14
"""To which values are scaled: float16 ends at 65504, and the second halves stay above its subnormal numbers."""
SUM_ROWS, SUM_PARTS, SUM_WIDTH = 32, 16, 128


@dataclass(frozen=True)
class Shape:
    """How the nearest-centroid kernel is cut: rows, clusters and columns of a block, warps, stages of its pipeline."""

    rows: int
    clusters: int
    width: int
    warps: int
    stages: int


NARROW = Shape(128, 64, 128, 4, 1)
"""Rows of 128 columns or fewer stay in the block for all clusters."""
WIDE = Shape(128, 128, 64, 8, 3)


def power_of_two(largest: float) -> float:
    """Scale that brings values up to `largest` below 2^14."""
    return 2.0 ** (math.log2(LARGEST) - math.ceil(math.log2(largest))) if largest else 1.0


@triton.jit
def _halves(place, inside, scale):
    wide = tl.load(place, inside, 0.0) * scale
    first = wide.to(tl.float16)
    return first, (wide - first.to(tl.float32)).to(tl.float16)


@triton.jit
def _nearest_kernel(
    values,
    high,
    low,
    half,
    price,
    squares,
    labels,
    near,
    errors,
    num_rows,
    num_clusters,
    dim,
    scale,
    unscale,
    shift,
    PADDED: tl.constexpr,
    PRICED: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    COPIES: tl.constexpr,
    ROWS: tl.constexpr,
    CLUSTERS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0)
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < num_rows
    column = tl.arange(0, WIDTH)
    start = values + row[:, None] * dim
    best = tl.full((ROWS,), float("inf"), tl.float32)
    label = tl.zeros((ROWS,), tl.int32)
    if ONE_BLOCK:
        first, second = _halves(start + column[None, :], here[:, None] & (column < dim)[None, :], scale)
    for cluster in range(0, num_clusters, CLUSTERS):
        place = cluster + tl.arange(0, CLUSTERS)
        product = tl.zeros((ROWS, CLUSTERS), tl.float32)
        for at in range(0, PADDED, WIDTH):
            if not ONE_BLOCK:
                inside = here[:, None] & (at + column < dim)[None, :]
                first, second = _halves(start + at + column[None, :], inside, scale)
            where = place[None, :] * PADDED + at + column[:, None]
            table = tl.load(high + where)
            part = tl.dot(second, table)
            part = tl.dot(first, tl.load(low + where), part)
            product += tl.dot(first, table, part)  # tensor cores cut off what they add to, so they add to little
        score = tl.load(half + place)[None, :] - product * unscale
        least, closest = tl.min(score, 1, return_indices=True)
        label = tl.where(least < best, cluster + closest, label)
        best = tl.minimum(least, best)
    distance = 2 * best + tl.load(squares + row, here, 0.0)
    if PRICED:
        distance -= tl.load(price + label)
    distance = tl.maximum(distance, 0.0)
    tl.store(labels + row, label, here)
    tl.store(near + row, distance, here)
    rounded = (distance.to(tl.float64) + shift) - shift
    tl.atomic_add(errors + (program % COPIES) * num_clusters + label, rounded, here, sem="relaxed")


@triton.jit
def _segments_kernel(
    values,
    changed,
    order,
    offsets,
    sums,
    num_changed,
    num_clusters,
    dim,
    shift,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    segment = tl.program_id(0)
    begin = tl.load(offsets + segment) + tl.program_id(1) * ROWS
    end = tl.load(offsets + segment + 1)
    column = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    if begin < end:
        total = tl.zeros((WIDTH,), tl.float64)
        for first in range(begin, end, PARTS * ROWS):
            place = first + tl.arange(0, ROWS)
            entry = tl.load(order + place, place < end, 0) % num_changed
            row = tl.load(changed + entry)
            inside = (place < end)[:, None] & (column < dim)[None, :]
            wide = tl.load(values + row[:, None] * dim + column[None, :], inside, 0.0).to(tl.float64)
            total += tl.sum((wide + shift) - shift, 0)
        total = tl.where(segment < num_clusters, total, -total)
        tl.atomic_add(sums + (segment % num_clusters) * dim + column, total, column < dim, sem="relaxed")


@dataclass
class Table:
    """Centroids split in two and padded, and half their squares with half their prices.

    Shapes:
        high, low: (K', dim') float16, padded with zeros. half: (K',) float32, padded with infinity.
        price: (K,) float32.
    """

    high: torch.Tensor
    low: torch.Tensor
    half: torch.Tensor
    price: torch.Tensor | None
    num_clusters: int
    dim: int
    shape: Shape
    row_scale: float
    scale: float


def shape_for(num_clusters: int, dim: int) -> Shape:
    """NARROW or WIDE, made smaller where there is less to do."""
    shape = NARROW if dim <= NARROW.width else WIDE
    width = max(16, min(shape.width, triton.next_power_of_2(dim)))
    clusters = max(16, min(shape.clusters, triton.next_power_of_2(num_clusters)))
    return replace(shape, width=width, clusters=clusters)


class TritonPasses(TorchPasses):
    """The same passes on an NVIDIA GPU."""

    error_copies = 64
    score_bytes = 0

    def table(self, centroids: np.ndarray, prices: np.ndarray | None, largest: float) -> Table:
        num_clusters, dim = centroids.shape
        shape = shape_for(num_clusters, dim)
        block, width = shape.clusters, shape.width
        scale = power_of_two(float(np.abs(centroids).max(initial=0.0)))
        cost, price = (centroids**2).sum(1), None
        if prices is not None:
            cost = cost + prices.astype(np.float32)
            price = torch.from_numpy(prices.astype(np.float32)).to(self.device)
        half = np.full(-(-num_clusters // block) * block, np.inf, np.float32)
        half[:num_clusters] = cost / 2
        wide = torch.zeros(len(half), -(-dim // width) * width, device=self.device)
        wide[:num_clusters, :dim] = torch.from_numpy(centroids * np.float32(scale)).to(self.device)
        high = wide.half()
        return Table(
            high,
            (wide - high.float()).half(),
            torch.from_numpy(half).to(self.device),
            price,
            num_clusters,
            dim,
            shape,
            power_of_two(largest),
            scale,
        )

    def nearest(
        self,
        values: torch.Tensor,
        squares: torch.Tensor,
        table: Table,
        labels: torch.Tensor,
        near: torch.Tensor,
        errors: torch.Tensor,
        shift: float,
    ) -> None:
        shape = table.shape
        _nearest_kernel[(triton.cdiv(len(values), shape.rows),)](
            values,
            table.high,
            table.low,
            table.half,
            table.half if table.price is None else table.price,
            squares,
            labels,
            near,
            errors,
            len(values),
            table.num_clusters,
            table.dim,
            table.row_scale,
            1 / (table.row_scale * table.scale),
            shift,
            PADDED=table.high.shape[1],
            PRICED=table.price is not None,
            ONE_BLOCK=table.high.shape[1] == shape.width,
            COPIES=self.error_copies,
            ROWS=shape.rows,
            CLUSTERS=shape.clusters,
            WIDTH=shape.width,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )

    def move(
        self,
        values: torch.Tensor,
        changed: torch.Tensor,
        before: torch.Tensor | None,
        after: torch.Tensor,
        sums: torch.Tensor,
        counts: torch.Tensor,
        shift: float,
    ) -> None:
        """Rows are sorted by the sum they go to, as one addition a row and column to memory would take ten times as
        long; half of the segments are rows that come, half of them rows that go."""
        num_changed, num_clusters = len(changed), len(counts)
        if not num_changed:
            return
        segments = num_clusters if before is None else 2 * num_clusters
        kind = torch.int16 if segments < 1 << 15 else torch.int32
        keys = after[changed].to(kind)
        if before is not None:
            keys = torch.cat([keys, (before[changed] + num_clusters).to(kind)])
        keys, order = keys.sort()
        offsets = torch.searchsorted(keys, torch.arange(segments + 1, dtype=kind, device=self.device))
        sizes = offsets.diff()
        counts += sizes[:num_clusters]
        if before is not None:
            counts -= sizes[num_clusters:]
        width = min(SUM_WIDTH, triton.next_power_of_2(values.shape[1]))
        _segments_kernel[(segments, SUM_PARTS, triton.cdiv(values.shape[1], width))](
            values,
            changed,
            order,
            offsets,
            sums,
            num_changed,
            num_clusters,
            values.shape[1],
            shift,
            PARTS=SUM_PARTS,
            ROWS=SUM_ROWS,
            WIDTH=width,
            num_warps=4,
        )
