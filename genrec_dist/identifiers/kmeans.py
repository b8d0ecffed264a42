"""Lloyd's k-means, plain and balanced, deterministic for a seed.

The loop needs only count, dimension and `assign`, so that a distributed version replaces the inner step.
Distances are blocked float32 matrix products, sums are float64 in row order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_BLOCK = 65536


@dataclass
class KMeansResult:
    """Outcome of one k-means.

    Shapes:
        labels: (n,) int64.
        centroids: (k, dim) float32.
        objective: sum of squared distances, after each iteration.
    """

    labels: np.ndarray
    centroids: np.ndarray
    objective: list[float]


def squared_distances(points: np.ndarray, centroids: np.ndarray, squares: np.ndarray | None = None) -> np.ndarray:
    """Squared Euclidean distances, (n, k) float32, never negative; `squares` are the points' own, where known."""
    cross = points @ centroids.T
    own = (points**2).sum(1) if squares is None else squares
    out = own[:, None] - 2.0 * cross + (centroids**2).sum(1)[None]
    return np.maximum(out, 0.0, out=out)


def assign(points: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest centroid of each point and its squared distance; ties go to the lower index."""
    labels = np.empty(len(points), np.int64)
    distances = np.empty(len(points), np.float32)
    for start in range(0, len(points), _BLOCK):
        block = squared_distances(points[start : start + _BLOCK], centroids)
        best = block.argmin(1)
        labels[start : start + _BLOCK] = best
        distances[start : start + _BLOCK] = block[np.arange(len(best)), best]
    return labels, distances


def plus_plus_start(points: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k-means++ seeding (Arthur and Vassilvitskii, 2007), (k, dim) float32."""
    centroids = np.empty((k, points.shape[1]), np.float32)
    centroids[0] = points[rng.integers(len(points))]
    squares = (points**2).sum(1)
    nearest = squared_distances(points, centroids[:1], squares)[:, 0].astype(np.float64)
    for i in range(1, k):
        total = nearest.sum()
        if total <= 0:  # fewer distinct points than clusters
            centroids[i] = points[rng.integers(len(points))]
            continue
        pick = np.searchsorted(np.cumsum(nearest), rng.random() * total, side="right")
        centroids[i] = points[min(pick, len(points) - 1)]
        np.minimum(nearest, squared_distances(points, centroids[i : i + 1], squares)[:, 0], out=nearest)
    return centroids


def balanced_assign(points: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Assignment with cluster sizes within one of each other.

    Deferred acceptance: a point proposes to its nearest centroid that has not refused it; a centroid over its
    capacity refuses the points that lose least by going to their next choice. Memory n x k.

    Source: Gale and Shapley (1962), with regret as the centroids' preference.
    """
    n, k = len(points), len(centroids)
    cost = squared_distances(points, centroids)
    natural = np.bincount(cost.argmin(1), minlength=k)
    capacity = np.full(k, n // k)
    capacity[np.argsort(-natural, kind="stable")[: n % k]] += 1
    open_cost = cost.copy()
    labels = open_cost.argmin(1)
    while True:
        sizes = np.bincount(labels, minlength=k)
        over = np.flatnonzero(sizes > capacity)
        if not len(over):
            return labels, cost[np.arange(n), labels]
        for cluster in over:
            members = np.flatnonzero(labels == cluster)
            others = open_cost[members].copy()
            others[:, cluster] = np.inf
            regret = others.min(1) - cost[members, cluster]
            refused = members[np.argsort(regret, kind="stable")[: len(members) - capacity[cluster]]]
            open_cost[refused, cluster] = np.inf
            labels[refused] = open_cost[refused].argmin(1)


def _means(points: np.ndarray, labels: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Float64 means of the clusters; an empty one keeps its centroid."""
    k = len(centroids)
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels, minlength=k)
    filled = np.flatnonzero(counts)
    begins = np.concatenate(([0], np.cumsum(counts)))[filled]
    sums = np.add.reduceat(points[order].astype(np.float64), begins, axis=0)
    out = centroids.copy()
    out[filled] = (sums / counts[filled, None]).astype(np.float32)
    return out


def _fill_empty(points: np.ndarray, labels: np.ndarray, distances: np.ndarray, centroids: np.ndarray) -> bool:
    """Give every empty cluster the farthest point of a cluster that has more than one; True if any was empty."""
    counts = np.bincount(labels, minlength=len(centroids))
    empty = np.flatnonzero(counts == 0)
    if not len(empty):
        return False
    order = iter(np.argsort(-distances, kind="stable"))
    for cluster in empty:
        point = next((p for p in order if counts[labels[p]] > 1), None)
        if point is None:
            break
        counts[labels[point]] -= 1
        labels[point], counts[cluster] = cluster, 1
        centroids[cluster] = points[point]
    return True


def kmeans(
    points: np.ndarray,
    k: int,
    *,
    iterations: int = 30,
    seed: int = 0,
    num_starts: int = 1,
    balanced: bool = False,
    tolerance: float = 1e-4,
) -> KMeansResult:
    """Cluster `points` into `k` non-empty clusters (when there are at least k points).

    Args:
        points: data.
        k: clusters.
        iterations: at most; stops when the objective falls by less than `tolerance` of itself.
        seed: of the k-means++ starts.
        num_starts: best of so many.
        balanced: sizes floor(n/k) or ceil(n/k).

    Shapes:
        points: (n, dim) float32.
    """
    points = np.ascontiguousarray(points, np.float32)
    step = balanced_assign if balanced else assign
    best: KMeansResult | None = None
    for start in range(num_starts):
        rng = np.random.default_rng([seed, start])
        centroids = plus_plus_start(points, k, rng)
        objective: list[float] = []
        for _ in range(iterations):
            labels, distances = step(points, centroids)
            if not balanced:
                _fill_empty(points, labels, distances, centroids)
            objective.append(float(distances.sum(dtype=np.float64)))
            centroids = _means(points, labels, centroids)
            if len(objective) > 1 and objective[-2] - objective[-1] <= tolerance * objective[-2]:
                break
        labels, distances = step(points, centroids)
        if not balanced:
            _fill_empty(points, labels, distances, centroids)
        objective.append(float(distances.sum(dtype=np.float64)))
        if best is None or objective[-1] < best.objective[-1]:
            best = KMeansResult(labels, centroids, objective)
    assert best is not None
    return best
