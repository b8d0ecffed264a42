"""One pass over the rows of a k-means: nearest centroids, and sums that are the same whoever adds them up.

Two things make labels and centroids independent of workers, threads and memory. Rows are taken in chunks whose bounds
depend on nothing but the width, so every matrix product has the same shape everywhere. And values are rounded to a
grid so coarse that float64 holds every sum of them exactly: addition is then associative, sums may be formed in any
order, and kept up to date by adding only what changed.

Source: pre-rounding of Demmel and Nguyen (2013), Fast Reproducible Floating-Point Summation, with one bin.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Protocol, TypeVar

import numpy as np
import scipy.sparse
from threadpoolctl import ThreadpoolController

from genrec_dist.identifiers.rows import Rows

CHUNK_BYTES = 8 << 20
PRODUCT_ROWS = 1024
T = TypeVar("T")


def chunk_rows(dim: int) -> int:
    """Rows of a chunk: a power of two, 256 or more, about 8 MiB."""
    return max(256, 1 << int(math.log2(max(1, CHUNK_BYTES // (4 * dim)))))


class Grid:
    """Multiples of a power of two, coarse enough that sums of `count` values up to `largest` are exact in float64."""

    def __init__(self, count: int, largest: float) -> None:
        quantum = (
            2.0 ** (math.ceil(math.log2(largest)) + math.ceil(math.log2(max(2, count))) + 2 - 53) if largest else 1
        )
        self.shift = 1.5 * 2.0**52 * quantum

    def round(self, values: np.ndarray) -> np.ndarray:
        """Nearest multiples, float64."""
        out = values.astype(np.float64)
        out += self.shift
        out -= self.shift
        return out


@dataclass
class Moments:
    """What an assignment comes to. Moments of disjoint rows add up, exactly.

    Shapes:
        counts: (K,) int64.
        sums: (K, dim) float64.
        errors: (K,) float64, squared distances to the centroid.
    """

    counts: np.ndarray
    sums: np.ndarray
    errors: np.ndarray

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.counts + other.counts, self.sums + other.sums, self.errors + other.errors)

    @property
    def objective(self) -> float:
        return float(self.errors.sum())


class Points(Protocol):
    """What the k-means loop needs of its data, wherever they are. Rows are numbered over all workers."""

    @property
    def num_rows(self) -> int: ...
    @property
    def dim(self) -> int: ...

    def assign(self, centroids: np.ndarray, prices: np.ndarray | None = None) -> Moments:
        """Give every row its nearest centroid, ties to the lower; `prices` (K,) are added to squared distances."""
        ...

    def farthest(self, wanted: dict[int, int]) -> dict[int, np.ndarray]:
        """Rows of clusters farthest from their centroid, in the order of `least`; `wanted`: how many, by cluster."""
        ...

    def leavers(
        self, centroids: np.ndarray, prices: np.ndarray, wanted: dict[int, int], room: np.ndarray
    ) -> np.ndarray:
        """Rows of clusters to which going to one of the clusters `room` costs least; `wanted`: how many."""
        ...

    def move(self, rows: np.ndarray, clusters: np.ndarray, distances: np.ndarray) -> Moments:
        """Put rows into clusters, at given squared distances; returns all moments."""
        ...

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Rows, (n, dim) float32."""
        ...

    def costs(self, rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
        """Squared distances of rows to centroids, (n, k) float32."""
        ...

    def nearest(self, centroids: np.ndarray, first: bool) -> np.ndarray:
        """Lower the rows' distances to the nearest start so far; returns the sum by chunk, float64.

        Args:
            first: forget the starts before.
        """
        ...

    def pick(self, chunk: int, share: float) -> int:
        """Row of a chunk at which the running sum of distances passes `share` of the chunk's."""
        ...

    def sample(self, factor: float, seed: tuple[int, ...]) -> np.ndarray:
        """Rows, each with probability min(1, factor x distance), by a generator of its chunk."""
        ...

    def labels(self) -> np.ndarray:
        """Cluster of each row, (num_rows,) int32."""
        ...


class LocalPoints:
    """Rows in this process, passed over by numpy, or a range of them that begins at a chunk.

    Args:
        rows: reader.
        threads: passes over chunks run in so many threads, each of one core.
        total: rows over all workers; default: these alone.
        first_row: number of the first row among all; a multiple of the chunk.
    """

    def __init__(self, rows: Rows, threads: int = 1, total: int | None = None, first_row: int = 0) -> None:
        self.rows, self.num_rows, self.dim = rows, rows.num_rows, rows.dim
        self.threads, self.first_row = threads, first_row
        self.chunk = chunk_rows(self.dim)
        self.total = self.num_rows if total is None else total
        self._squares = np.empty(self.num_rows, np.float32)
        self._labels = np.full(self.num_rows, -1, np.int32)
        self._distances = np.zeros(self.num_rows, np.float32)
        self._sums: np.ndarray | None = None
        self._memory = threading.local()
        self.set_largest(max(self._each(self._look), default=0.0))

    def set_largest(self, largest: float) -> None:
        """Largest absolute value over all workers, which the grids depend on; until it is told, of these rows."""
        self.largest = largest
        self.grid = Grid(self.total, largest)
        self.error_grid = Grid(self.total, 4.0 * self.dim * largest**2)

    def _each(self, work: Callable[[int, int], T]) -> list[T]:
        """Call `work(start, stop)` for every chunk; results in the order of chunks."""
        bounds = [(start, min(start + self.chunk, self.num_rows)) for start in range(0, self.num_rows, self.chunk)]
        with one_thread_products():
            if self.threads == 1 or len(bounds) < 2:
                return [work(*bound) for bound in bounds]
            with ThreadPoolExecutor(self.threads) as pool:
                return list(pool.map(lambda bound: work(*bound), bounds))

    def _look(self, start: int, stop: int) -> float:
        values = self.rows.read(start, stop)
        self._squares[start:stop] = np.einsum("nd,nd->n", values, values)
        return float(np.abs(values).max(initial=0.0))

    # Lloyd's iteration

    def assign(self, centroids: np.ndarray, prices: np.ndarray | None = None) -> Moments:
        num_clusters = len(centroids)
        if self._sums is None or len(self._sums) != num_clusters:
            self._sums = np.zeros((num_clusters, self.dim))
            self._labels[:] = -1
        price = np.zeros(num_clusters, np.float32) if prices is None else prices.astype(np.float32)
        half = ((centroids**2).sum(1) + price) / 2
        totals = _PerThread(num_clusters, self.dim)

        def work(start: int, stop: int) -> None:
            values, (sums, errors) = self.rows.read(start, stop), totals.mine()
            scores = self._room(num_clusters)
            labels = np.empty(stop - start, np.int32)
            best = np.empty(stop - start, np.float32)
            for low in range(0, stop - start, PRODUCT_ROWS):
                block = values[low : low + PRODUCT_ROWS]
                score = scores[: len(block)]
                np.matmul(block, centroids.T, out=score)
                np.subtract(half, score, out=score)
                label = score.argmin(1)
                labels[low : low + PRODUCT_ROWS] = label
                best[low : low + PRODUCT_ROWS] = score[np.arange(len(block)), label]
            distances = 2 * best + self._squares[start:stop]
            if prices is not None:
                distances -= price[labels]
            np.maximum(distances, 0, out=distances)
            errors += np.bincount(labels, self.error_grid.round(distances), num_clusters)
            self._shift_sums(sums, values, self._labels[start:stop], labels)
            self._labels[start:stop], self._distances[start:stop] = labels, distances

        self._each(work)
        self._errors = np.zeros(num_clusters)
        for sums, errors in totals.all():
            self._sums += sums
            self._errors += errors
        return self._moments()

    def _room(self, width: int) -> np.ndarray:
        """This thread's space for the scores of a block."""
        room = getattr(self._memory, "scores", None)
        if room is None or room.shape[1] != width:
            room = self._memory.scores = np.empty((PRODUCT_ROWS, width), np.float32)
        return room

    def _shift_sums(self, sums: np.ndarray, values: np.ndarray, before: np.ndarray, after: np.ndarray) -> None:
        """Take rows whose cluster changes out of the old one's sum and into the new one's."""
        changed = np.flatnonzero(before != after)
        if not len(changed):
            return
        rounded = self.grid.round(values[changed] if len(changed) < len(values) else values)
        had = np.flatnonzero(before[changed] >= 0)
        row = np.concatenate([after[changed], before[changed][had]])
        column = np.concatenate([np.arange(len(changed)), had])
        sign = np.concatenate([np.ones(len(changed)), -np.ones(len(had))])
        order = np.argsort(column, kind="stable")
        # One compressed column a changed row: the product adds row after row, in C.
        pointer = np.concatenate([[0], np.cumsum(1 + (before[changed] >= 0))])
        moves = scipy.sparse.csc_matrix((sign[order], row[order], pointer), shape=(len(sums), len(changed)))
        sums += moves @ rounded

    def _moments(self) -> Moments:
        assert self._sums is not None
        counts = np.bincount(self._labels, minlength=len(self._sums))
        return Moments(counts, self._sums.copy(), self._errors.copy())

    def labels(self) -> np.ndarray:
        return self._labels

    def take(self, rows: np.ndarray) -> np.ndarray:
        return self.rows.take(rows - self.first_row)

    def costs(self, rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
        return distances_of(self.take, rows, centroids)

    def farthest(self, wanted: dict[int, int]) -> dict[int, np.ndarray]:
        return {cluster: rows for cluster, (rows, _) in self.farthest_with_distances(wanted).items()}

    def farthest_with_distances(self, wanted: dict[int, int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """`farthest`, with the distances by which workers' answers are merged."""
        return self._least(wanted, -self._distances, apart=True)

    def _least(self, wanted: dict[int, int], cost: np.ndarray, apart: bool) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """`least` rows of clusters, as numbers over all workers, and their costs."""
        out = {}
        for cluster, count in wanted.items():
            members = np.flatnonzero(self._labels == cluster)
            chosen = members[least(members, cost[members], count, apart)]
            out[cluster] = (chosen + self.first_row, cost[chosen])
        return out

    def move(self, rows: np.ndarray, clusters: np.ndarray, distances: np.ndarray) -> Moments:
        assert self._sums is not None
        local = rows - self.first_row
        before = self._labels[local]
        self._errors -= np.bincount(before, self.error_grid.round(self._distances[local]), len(self._errors))
        self._errors += np.bincount(clusters, self.error_grid.round(distances), len(self._errors))
        for start in range(0, len(local), self.chunk):
            part = slice(start, start + self.chunk)
            self._shift_sums(self._sums, self.rows.take(local[part]), before[part], clusters[part])
        self._labels[local], self._distances[local] = clusters, distances
        return self._moments()

    def leavers(
        self, centroids: np.ndarray, prices: np.ndarray, wanted: dict[int, int], room: np.ndarray
    ) -> np.ndarray:
        parts = [rows for rows, _ in self.leavers_with_regret(centroids, prices, wanted, room).values()]
        return np.sort(np.concatenate(parts))

    def leavers_with_regret(
        self, centroids: np.ndarray, prices: np.ndarray, wanted: dict[int, int], room: np.ndarray
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """`leavers` by cluster, with what leaving costs them."""
        price = prices.astype(np.float32)
        half = ((centroids**2).sum(1) + price) / 2
        full = np.isin(np.arange(len(centroids)), list(wanted))
        regret = np.full(self.num_rows, np.inf, np.float32)

        def work(start: int, stop: int) -> None:
            here = np.flatnonzero(full[self._labels[start:stop]])
            if not len(here):
                return
            values, own = self.rows.read(start, stop)[here], self._labels[start:stop][here]
            for low in range(0, len(here), PRODUCT_ROWS):
                block, now = values[low : low + PRODUCT_ROWS], own[low : low + PRODUCT_ROWS]
                other = (half[room] - block @ centroids[room].T).min(1)
                staying = half[now] - np.einsum("nd,nd->n", block, centroids[now])
                regret[start + here[low : low + PRODUCT_ROWS]] = other - staying

        self._each(work)
        return self._least(wanted, regret, apart=False)

    # Starts

    def nearest(self, centroids: np.ndarray, first: bool) -> np.ndarray:
        half = (centroids**2).sum(1) / 2

        def work(start: int, stop: int) -> float:
            values = self.rows.read(start, stop)
            best = np.empty(stop - start, np.float32)
            for low in range(0, stop - start, PRODUCT_ROWS):
                block = values[low : low + PRODUCT_ROWS]
                best[low : low + PRODUCT_ROWS] = (half - block @ centroids.T).min(1)
            found = np.maximum(2 * best + self._squares[start:stop], 0)
            if not first:
                found = np.minimum(found, self._distances[start:stop])
            self._distances[start:stop] = found
            return float(found.sum(dtype=np.float64))

        self._sums = None
        return np.array(self._each(work))

    def pick(self, chunk: int, share: float) -> int:
        start = chunk * self.chunk - self.first_row
        run = np.cumsum(self._distances[start : start + self.chunk], dtype=np.float64)
        place = int(np.searchsorted(run, share * run[-1], side="right"))
        return self.first_row + start + min(place, len(run) - 1)

    def sample(self, factor: float, seed: tuple[int, ...]) -> np.ndarray:
        def work(start: int, stop: int) -> np.ndarray:
            generator = np.random.default_rng([*seed, (self.first_row + start) // self.chunk])
            return start + np.flatnonzero(generator.random(stop - start) < factor * self._distances[start:stop])

        picked = self._each(work)
        return self.first_row + np.concatenate(picked or [np.empty(0, np.int64)])


def squared_distances(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances, (n, k) float32, never negative."""
    cross = points @ centroids.T
    out = (points**2).sum(1)[:, None] - 2.0 * cross + (centroids**2).sum(1)[None]
    return np.maximum(out, 0.0, out=out)


def distances_of(take: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """`squared_distances` of the rows that `take` gives for numbers, block by block; (n, k) float32."""
    out = np.empty((len(rows), len(centroids)), np.float32)
    for start in range(0, len(rows), PRODUCT_ROWS):
        part = slice(start, start + PRODUCT_ROWS)
        out[part] = squared_distances(take(rows[part]), centroids)
    return out


def least(rows: np.ndarray, costs: np.ndarray, count: int, apart: bool) -> np.ndarray:
    """Places of the `count` rows of least cost, ties to the lower row.

    The least of several parts' least are the least of the whole.

    Args:
        apart: one of each cost first, as copies of a row cost alike, then the others.

    Shapes:
        rows: (n,) int64. costs: (n,) float. returns: (at most count,) int64.
    """
    order = np.lexsort((rows, costs))
    if not apart:
        return order[:count]
    again = np.zeros(len(rows), bool)
    again[1:] = np.diff(costs[order]) == 0
    return np.concatenate([order[~again], order[again]])[:count]


class _PerThread:
    """Sums and errors of each thread of a pass, added up at its end."""

    def __init__(self, num_clusters: int, dim: int) -> None:
        self._shape, self._memory = (num_clusters, dim), threading.local()
        self._found: list[tuple[np.ndarray, np.ndarray]] = []

    def mine(self) -> tuple[np.ndarray, np.ndarray]:
        if not hasattr(self._memory, "sums"):
            self._memory.sums = (np.zeros(self._shape), np.zeros(self._shape[0]))
            self._found.append(self._memory.sums)
        return self._memory.sums

    def all(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield from self._found


class _Limit:
    """Threads of numpy's matrix products, held at one for as long as somebody needs it."""

    def __init__(self) -> None:
        self._lock, self._holders, self._stack = threading.Lock(), 0, ExitStack()
        self._controller = ThreadpoolController()

    def hold(self) -> None:
        with self._lock:
            if not self._holders:
                self._stack.enter_context(self._controller.limit(limits=1, user_api="blas"))
            self._holders += 1

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            if not self._holders:
                self._stack.close()


_limit = cache(_Limit)


@contextmanager
def one_thread_products() -> Iterator[None]:
    """Matrix products of numpy in one thread each: the threads are ours. May be nested, and held by several threads."""
    _limit().hold()
    try:
        yield
    finally:
        _limit().release()
