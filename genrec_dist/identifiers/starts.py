"""Where k-means begins: k-means++, and k-means|| for points that are too many to pass over K times."""

from __future__ import annotations

from typing import Literal

import numpy as np

from genrec_dist.identifiers.points import LocalPoints, Points, chunk_rows, squared_distances
from genrec_dist.identifiers.rows import ArrayRows

Start = Literal["auto", "plus_plus", "parallel"]
PLUS_PLUS_ROWS = 1 << 16
"""auto: k-means++ up to so many points."""
ROUNDS = 4
OVERSAMPLING = 1.0
CANDIDATE_ITERATIONS = 10


def choose_start(points: Points, k: int, kind: Start, seed: tuple[int, ...]) -> np.ndarray:
    """First centroids, (k, dim) float32.

    Args:
        points: data.
        k: how many.
        kind: which method; 'auto' decides by the number of points alone.
        seed: of all drawing.
    """
    if kind == "parallel" or (kind == "auto" and points.num_rows > PLUS_PLUS_ROWS):
        return parallel_start(points, k, seed)
    return plus_plus_start(points, k, np.random.default_rng(list(seed)))


def plus_plus_start(points: Points | np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++: each centroid a row drawn in proportion to its squared distance from those before; k passes.

    Source: Arthur and Vassilvitskii (2007).
    """
    points = LocalPoints(ArrayRows(points)) if isinstance(points, np.ndarray) else points
    if points.num_rows <= chunk_rows(points.dim):
        values = points.take(np.arange(points.num_rows))
        return values[_plus_plus_rows(values, k, rng)]
    centroids = np.empty((k, points.dim), np.float32)
    row = int(rng.integers(points.num_rows))
    for place in range(k):
        centroids[place] = points.take(np.array([row]))[0]
        if place + 1 < k:
            row = _draw(points, points.nearest(centroids[place : place + 1], first=place == 0), rng)
    return centroids


def _plus_plus_rows(values: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++ on rows of one chunk, without going through their owner for every centroid; (k,) int64."""
    squares = np.einsum("nd,nd->n", values, values)
    chosen = np.empty(k, np.int64)
    chosen[0] = rng.integers(len(values))
    nearest = np.full(len(values), np.inf, np.float32)
    scaled, found, run = -2 * values, np.empty_like(nearest), np.empty(len(values))
    for place in range(1, k):
        row = chosen[place - 1]
        np.matmul(scaled, values[row], out=found)
        found += squares
        found += squares[row]
        np.minimum(nearest, found, out=nearest)
        nearest[row] = 0
        np.cumsum(np.maximum(nearest, 0, out=nearest), out=run)
        if run[-1] > 0:
            chosen[place] = min(int(run.searchsorted(rng.random() * run[-1], side="right")), len(values) - 1)
        else:  # fewer distinct rows than clusters
            chosen[place] = rng.integers(len(values))
    return chosen


def _draw(points: Points, sums: np.ndarray, rng: np.random.Generator) -> int:
    """A row in proportion to its distance; any row when all distances are zero (fewer distinct rows than clusters)."""
    run = np.cumsum(sums)
    if run[-1] <= 0:
        return int(rng.integers(points.num_rows))
    target = rng.random() * run[-1]
    chunk = min(int(np.searchsorted(run, target, side="right")), len(run) - 1)
    return points.pick(chunk, float((target - (run[chunk] - sums[chunk])) / sums[chunk]) if sums[chunk] else 0.0)


def parallel_start(points: Points, k: int, seed: tuple[int, ...]) -> np.ndarray:
    """k-means||: a few rounds in which every row is drawn in proportion to its distance, about k rows a round; the rows
    drawn, weighted by the points nearest to them, are clustered to k by weighted k-means++ and Lloyd.

    Costs `ROUNDS` passes with about k new candidates each, and one with all of them.

    Source: Bahmani et al. (2012), Scalable K-Means++.
    """
    rng = np.random.default_rng([*seed, 0])
    rows = np.array([int(rng.integers(points.num_rows))])
    newest, drawn = points.take(rows), []
    for turn in range(ROUNDS):
        drawn.append(newest)
        total = float(points.nearest(newest, first=turn == 0).sum())
        if total <= 0:
            break
        rows = points.sample(OVERSAMPLING * k / total, (*seed, 1, turn))
        if not len(rows):
            continue
        newest = points.take(rows)
    else:
        drawn.append(newest)
    candidates = np.unique(np.concatenate(drawn), axis=0)
    if len(candidates) <= k:  # few distinct rows: fill up with rows drawn evenly
        more = rng.integers(points.num_rows, size=k - len(candidates))
        return np.concatenate([candidates, points.take(more)])
    weights = points.assign(candidates).counts
    return _weighted(candidates.astype(np.float64), weights, k, rng).astype(np.float32)


def _weighted(rows: np.ndarray, weights: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Weighted k-means++ and a few iterations of Lloyd, on rows few enough for one process."""
    centroids = np.empty((k, rows.shape[1]))
    place = int(rng.choice(len(rows), p=weights / weights.sum()))
    nearest = np.full(len(rows), np.inf)
    for turn in range(k):
        centroids[turn] = rows[place]
        nearest = np.minimum(nearest, ((rows - rows[place]) ** 2).sum(1))
        mass = nearest * weights
        total = mass.sum()
        place = int(rng.choice(len(rows), p=mass / total)) if total > 0 else int(rng.integers(len(rows)))
    for _ in range(CANDIDATE_ITERATIONS):
        labels = squared_distances(rows, centroids).argmin(1)
        sizes = np.bincount(labels, weights, k)
        sums = np.zeros_like(centroids)
        np.add.at(sums, labels, rows * weights[:, None])
        centroids[sizes > 0] = sums[sizes > 0] / sizes[sizes > 0, None]
    return centroids
