"""Points that are spread over workers: each holds a range of rows, answers are put together in the order of rows.

Knows who holds what, not how questions travel: that is the team's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from genrec_dist.identifiers.points import Moments, chunk_rows, least


class Team(Protocol):
    """Workers that each hold a `LocalPoints`."""

    def ask(self, method: str, arguments: Sequence[tuple | None]) -> list[Any]:
        """Call a method of every worker's points, together; None leaves a worker out (and gives None)."""
        ...


def ranges(num_rows: int, dim: int, workers: int) -> list[tuple[int, int]]:
    """Rows of each worker: whole chunks, as even as they go; a worker may get none."""
    chunk = chunk_rows(dim)
    chunks = -(-num_rows // chunk)
    cuts = [min(num_rows, chunk * (chunks * worker // workers)) for worker in range(workers)] + [num_rows]
    return list(pairwise(cuts))


class PooledPoints:
    """`Points` of a team.

    Args:
        team: workers, by range.
        bounds: rows of each worker, by row.
        dim: width.
    """

    def __init__(self, team: Team, bounds: Sequence[tuple[int, int]], dim: int) -> None:
        self.team, self.bounds, self.dim = team, list(bounds), dim
        self.num_rows = self.bounds[-1][1]
        self._stops = np.array([stop for _, stop in self.bounds])

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return self.team.ask(method, [arguments] * len(self.bounds))

    def _owners(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._stops, rows, side="right")

    def assign(self, centroids: np.ndarray, prices: np.ndarray | None = None) -> Moments:
        return total(self._all("assign", centroids, prices))

    def farthest(self, wanted: dict[int, int]) -> dict[int, np.ndarray]:
        found = self._all("farthest_with_distances", wanted)
        return {c: merge([one[c] for one in found], count, apart=True) for c, count in wanted.items()}

    def leavers(
        self, centroids: np.ndarray, prices: np.ndarray, wanted: dict[int, int], room: np.ndarray
    ) -> np.ndarray:
        found = self._all("leavers_with_regret", centroids, prices, wanted, room)
        return np.sort(np.concatenate([merge([one[c] for one in found], n, apart=False) for c, n in wanted.items()]))

    def move(self, rows: np.ndarray, clusters: np.ndarray, distances: np.ndarray) -> Moments:
        owner = self._owners(rows)
        here = [owner == worker for worker in range(len(self.bounds))]
        return total(self.team.ask("move", [(rows[mine], clusters[mine], distances[mine]) for mine in here]))

    def take(self, rows: np.ndarray) -> np.ndarray:
        return self._from_owners("take", rows, self.dim)

    def costs(self, rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
        return self._from_owners("costs", rows, len(centroids), centroids)

    def _from_owners(self, method: str, rows: np.ndarray, width: int, *more: Any) -> np.ndarray:
        """What the owners of rows say of them, (n, width) float32."""
        owner = self._owners(rows)
        here = [np.flatnonzero(owner == worker) for worker in range(len(self.bounds))]
        found = self.team.ask(method, [(rows[mine], *more) if len(mine) else None for mine in here])
        out = np.empty((len(rows), width), np.float32)
        for mine, values in zip(here, found, strict=True):
            if values is not None:
                out[mine] = values
        return out

    def nearest(self, centroids: np.ndarray, first: bool) -> np.ndarray:
        return np.concatenate(self._all("nearest", centroids, first))

    def pick(self, chunk: int, share: float) -> int:
        owner = int(self._owners(np.array([chunk * chunk_rows(self.dim)]))[0])
        asked = [(chunk, share) if worker == owner else None for worker in range(len(self.bounds))]
        return int(self.team.ask("pick", asked)[owner])

    def sample(self, factor: float, seed: tuple[int, ...]) -> np.ndarray:
        return np.concatenate(self._all("sample", factor, seed))

    def labels(self) -> np.ndarray:
        return np.concatenate(self._all("labels"))


def total(moments: Sequence[Moments]) -> Moments:
    """Moments of all workers' rows."""
    out = moments[0]
    for one in moments[1:]:
        out = out + one
    return out


def merge(found: Sequence[tuple[np.ndarray, np.ndarray]], count: int, apart: bool) -> np.ndarray:
    """`least` of several workers' least, each rows and their costs."""
    rows, costs = (np.concatenate([one[part] for one in found]) for part in (0, 1))
    return rows[least(rows, costs, count, apart)]
