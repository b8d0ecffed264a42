"""Points on a GPU: the passes of `LocalPoints` by torch, on rows that the device keeps or is sent chunk by chunk.

Sums are exact here too, so atomic additions, whose order nobody knows, change nothing. Matrix products are full
float32: with TF32's ten bits a row near two centroids may go to the wrong one. Labels can differ from those of a CPU
where two centroids are equally near to the last bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from genrec_dist.identifiers.points import LocalPoints, Moments
from genrec_dist.identifiers.rows import Rows
from genrec_dist.training.worker import exact_products

BLOCK_BYTES = 256 << 20
"""Rows of a matrix product and their scores, about."""


class DevicePoints(LocalPoints):
    """Rows of this process, on a device.

    Args:
        rows, threads, total, first_row: as `LocalPoints`.
        device: where passes are made.
        resident_bytes: rows up to this size stay on the device.
    """

    def __init__(
        self,
        rows: Rows,
        device: torch.device,
        resident_bytes: int,
        threads: int = 1,
        total: int | None = None,
        first_row: int = 0,
    ) -> None:
        self.device = device
        self._kept: torch.Tensor | None = None
        super().__init__(rows, threads, total, first_row)
        if 4 * self.num_rows * self.dim <= resident_bytes:
            self._kept = torch.empty(self.num_rows, self.dim, device=device)
            for start, stop in self._bounds():
                self._kept[start:stop] = self._sent(start, stop)
        self._device_squares = torch.from_numpy(self._squares).to(device)
        self._near = torch.zeros(self.num_rows, device=device)
        self._own = torch.full((self.num_rows,), -1, dtype=torch.int32, device=device)
        self._stale = False

    def _bounds(self, width: int = 0) -> Iterator[tuple[int, int]]:
        """Ranges of whole chunks that a pass takes at once."""
        rows = self.chunk * max(1, BLOCK_BYTES // (4 * (self.dim + width) * self.chunk))
        for start in range(0, self.num_rows, rows):
            yield start, min(start + rows, self.num_rows)

    def _sent(self, start: int, stop: int) -> torch.Tensor:
        return torch.from_numpy(self.rows.read(start, stop)).to(self.device)

    def _block(self, start: int, stop: int) -> torch.Tensor:
        return self._sent(start, stop) if self._kept is None else self._kept[start:stop]

    def _fetch(self) -> None:
        """Labels and distances of the last pass, on the host."""
        if self._stale:
            self._labels[:] = self._own.cpu().numpy()
            self._distances[:] = self._near.cpu().numpy()
            self._stale = False

    def assign(self, centroids: np.ndarray, prices: np.ndarray | None = None) -> Moments:
        num_clusters = len(centroids)
        if self._sums is None or len(self._sums) != num_clusters:
            self._sums = np.zeros((num_clusters, self.dim))
            self._own.fill_(-1)
        table = torch.from_numpy(np.ascontiguousarray(centroids)).to(self.device)
        price = torch.zeros(num_clusters, device=self.device)
        if prices is not None:
            price = torch.from_numpy(prices.astype(np.float32)).to(self.device)
        half = (table.square().sum(1) + price) / 2
        sums = torch.zeros(num_clusters, self.dim, dtype=torch.float64, device=self.device)
        errors = torch.zeros(num_clusters, dtype=torch.float64, device=self.device)
        with exact_products():
            for start, stop in self._bounds(num_clusters):
                values = self._block(start, stop)
                best, label = torch.addmm(half, values, table.T, alpha=-1).min(1)
                near = 2 * best + self._device_squares[start:stop]
                near = (near - price[label] if prices is not None else near).clamp_(min=0)
                errors.index_add_(0, label, self._on(near, self.error_grid.shift))
                before, after = self._own[start:stop], label.int()
                changed = (before != after).nonzero()[:, 0]
                moved = self._on(values[changed], self.grid.shift)
                sums.index_add_(0, label[changed], moved)
                had = (before[changed] >= 0).nonzero()[:, 0]
                sums.index_add_(0, before[changed][had].long(), -moved[had])
                self._own[start:stop], self._near[start:stop] = after, near
        self._sums += sums.cpu().numpy()
        self._errors = errors.cpu().numpy()
        counts = torch.bincount(self._own, minlength=num_clusters).cpu().numpy()
        self._stale = True
        return Moments(counts, self._sums.copy(), self._errors.copy())

    @staticmethod
    def _on(values: torch.Tensor, shift: float) -> torch.Tensor:
        """Values on a grid, float64; see `Grid.round`."""
        return (values.double() + shift) - shift

    def nearest(self, centroids: np.ndarray, first: bool) -> np.ndarray:
        table = torch.from_numpy(np.ascontiguousarray(centroids)).to(self.device)
        half = table.square().sum(1) / 2
        found = []
        with exact_products():
            for start, stop in self._bounds(len(centroids)):
                best = torch.addmm(half, self._block(start, stop), table.T, alpha=-1).min(1).values
                near = (2 * best + self._device_squares[start:stop]).clamp_(min=0)
                self._near[start:stop] = near if first else torch.minimum(near, self._near[start:stop])
                chunks = self._near[start:stop].double().split(self.chunk)
                found += [chunk.sum() for chunk in chunks]
        self._sums, self._stale = None, True
        return torch.stack(found).cpu().numpy() if found else np.empty(0)

    # What few rows take part in is done on the host, as `LocalPoints` does it.

    def labels(self) -> np.ndarray:
        self._fetch()
        return self._labels

    def farthest_with_distances(self, wanted: dict[int, int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        self._fetch()
        return super().farthest_with_distances(wanted)

    def leavers_with_regret(
        self, centroids: np.ndarray, prices: np.ndarray, wanted: dict[int, int], room: np.ndarray
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        self._fetch()
        return super().leavers_with_regret(centroids, prices, wanted, room)

    def pick(self, chunk: int, share: float) -> int:
        self._fetch()
        return super().pick(chunk, share)

    def sample(self, factor: float, seed: tuple[int, ...]) -> np.ndarray:
        self._fetch()
        return super().sample(factor, seed)

    def move(self, rows: np.ndarray, clusters: np.ndarray, distances: np.ndarray) -> Moments:
        self._fetch()
        moments = super().move(rows, clusters, distances)
        local = torch.from_numpy(rows - self.first_row).to(self.device)
        self._own[local] = torch.from_numpy(np.array(clusters, np.int32)).to(self.device)
        self._near[local] = torch.from_numpy(np.array(distances, np.float32)).to(self.device)
        return moments
