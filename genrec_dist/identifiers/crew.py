"""Who builds a tree of codes when there is no cluster: threads of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genrec_dist.identifiers.points import LocalPoints, chunk_rows, one_thread_products
from genrec_dist.identifiers.rows import (
    ArrayRows,
    Rows,
    RowSource,
    TakenRows,
    descend,
    parts_by_cluster,
    rows_by_cluster,
    write_by_cluster,
)

if TYPE_CHECKING:
    from genrec_dist.identifiers.hierarchical import Job, Subtree

RESIDENT_BYTES = 4 << 30
GPU_SHARE = 0.7
"""Of the GPU's free memory, for rows that stay on it."""


def make_points(rows: Rows, threads: int, on_gpu: bool, total: int | None = None, first_row: int = 0) -> LocalPoints:
    """Points of rows in this process, on its GPU if so wanted."""
    if not on_gpu:
        return LocalPoints(rows, threads, total, first_row)
    import torch

    from genrec_dist.identifiers.device_points import DevicePoints

    free, _ = torch.cuda.mem_get_info()
    return DevicePoints(rows, torch.device("cuda"), int(GPU_SHARE * free), threads, total, first_row)


class LocalCrew:
    """Threads of this process.

    Args:
        threads: each of one core.
        resident_bytes: rows up to this size are read once and kept; larger ones are read again in every pass, and once
            they are clustered written to files, cluster by cluster.
        on_gpu: passes over all rows of a node on the GPU.
    """

    def __init__(self, threads: int = 1, resident_bytes: int = RESIDENT_BYTES, on_gpu: bool = False) -> None:
        self.on_gpu = on_gpu
        self.threads, self.resident_bytes = threads, resident_bytes
        self._kept: tuple[object, Rows] = (None, ArrayRows(np.empty((0, 1), np.float32)))

    @property
    def slots(self) -> int:
        return self.threads

    def size(self, source: Rows | RowSource) -> tuple[int, int]:
        rows = source.open() if isinstance(source, RowSource) else source
        return rows.num_rows, rows.dim

    def points(self, source: Rows | RowSource) -> LocalPoints:
        return make_points(self.open(source), self.threads, self.on_gpu)

    def open(self, source: Rows | RowSource) -> Rows:
        """Rows of a source, in memory if they fit; the last such are remembered."""
        if self._kept[0] is source:
            return self._kept[1]
        rows = source.open() if isinstance(source, RowSource) else source
        fits = 4 * rows.num_rows * rows.dim <= self.resident_bytes
        if isinstance(rows, ArrayRows) or not fits:
            return rows
        self._kept = (source, ArrayRows(rows.read(0, rows.num_rows)))
        return self._kept[1]

    def part(self, source: Rows | RowSource, labels: np.ndarray, num_clusters: int, folder: Path | None) -> list[Any]:
        if isinstance(source, TakenRows):  # of the rows that are in memory anyhow, not of the copy that was clustered
            rows, index = source.rows, source.index
        else:
            # A table may stay in memory while its clusters wait; parts of one that is too large for that may not.
            whole = folder is None or (isinstance(source, RowSource) and source.tables is not None)
            rows = self.open(source) if whole or not isinstance(source, RowSource) else source.open()
            index = np.arange(rows.num_rows)
        if not isinstance(source, RowSource) or isinstance(rows, ArrayRows) or folder is None:
            return [TakenRows(rows, index[part]) for part in rows_by_cluster(labels, num_clusters)]
        file = folder / "rows-0.f32"
        sizes = np.bincount(labels, minlength=num_clusters)
        if not file.exists():
            write_by_cluster(rows, labels, num_clusters, file, 8 * chunk_rows(rows.dim))
        return [RowSource(parts=parts, dim=rows.dim) for parts in parts_by_cluster([file], [sizes])]

    def descend(self, points: LocalPoints, labels: np.ndarray, codebook: np.ndarray) -> LocalPoints:
        """Points of what a level of codes leaves."""
        return make_points(descend(points.rows, labels, codebook), self.threads, self.on_gpu)

    def close(self) -> None:
        """Nothing to end."""

    def grow(self, jobs: list[Job], work: Callable[[Job, np.ndarray], Subtree]) -> Iterator[tuple[Job, Subtree]]:
        def run(job: Job) -> tuple[Job, Subtree]:
            rows = job.source.open() if isinstance(job.source, RowSource) else job.source
            return job, work(job, rows.read(0, rows.num_rows))

        with one_thread_products():
            if self.threads == 1 or len(jobs) < 2:
                yield from map(run, jobs)
                return
            left = list(jobs)[::-1]
            running: set[Future[tuple[Job, Subtree]]] = set()
            with ThreadPoolExecutor(self.threads) as pool:
                while left or running:
                    while left and len(running) < 2 * self.threads:
                        running.add(pool.submit(run, left.pop()))
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    while done:
                        yield done.pop().result()
