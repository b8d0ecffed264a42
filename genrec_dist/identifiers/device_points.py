"""Points on a GPU: the passes of `LocalPoints`, on rows that the device keeps or is sent chunk by chunk.

Sums are exact here too, so atomic additions, whose order nobody knows, change nothing. Matrix products have float32's
precision: with TF32's ten bits a row near two centroids may go to the wrong one. Labels can differ from those of a CPU
where two centroids are equally near to the last bits. The inner passes are Triton's on a GPU and torch's elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from genrec_dist.identifiers.points import LocalPoints, Moments
from genrec_dist.identifiers.rows import Rows
from genrec_dist.training.worker import exact_products

BLOCK_BYTES = 256 << 20
"""Rows of a matrix product and their scores, about."""


class TorchPasses:
    """What a device does for a range of rows, in plain torch: the reference, and what runs where there is no GPU.

    Shapes:
        values: (n, dim) float32. squares, near: (n,) float32. labels, before, after: (n,) int32.
        errors: (any, K) float64, to be added up. sums: (K, dim) float64. counts: (K,) int64. changed: (m,) int64.
    """

    error_copies = 1
    score_bytes = 4
    """That a row and a centroid take in the device's memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def table(self, centroids: np.ndarray, prices: np.ndarray | None, largest: float) -> Any:
        """Centroids (K, dim) and prices (K,) as `nearest` wants them; `largest`: absolute value no row exceeds."""
        values = torch.from_numpy(np.ascontiguousarray(centroids)).to(self.device)
        price = torch.zeros(len(values), device=self.device)
        if prices is not None:
            price = torch.from_numpy(prices.astype(np.float32)).to(self.device)
        return values, price, (values.square().sum(1) + price) / 2

    def nearest(
        self,
        values: torch.Tensor,
        squares: torch.Tensor,
        table: Any,
        labels: torch.Tensor,
        near: torch.Tensor,
        errors: torch.Tensor,
        shift: float,
    ) -> None:
        """Write each row's cluster and squared distance, and add the distances, on the grid of `shift`, to `errors`."""
        centroids, price, half = table
        with exact_products():
            best, label = torch.addmm(half, values, centroids.T, alpha=-1).min(1)
        labels.copy_(label)
        near.copy_((2 * best + squares - price[label]).clamp_(min=0))
        errors[0].index_add_(0, label, on_grid(near, shift))

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
        """Take rows `changed` out of the sums and counts of their old cluster and into the new one's; `before` None:
        there is no old one."""
        moved, ones = on_grid(values[changed], shift), torch.ones_like(changed)
        new = after[changed].long()
        sums.index_add_(0, new, moved)
        counts.index_add_(0, new, ones)
        if before is not None:
            old = before[changed].long()
            sums.index_add_(0, old, -moved)
            counts.index_add_(0, old, -ones)


def on_grid(values: torch.Tensor, shift: float) -> torch.Tensor:
    """Values on a grid, float64; see `Grid.round`."""
    return (values.double() + shift) - shift


def passes_for(device: torch.device) -> TorchPasses:
    """Triton's passes on a GPU, torch's elsewhere."""
    if device.type != "cuda":
        return TorchPasses(device)
    from genrec_dist.identifiers.triton_passes import TritonPasses

    return TritonPasses(device)


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
        self.device, self._passes = device, passes_for(device)
        self._kept: torch.Tensor | None = None
        super().__init__(rows, threads, total, first_row)
        if 4 * self.num_rows * self.dim <= resident_bytes:
            self._kept = torch.empty(self.num_rows, self.dim, device=device)
            for start, stop in self._bounds(4 * self.dim):
                self._kept[start:stop] = self._sent(start, stop)
        self._device_squares = torch.from_numpy(self._squares).to(device)
        self._near = torch.zeros(self.num_rows, device=device)
        self._own = torch.full((self.num_rows,), -1, dtype=torch.int32, device=device)
        self._counts = np.zeros(0, np.int64)
        self._stale = False

    def _bounds(self, row_bytes: int) -> Iterator[tuple[int, int]]:
        """Ranges of whole chunks, about BLOCK_BYTES each; everything at once where a row needs nothing."""
        rows = self.chunk * max(1, BLOCK_BYTES // (row_bytes * self.chunk)) if row_bytes else max(1, self.num_rows)
        for start in range(0, self.num_rows, rows):
            yield start, min(start + rows, self.num_rows)

    def _ranges(self, score_bytes: int) -> Iterator[tuple[int, int]]:
        """What a pass takes at once, by what it needs for a row beside those that are kept."""
        return self._bounds(score_bytes + (4 * self.dim if self._kept is None else 0))

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
        num_clusters, passes = len(centroids), self._passes
        fresh = self._sums is None or len(self._sums) != num_clusters
        if fresh:
            self._sums = np.zeros((num_clusters, self.dim))
            self._counts = np.zeros(num_clusters, np.int64)
            self._own.fill_(-1)
        table = passes.table(centroids, prices, self.largest)
        sums = torch.zeros(num_clusters, self.dim, dtype=torch.float64, device=self.device)
        counts = torch.zeros(num_clusters, dtype=torch.int64, device=self.device)
        errors = torch.zeros(passes.error_copies, num_clusters, dtype=torch.float64, device=self.device)
        for start, stop in self._ranges(passes.score_bytes * num_clusters):
            values, squares, own = self._block(start, stop), self._device_squares[start:stop], self._own[start:stop]
            after = torch.empty_like(own)
            passes.nearest(values, squares, table, after, self._near[start:stop], errors, self.error_grid.shift)
            changed = (own != after).nonzero()[:, 0]
            passes.move(values, changed, None if fresh else own, after, sums, counts, self.grid.shift)
            own.copy_(after)
        self._sums += sums.cpu().numpy()
        self._counts += counts.cpu().numpy()
        self._errors = errors.sum(0).cpu().numpy()
        self._stale = True
        return Moments(self._counts.copy(), self._sums.copy(), self._errors.copy())

    def nearest(self, centroids: np.ndarray, first: bool) -> np.ndarray:
        table = torch.from_numpy(np.ascontiguousarray(centroids)).to(self.device)
        half = table.square().sum(1) / 2
        found = []
        with exact_products():
            for start, stop in self._ranges(4 * len(centroids)):
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
        self._counts = moments.counts.copy()
        local = torch.from_numpy(rows - self.first_row).to(self.device)
        self._own[local] = torch.from_numpy(np.array(clusters, np.int32)).to(self.device)
        self._near[local] = torch.from_numpy(np.array(distances, np.float32)).to(self.device)
        return moments
