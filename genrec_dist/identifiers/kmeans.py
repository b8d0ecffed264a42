"""k-means: Lloyd's iteration, plain, balanced or by cosine, over points wherever they are.

The loop knows count, dimension, and a few questions to its points (`Points`): an array in this process and a table that
is spread over a cluster go through the same lines and give the same labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from genrec_dist.identifiers.points import LocalPoints, Moments, Points, one_thread_products
from genrec_dist.identifiers.rows import ArrayRows, unit
from genrec_dist.identifiers.starts import Start, choose_start

PRICE_PASSES, LAST_PRICE_PASSES = 12, 40
FIRST_STEP = 0.02
"""Of a price, as a share of the mean squared distance."""
BALANCE_TOLERANCE = 0.02
ROUNDING = 1e-6


@dataclass(frozen=True)
class KMeansOptions:
    """How to cluster.

    Args:
        iterations: at most.
        tolerance: stop when the objective falls by less than this share of itself.
        num_starts: best of so many.
        balanced: sizes floor(n / K) or ceil(n / K).
        metric: cosine takes points and centroids at length 1.
        start: k-means++ (`plus_plus`), k-means|| (`parallel`), or by the number of points (`auto`).
    """

    iterations: int = 30
    tolerance: float = 1e-4
    num_starts: int = 1
    balanced: bool = False
    metric: str = "euclidean"
    start: Start = "auto"


PLAIN = KMeansOptions()


@dataclass
class KMeansState:
    """Where a k-means is; saved after every iteration, so that a lost process costs one.

    Args:
        start: number of the start in work.
        objective, imbalance, splits: by iteration, see `KMeansResult`.
        best: the best of the starts before.

    Shapes:
        centroids: (K, dim) float32, of the next assignment.
    """

    centroids: np.ndarray
    start: int = 0
    objective: list[float] = field(default_factory=list)
    imbalance: list[float] = field(default_factory=list)
    splits: list[int] = field(default_factory=list)
    best: KMeansState | None = None


@dataclass
class KMeansResult:
    """Outcome of one k-means.

    Shapes:
        labels: (n,) int32.
        centroids: (K, dim) float32, to which the rows are nearest (unless balanced): means of the assignment before.
        sizes: (K,) int64. errors: (K,) float64, sums of squared distances.
        objective: their total after each iteration; imbalance: largest size over the mean one; splits: empty clusters
            that were refilled.
    """

    labels: np.ndarray
    centroids: np.ndarray
    sizes: np.ndarray
    errors: np.ndarray
    objective: list[float]
    imbalance: list[float]
    splits: list[int]


def kmeans(
    points: Points | np.ndarray,
    k: int,
    options: KMeansOptions = PLAIN,
    *,
    seed: int = 0,
    centroids: np.ndarray | None = None,
    state: KMeansState | None = None,
    on_iteration: Callable[[KMeansState], None] | None = None,
) -> KMeansResult:
    """Cluster into `k` clusters, none of them empty when there are at least k points.

    Args:
        points: data; with metric 'cosine' rows of length 1 (an array is scaled here).
        k: clusters.
        options: how.
        seed: of the starts.
        centroids: start from these instead.
        state: go on from here.
        on_iteration: called after each iteration with the state to go on from.

    Shapes:
        points: (n, dim) float32, where an array. centroids: (k, dim) float32.
    """
    if isinstance(points, np.ndarray):
        points = LocalPoints(ArrayRows(unit(points) if options.metric == "cosine" else points))
    num_starts = 1 if centroids is not None else options.num_starts
    best = None if state is None else state.best
    with one_thread_products():
        for start in range(0 if state is None else state.start, num_starts):
            if state is None:
                first = choose_start(points, k, options.start, (seed, start)) if centroids is None else centroids
                state = KMeansState(first.astype(np.float32), start, best=best)
            while len(state.objective) < options.iterations and not _settled(state.objective, options):
                moments, _ = _assign(points, state, options, last=False)
                state.centroids = means(moments, state.centroids, options.metric)
                if on_iteration is not None:
                    on_iteration(state)
            best = state if best is None or state.objective[-1] < best.objective[-1] else best
            best.best, state = None, None
        assert best is not None
        moments, refilled = _assign(points, best, options, last=True)
    # A cluster that was refilled is where its row is, so that a copy of the row would be put there as well.
    ours = means(moments, best.centroids, options.metric)
    best.centroids[refilled] = ours[refilled]
    return KMeansResult(
        points.labels().copy(),
        best.centroids,
        moments.counts,
        moments.errors,
        best.objective,
        best.imbalance,
        best.splits,
    )


def _settled(objective: list[float], options: KMeansOptions) -> bool:
    """Whether the objective has stopped falling; a balanced one, of nearly equal sizes, may rise a little."""
    if len(objective) < 2:
        return False
    fall = objective[-2] - objective[-1]
    return (abs(fall) if options.balanced else fall) <= options.tolerance * objective[-2]


def _assign(points: Points, state: KMeansState, options: KMeansOptions, last: bool) -> tuple[Moments, np.ndarray]:
    """Assign by the options, fill empty clusters, note what came of it; returns moments and the clusters refilled."""
    refilled = np.empty(0, np.int64)
    if options.balanced:
        moments = _assign_balanced(points, state.centroids, last)
    else:
        moments, refilled = fill_empty(points, points.assign(state.centroids))
    state.objective.append(moments.objective)
    state.imbalance.append(float(moments.counts.max() * len(moments.counts) / max(1, points.num_rows)))
    state.splits.append(len(refilled))
    return moments, refilled


def means(moments: Moments, before: np.ndarray, metric: str = "euclidean") -> np.ndarray:
    """Centroids of an assignment, (K, dim) float32; an empty cluster keeps its centroid."""
    out = before.copy()
    filled = moments.counts > 0
    out[filled] = (moments.sums[filled] / moments.counts[filled, None]).astype(np.float32)
    return unit(out) if metric == "cosine" else out


def fill_empty(points: Points, moments: Moments) -> tuple[Moments, np.ndarray]:
    """Refill every empty cluster from clusters that err much; returns moments and the clusters refilled.

    An empty cluster gets the farthest row of a donor, the donors of the largest errors first. Rows that are all alike
    are shared out evenly instead: one at a time they would make a tree into a comb.
    """
    refilled = np.flatnonzero(moments.counts == 0)
    while len(empty := np.flatnonzero(moments.counts == 0)):
        donors = np.flatnonzero(moments.counts > 1)
        if not len(donors):
            break
        donors = donors[np.lexsort((donors, -moments.counts[donors], -moments.errors[donors]))][: len(empty)]
        alike = _rows_alike(moments)
        takers = {int(donor): empty[place :: len(donors)] for place, donor in enumerate(donors)}
        wanted, places = {}, []
        for donor, taking in takers.items():
            count, shares = int(moments.counts[donor]), len(taking)
            give = max(count * shares // (shares + 1) if alike[donor] else shares, 1)
            wanted[donor] = min(give, count - 1)
            places.append(taking[np.arange(wanted[donor]) * shares // max(shares, wanted[donor])])
        found = points.farthest(wanted)
        rows = np.concatenate([found[donor] for donor in wanted])
        moments = points.move(rows, np.concatenate(places).astype(np.int32), np.zeros(len(rows), np.float32))
    return moments, refilled[moments.counts[refilled] > 0]


def _rows_alike(moments: Moments) -> np.ndarray:
    """Clusters whose rows differ by no more than the rounding of squared distances, (K,) bool."""
    square = (moments.sums**2).sum(1) / np.maximum(moments.counts, 1)
    return moments.errors <= ROUNDING * square


# Balanced


def _assign_balanced(points: Points, centroids: np.ndarray, last: bool) -> Moments:
    """Nearly equal sizes by prices; at the end exactly equal ones."""
    moments, prices = _raise_prices(points, centroids, LAST_PRICE_PASSES if last else PRICE_PASSES)
    return _even_out(points, centroids, prices, moments) if last else moments


def _raise_prices(points: Points, centroids: np.ndarray, passes: int) -> tuple[Moments, np.ndarray]:
    """Ascent on the dual of the transport problem: a cluster with too many rows gets dearer, one with too few cheaper.

    The dual's gradient in a price is the cluster's excess; each price has a step of its own, which grows while the sign
    stays and halves when it turns. A pass costs one assignment; K numbers travel. Prices begin at zero each time: once
    centroids have moved, the old ones lead astray.

    Source: step rule of Riedmiller and Braun (1993), Rprop.
    """
    k = len(centroids)
    capacity = points.num_rows / k
    prices, before = np.zeros(k), np.zeros(k)
    moments = points.assign(centroids, prices)
    steps = np.full(k, FIRST_STEP * moments.objective / max(1, points.num_rows))
    for _ in range(passes):
        excess = moments.counts - capacity
        if np.abs(excess).max() <= max(1.0, BALANCE_TOLERANCE * capacity):
            break
        sign = np.sign(excess)
        steps = steps * np.where(sign * before > 0, 1.3, np.where(sign * before < 0, 0.5, 1.0))
        prices, before = prices + sign * steps, sign
        moments = points.assign(centroids, prices)
    return moments, prices


def _even_out(points: Points, centroids: np.ndarray, prices: np.ndarray, moments: Moments) -> Moments:
    """Exact sizes: rows to which it costs least leave clusters that have too many for those that have room."""
    capacity = capacities(moments.counts, points.num_rows)
    excess = moments.counts - capacity
    wanted = {int(c): int(excess[c]) for c in np.flatnonzero(excess > 0)}
    if not wanted:
        return moments
    room = np.flatnonzero(excess < 0)
    rows = points.leavers(centroids, prices, wanted, room)
    cost = points.costs(rows, centroids[room])
    places = deferred_acceptance(cost, -excess[room])
    return points.move(rows, room[places].astype(np.int32), cost[np.arange(len(rows)), places])


def capacities(counts: np.ndarray, num_rows: int) -> np.ndarray:
    """Sizes within one of each other; the larger ones to the clusters that are largest now."""
    out = np.full(len(counts), num_rows // len(counts))
    out[np.argsort(-counts, kind="stable")[: num_rows % len(counts)]] += 1
    return out


def deferred_acceptance(cost: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """Give every row a column, at most `capacity` rows to each.

    A row proposes to its cheapest column that has not refused it; a column over its capacity refuses the rows that lose
    least by going to their next choice.

    Shapes:
        cost: (n, K) float32. capacity: (K,) int, n or more in all. returns: (n,) int64.

    Source: Gale and Shapley (1962), with regret as the columns' preference.
    """
    open_cost = cost.copy()
    labels = open_cost.argmin(1)
    while True:
        sizes = np.bincount(labels, minlength=cost.shape[1])
        over = np.flatnonzero(sizes > capacity)
        if not len(over):
            return labels
        for cluster in over:
            members = np.flatnonzero(labels == cluster)
            others = open_cost[members].copy()
            others[:, cluster] = np.inf
            regret = others.min(1) - cost[members, cluster]
            refused = members[np.argsort(regret, kind="stable")[: len(members) - capacity[cluster]]]
            open_cost[refused, cluster] = np.inf
            labels[refused] = open_cost[refused].argmin(1)
