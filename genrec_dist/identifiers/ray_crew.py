"""Who builds a tree of codes on a Ray cluster: actors that each hold a range of rows, and grow subtrees afterwards.

A lost actor is started again, opens its range, is told what has been said since the last assignment began, and answers
the question that it owed: an iteration at most is computed twice. Sums are exact, so nothing depends on it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from genrec_dist.cluster import ensure_ray, gpus_per_worker, worker_threads
from genrec_dist.errors import ClusterError
from genrec_dist.identifiers.crew import make_points
from genrec_dist.identifiers.points import LocalPoints, chunk_rows, one_thread_products
from genrec_dist.identifiers.pooled import PooledPoints, ranges
from genrec_dist.identifiers.rows import (
    ArrayRows,
    RangeRows,
    Rows,
    RowSource,
    descend,
    parts_by_cluster,
    write_by_cluster,
)
from genrec_dist.pipeline import StageContext

if TYPE_CHECKING:
    from genrec_dist.identifiers.hierarchical import Job, Subtree

Call = tuple[str, tuple]
CHANGES = ("assign", "nearest", "move")
PLACE_SECONDS = 30.0
"""A new actor waits so long for cores of its own; then it shares those of others."""


class RangeWorker:
    """One actor's work: its range of a node's rows, and subtrees.

    Args:
        threads: of one core each.
        resident_bytes: rows up to this size are kept in memory.
        on_gpu: passes over the range on the GPU that Ray gave.
    """

    def __init__(self, threads: int, resident_bytes: int, on_gpu: bool) -> None:
        self.threads, self.resident_bytes, self.on_gpu = threads, resident_bytes, on_gpu
        self.points: LocalPoints | None = None

    def ready(self) -> int:
        return os.getpid()

    def open(self, source: RowSource, start: int, stop: int, total: int) -> float:
        """Take a range; returns its largest absolute value."""
        self.points = None  # its rows go before others come
        rows: Rows = RangeRows(source.open(), start, stop)
        if 4 * (stop - start) * rows.dim <= self.resident_bytes:
            rows = ArrayRows(rows.read(0, stop - start))
        self.points = make_points(rows, self.threads, self.on_gpu, total, start)
        return self.points.largest

    def call(self, method: str, *arguments: Any) -> Any:
        """Ask this worker's points."""
        return getattr(self.points, method)(*arguments)

    def descend(self, labels: np.ndarray, codebook: np.ndarray) -> float:
        """Go on with what a level of codes leaves of the rows; returns the largest absolute value."""
        assert self.points is not None
        rows, total, first = self.points.rows, self.points.total, self.points.first_row
        self.points = make_points(descend(rows, labels, codebook), self.threads, self.on_gpu, total, first)
        return self.points.largest

    def write(self, file: str, labels: np.ndarray, num_clusters: int) -> None:
        """Write the range's rows by cluster."""
        assert self.points is not None
        rows = self.points.rows
        write_by_cluster(rows, labels, num_clusters, Path(file), 8 * chunk_rows(rows.dim))

    def grow(self, job: Job, work: Callable[[Job, np.ndarray], Subtree]) -> Subtree:
        """One subtree."""
        self.points = None
        rows = job.source.open()
        with one_thread_products():
            return work(job, rows.read(0, rows.num_rows))


class RayCrew:
    """Actors of a Ray cluster, `runtime.num_workers` of them.

    Args:
        context: runtime settings and events.
        resident_bytes: rows that each keeps in memory.

    Raises:
        ClusterError: Ray does not answer, or actors are lost more often than `runtime.max_preemptions` allows.
    """

    def __init__(self, context: StageContext, resident_bytes: int) -> None:
        self.context, self.resident_bytes = context, resident_bytes
        self.ray = ensure_ray(context.runtime)
        self.threads = worker_threads(context.runtime)
        errors = self.ray.exceptions
        self.losses = (
            errors.RayActorError,
            errors.ObjectLostError,
            errors.OutOfMemoryError,
            errors.ActorUnschedulableError,
        )
        self.gpus = gpus_per_worker(context.runtime, self.ray)
        self.lost = 0
        self.actor_type = self.ray.remote(RangeWorker)
        share = self.ray.cluster_resources().get("CPU", 0) / context.runtime.num_workers
        self.cores = min(self.threads, int(share) if share >= 1 else share)
        self.actors = self._placed(context.runtime.num_workers)
        self.bounds: list[tuple[int, int]] = []
        self.source: RowSource | None = None
        self.base: list[list[Call]] = [[] for _ in self.actors]
        self.since: list[list[Call]] = [[] for _ in self.actors]

    def _start(self, cores: float) -> Any:
        kind = self.actor_type.options(num_cpus=cores, num_gpus=self.gpus, max_concurrency=self.threads + 1)
        return kind.remote(self.threads, self.resident_bytes, bool(self.gpus))

    def close(self) -> None:
        """End the actors."""
        for actor in self.actors:
            self.ray.kill(actor)
        self.actors = []

    # The rows of a node

    @property
    def slots(self) -> int:
        return len(self.actors) * self.threads

    def size(self, source: RowSource) -> tuple[int, int]:
        rows = source.open()
        return rows.num_rows, rows.dim

    def points(self, source: RowSource) -> PooledPoints:
        num_rows, dim = self.size(source)
        self.source, self.bounds = source, ranges(num_rows, dim, len(self.actors))
        self.base, self.since = [[] for _ in self.actors], [[] for _ in self.actors]
        self._settle([("open", (source, start, stop, num_rows)) for start, stop in self.bounds])
        return PooledPoints(self, self.bounds, dim)

    def descend(self, points: PooledPoints, labels: np.ndarray, codebook: np.ndarray) -> PooledPoints:
        """Points of what a level of codes leaves."""
        self.since = [[] for _ in self.actors]
        shared = self.ray.put(codebook)
        self._settle([("descend", (labels[start:stop], shared)) for start, stop in self.bounds])
        return PooledPoints(self, self.bounds, points.dim)

    def _settle(self, calls: Sequence[Call]) -> None:
        """Make calls that give workers their rows, and tell all of them the largest value."""
        largest = max(self._gather(calls))
        for base, call in zip(self.base, calls, strict=True):
            base.append(call)  # before anything else is asked: whoever takes a lost worker's place has to know
        told: Call = ("call", ("set_largest", largest))
        self._gather([told] * len(calls))
        for base in self.base:
            base.append(told)

    def ask(self, method: str, arguments: Sequence[tuple | None]) -> list[Any]:
        """Call a method of every worker's points; see `Team`."""
        first = arguments[0]
        if first is not None and all(one is first for one in arguments):  # one copy of large arguments for everybody
            shared = tuple(self.ray.put(x) if isinstance(x, np.ndarray) else x for x in first)
            arguments = [shared] * len(arguments)
        calls: list[Call | None] = [None if given is None else ("call", (method, *given)) for given in arguments]
        if method == "assign" or (method == "nearest" and (arguments[0] or (0, False))[1]):
            self.since = [[] for _ in self.actors]  # what was before does not count any more
        answers = self._gather(calls)
        if method in CHANGES:
            for since, call in zip(self.since, calls, strict=True):
                since += [] if call is None else [call]
        return answers

    def _send(self, worker: int, call: Call) -> Any:
        return getattr(self.actors[worker], call[0]).remote(*call[1])

    def _gather(self, calls: Sequence[Call | None]) -> list[Any]:
        """Answers of all workers; those of lost ones from actors that take their places."""
        waiting = [None if call is None else self._send(worker, call) for worker, call in enumerate(calls)]
        return [
            None if call is None else self._answer(worker, call, waiting[worker]) for worker, call in enumerate(calls)
        ]

    def _answer(self, worker: int, call: Call, waiting: Any) -> Any:
        while True:
            try:
                return self._get(waiting)
            except self.losses as error:
                self._replace(worker, error)
                waiting = self._send(worker, call)

    def _get(self, waiting: Any) -> Any:
        try:
            return self.ray.get(waiting)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None

    def _replace(self, worker: int, error: Exception) -> None:
        """A new actor in the place of a lost one, told what that had been told; tried until one lives so long."""
        while True:
            self.lost += 1
            if self.lost > self.context.runtime.max_preemptions:
                raise ClusterError(
                    "workers of k-means were lost more often than allowed",
                    where="runtime.max_preemptions",
                    got=f"{self.lost} losses, the last: {str(error).splitlines()[0]}",
                    expected=f"at most {self.context.runtime.max_preemptions}",
                    fix="see the cluster's logs; the same command goes on from the last iteration",
                ) from error
            self.context.event("kmeans_worker_lost", worker=worker, lost=self.lost)
            self.ray.kill(self.actors[worker])  # one whose answer was lost may live
            (self.actors[worker],) = self._placed(1)
            try:
                for call in (*self.base[worker], *self.since[worker]):
                    self._get(self._send(worker, call))
                return
            except self.losses as again:
                error = again

    def _placed(self, count: int) -> list[Any]:
        """New actors, with cores of their own if these are free in time."""
        actors = [self._start(self.cores) for _ in range(count)]
        signs = [actor.ready.remote() for actor in actors]
        ready, _ = self.ray.wait(signs, num_returns=count, timeout=PLACE_SECONDS)
        for place, sign in enumerate(signs):
            if sign not in ready:
                self.ray.kill(actors[place])
                actors[place] = self._start(0)
                if not self.ray.wait([actors[place].ready.remote()], timeout=4 * PLACE_SECONDS)[0]:
                    raise ClusterError(
                        "no room for a worker of k-means",
                        where="runtime.num_workers",
                        got=f"{self.ray.available_resources()} free",
                        expected=f"{self.context.runtime.num_workers} workers, with {self.gpus} GPUs each",
                        fix="lower runtime.num_workers or add nodes; the same command goes on from the last iteration",
                    )
        return actors

    # Subtrees

    def part(self, source: RowSource, labels: np.ndarray, num_clusters: int, folder: Path | None) -> list[RowSource]:
        if folder is None:
            raise ValueError("rows of clusters go through files: a folder is needed")
        if self.source is not source:  # an earlier try split this node
            self.points(source)
        files = [folder / f"rows-{start}-{stop}.f32" for start, stop in self.bounds]
        parts = [labels[start:stop] for start, stop in self.bounds]
        self._gather(
            [
                None if file.exists() or not len(part) else ("write", (str(file), part, num_clusters))
                for file, part in zip(files, parts, strict=True)
            ]
        )
        sizes = [np.bincount(part, minlength=num_clusters) for part in parts]
        _, dim = self.size(source)
        return [RowSource(parts=one, dim=dim) for one in parts_by_cluster(files, sizes)]

    def grow(self, jobs: list[Job], work: Callable[[Job, np.ndarray], Subtree]) -> Iterator[tuple[Job, Subtree]]:
        self.source, self.base, self.since = None, [[] for _ in self.actors], [[] for _ in self.actors]
        left = list(jobs)[::-1]
        running: dict[Any, tuple[int, Job, Any]] = {}
        free = [worker for worker in range(len(self.actors)) for _ in range(self.threads)]
        while left or running:
            while left and free:
                worker, job = free.pop(), left.pop()
                running[self.actors[worker].grow.remote(job, work)] = (worker, job, self.actors[worker])
            (done,), _ = self.ray.wait(list(running), num_returns=1)
            worker, job, actor = running.pop(done)
            free.append(worker)
            try:
                subtree = self._get(done)
            except self.losses as error:
                left.append(job)
                if actor is self.actors[worker]:  # the first of its tasks to be missed
                    self._replace(worker, error)
            else:
                yield job, subtree
