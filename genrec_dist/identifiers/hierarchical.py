"""Hierarchical k-means: one code sequence an item, unique by construction.

Every cluster is split into K children until each leaf is one item; a cluster of at most K items gives each item its own
leaf. Nodes whose rows are too many for one task are split by the whole crew, one after the other; what is below them
are subtrees that know nothing of each other and run as tasks, the largest first. Each node is seeded by its path and
k-means does not depend on who computes it, so neither crew nor order nor an interruption decides anything.

Source: PRORec section 3.3 (Unified Codes), after EAGER and RecForest.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from genrec_dist.artifacts.files import write_atomic
from genrec_dist.identifiers.crew import LocalCrew
from genrec_dist.identifiers.kmeans import PLAIN, KMeansOptions, KMeansResult, KMeansState, kmeans
from genrec_dist.identifiers.points import LocalPoints, Points
from genrec_dist.identifiers.rows import ArrayRows, rows_by_cluster

TASK_BYTES = 256 << 20
"""Rows of a subtree that one task takes, at most."""
SMALL_TASK, TASKS_A_SLOT = 4 << 20, 2
"""Where several tasks run at once, they are made smaller, down to SMALL_TASK, so that each slot gets several."""
Path_ = tuple[int, ...]


@dataclass(frozen=True)
class TreeOptions:
    """How to split.

    Args:
        num_clusters: K, children of a node at most.
        seed: the same seed gives the same codes.
        kmeans: of every node.
        task_bytes: rows of a task, at most; decides who computes, never what.
    """

    num_clusters: int
    seed: int = 0
    kmeans: KMeansOptions = PLAIN
    task_bytes: int = TASK_BYTES


@dataclass(frozen=True)
class StoredRows:
    """Rows of a .npy file, read when they are used; holds no file open."""

    file: Path
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = np.load(self.file, mmap_mode="r" if len(self) else None)
        return np.array(whole[self.start : self.stop], dtype)


@dataclass
class Split:
    """A node that k-means split.

    Args:
        path: codes that lead to it.
        item: one of its rows, in the numbering of whoever made this.
        log: rows, objective, imbalance and splits by iteration.

    Shapes:
        codes: (m,) int32, children of two rows or more. centroids: (m, dim) float32, theirs.
    """

    path: Path_
    item: int
    codes: np.ndarray
    centroids: np.ndarray | StoredRows
    log: dict[str, Any]


@dataclass
class Subtree:
    """Codes below a node, and the splits that made them.

    Shapes:
        codes: (n, depth) int32, -1 past an item's depth. depth: (n,) int32.
    """

    codes: np.ndarray
    depth: np.ndarray
    splits: list[Split] = field(default_factory=list)

    def save(self, file: Path) -> None:
        """Write a safetensors file, after a .npy file of centroids beside it; each whole or not at all."""
        dim = np.asarray(self.splits[0].centroids).shape[1] if self.splits else 0
        arrays = {
            "codes": self.codes,
            "depth": self.depth,
            "items": np.array([split.item for split in self.splits], np.int64),
            "sizes": np.array([len(split.codes) for split in self.splits], np.int64),
            "split_codes": np.concatenate([np.empty(0, np.int32), *(split.codes for split in self.splits)]),
        }
        about = json.dumps([{"path": split.path, "log": split.log} for split in self.splits])
        arrays["about"] = np.frombuffer(about.encode(), np.uint8)  # a header must not be longer than 100 MB
        buffer = io.BytesIO()
        none = np.empty((0, dim), np.float32)
        np.save(
            buffer, np.concatenate([none, *(np.asarray(split.centroids) for split in self.splits)]), allow_pickle=False
        )
        write_atomic(file.with_suffix(".npy"), buffer.getvalue())
        write_atomic(file, save(arrays))

    @classmethod
    def load(cls, file: Path) -> Subtree | None:
        """What `save` wrote, centroids still on disk; None when there is none that can be read."""
        try:
            with safe_open(file, "np") as found:
                arrays = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118 - not a mapping
            about = json.loads(arrays["about"].tobytes())
            stops = np.cumsum(arrays["sizes"])
            rows = file.with_suffix(".npy")
            complete = len(np.load(rows, mmap_mode="r" if arrays["sizes"].any() else None)) == arrays["sizes"].sum()
        except (FileNotFoundError, SafetensorError, ValueError):
            return None
        if not complete:
            return None
        splits = [
            Split(
                tuple(one["path"]),
                int(item),
                arrays["split_codes"][start:stop],
                StoredRows(rows, int(start), int(stop)),
                one["log"],
            )
            for one, item, start, stop in zip(about, arrays["items"], stops - arrays["sizes"], stops, strict=True)
        ]
        return cls(arrays["codes"], arrays["depth"], splits)


@dataclass(frozen=True)
class Job:
    """One subtree to grow."""

    path: Path_
    source: Any
    num_rows: int
    seed: int
    options: TreeOptions


class Crew(Protocol):
    """Who computes: this process, or workers of a cluster. A source is what the crew itself understands."""

    def size(self, source: Any) -> tuple[int, int]:
        """Rows of a source, and their width."""
        ...

    def points(self, source: Any) -> Points:
        """Rows of a node that all of the crew split."""
        ...

    def part(self, source: Any, labels: np.ndarray, num_clusters: int, folder: Path | None) -> list[Any]:
        """Sources of the clusters' rows; what is written goes into `folder`."""
        ...

    def descend(self, points: Any, labels: np.ndarray, codebook: np.ndarray) -> Points:
        """Points of what a level of codes leaves."""
        ...

    @property
    def slots(self) -> int:
        """Tasks that run at once."""
        ...

    def grow(self, jobs: list[Job], work: Callable[[Job, np.ndarray], Subtree]) -> Iterator[tuple[Job, Subtree]]:
        """Subtrees, as they are done."""
        ...

    def close(self) -> None:
        """End the workers."""
        ...


def hierarchical_codes(
    embeddings: np.ndarray,
    num_clusters: int,
    *,
    seed: int = 0,
    options: KMeansOptions = PLAIN,
    on_split: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Codes of all items of an array.

    Args:
        embeddings: item embeddings.
        num_clusters: K, children of a node at most.
        seed: the same seed gives the same codes.
        options: of k-means.
        on_split: called with the number of items settled so far.

    Shapes:
        embeddings: (num_items, dim) float32.
        returns: codes (num_items, max_depth) int32, -1 past an item's depth; depth (num_items,) int32.
    """
    tree = build_tree(ArrayRows(embeddings), TreeOptions(num_clusters, seed, options), on_split=on_split)
    return tree.codes, tree.depth


def build_tree(
    source: Any,
    options: TreeOptions,
    crew: Crew | None = None,
    scratch: Path | None = None,
    on_split: Callable[[int], None] | None = None,
    on_iteration: Callable[[Path_, KMeansState], None] | None = None,
) -> Subtree:
    """Split all rows down to single items.

    Args:
        source: rows, as the crew understands them.
        options: how.
        crew: who computes; default: this process, in one thread.
        scratch: folder for what a killed build goes on from; None keeps nothing.
        on_split: called with the number of items settled so far.
        on_iteration: called after each iteration of a node that the whole crew splits.
    """
    crew = crew or LocalCrew()
    num_rows, dim = crew.size(source)
    tree = _Codes(num_rows)
    task_bytes = options.task_bytes
    if crew.slots > 1:
        task_bytes = min(task_bytes, max(SMALL_TASK, 4 * num_rows * dim // (TASKS_A_SLOT * crew.slots)))
    splits: list[Split] = []
    jobs: list[tuple[Job, np.ndarray]] = []
    large: list[tuple[Path_, Any, np.ndarray, int]] = [((), source, np.arange(num_rows), options.seed)]
    settled = 0
    while large:
        path, here, items, seed = large.pop()
        if len(items) <= options.num_clusters or 4 * len(items) * dim <= task_bytes:
            jobs.append((Job(path, here, len(items), seed, options), items))
            continue
        labels, split = _split_by_crew(crew, here, path, seed, options, scratch, on_iteration)
        splits.append(replace(split, path=path, item=int(items[0])))
        tree.set(items, len(path), labels)
        folder = None if scratch is None else scratch / f"rows{_name(path)}"
        sources = crew.part(here, labels, options.num_clusters, folder)
        members = rows_by_cluster(labels, options.num_clusters)
        for cluster, (rows, below) in enumerate(zip(members, sources, strict=True)):
            if len(rows) == 1:
                settled += 1
            elif len(rows):
                large.append(((*path, cluster), below, items[rows], child_seed(seed, cluster)))
    for job, subtree, items in _grown(jobs, crew, scratch):
        tree.graft(items, len(job.path), subtree)
        splits += [replace(s, path=job.path + s.path, item=int(items[s.item])) for s in subtree.splits]
        settled += len(items)
        if on_split is not None:
            on_split(settled)
    codes, depth = tree.finish()
    return Subtree(codes, depth, sorted(splits, key=lambda split: (len(split.path), split.path)))


def _split_by_crew(
    crew: Crew,
    source: Any,
    path: Path_,
    seed: int,
    options: TreeOptions,
    scratch: Path | None,
    on_iteration: Callable[[Path_, KMeansState], None] | None,
) -> tuple[np.ndarray, Split]:
    """One k-means over rows that only the crew can hold, from where it was left."""
    done = None if scratch is None else scratch / f"split{_name(path)}.safetensors"
    if done is not None and (kept := Subtree.load(done)) is not None:
        return kept.codes[:, 0], kept.splits[0]
    file = None if scratch is None else scratch / f"iteration{_name(path)}.safetensors"
    points = crew.points(source)
    note = None if on_iteration is None else partial(on_iteration, path)
    found = resumed_kmeans(points, options.num_clusters, options.kmeans, seed, file, note)
    split = _split(path, 0, found, points.num_rows)
    if done is not None:
        Subtree(found.labels[:, None], np.ones(len(found.labels), np.int32), [split]).save(done)
    return found.labels, split


def _grown(
    jobs: list[tuple[Job, np.ndarray]], crew: Crew, scratch: Path | None
) -> Iterator[tuple[Job, Subtree, np.ndarray]]:
    """Subtrees of all jobs: those that an earlier try left, then the others, the largest first."""
    items = {job.path: rows for job, rows in jobs}
    waiting = []
    for job, rows in jobs:
        kept = None if scratch is None else Subtree.load(scratch / f"subtree{_name(job.path)}.safetensors")
        if kept is not None:
            yield job, kept, rows
        else:
            waiting.append(job)
    waiting.sort(key=lambda job: (-job.num_rows, job.path))
    for job, subtree in crew.grow(waiting, grow):
        if scratch is not None and job.path:
            file = scratch / f"subtree{_name(job.path)}.safetensors"
            subtree.save(file)
            subtree = Subtree.load(file) or subtree  # centroids stay on disk
        yield job, subtree, items[job.path]


def grow(job: Job, rows: np.ndarray) -> Subtree:
    """The subtree of a job, in this process and thread.

    Shapes:
        rows: (n, dim) float32.
    """
    k, options = job.options.num_clusters, job.options.kmeans
    tree, splits = _Codes(len(rows)), []
    pending: list[tuple[np.ndarray, int, Path_]] = [(np.arange(len(rows)), job.seed, ())]
    while pending:
        items, seed, path = pending.pop()
        if len(items) <= k:
            tree.set(items, len(path), np.arange(len(items), dtype=np.int32))
            continue
        points = rows[items] if len(items) < len(rows) else rows
        found = kmeans(LocalPoints(ArrayRows(points)), k, options, seed=seed)
        splits.append(_split(path, int(items[0]), found, len(items)))
        tree.set(items, len(path), found.labels)
        for cluster, members in enumerate(rows_by_cluster(found.labels, k)):
            if len(members) > 1:  # one that lists its items draws nothing
                below = child_seed(seed, cluster) if len(members) > k else 0
                pending.append((items[members], below, (*path, cluster)))
    codes, depth = tree.finish()
    return Subtree(codes, depth, splits)


def _split(path: Path_, item: int, found: KMeansResult, num_rows: int) -> Split:
    shared = np.flatnonzero(found.sizes > 1)  # a child of one row is a leaf: nothing will be put below it
    return Split(path, item, shared.astype(np.int32), found.centroids[shared], kmeans_log(found, num_rows))


def kmeans_log(found: KMeansResult, num_rows: int) -> dict[str, Any]:
    """What is kept of a k-means' course, JSON-ready."""
    return {
        "rows": num_rows,
        "objective": found.objective,
        "imbalance": found.imbalance,
        "splits": found.splits,
    }


class _Codes:
    """Codes of items as they become known, level by level."""

    def __init__(self, num_items: int) -> None:
        self.codes = np.full((num_items, 1), -1, np.int32)

    def set(self, items: np.ndarray, level: int, values: np.ndarray) -> None:
        self._deepen(level + 1)
        self.codes[items, level] = values

    def graft(self, items: np.ndarray, level: int, subtree: Subtree) -> None:
        """Codes of a subtree below `level` codes that the items have."""
        width = subtree.codes.shape[1]
        self._deepen(level + width)
        self.codes[items, level : level + width] = subtree.codes

    def _deepen(self, levels: int) -> None:
        if levels > self.codes.shape[1]:
            more = np.full((len(self.codes), levels - self.codes.shape[1]), -1, np.int32)
            self.codes = np.concatenate([self.codes, more], 1)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        depth = (self.codes >= 0).sum(1, dtype=np.int32)
        return np.ascontiguousarray(self.codes[:, : int(depth.max(initial=0))]), depth


def child_seed(seed: int, cluster: int) -> int:
    """Seed of a child: a function of its path."""
    return int(np.random.SeedSequence([seed, cluster]).generate_state(1, np.uint32)[0])


def _name(path: Path_) -> str:
    return "".join(f"-{code}" for code in path)


def resumed_kmeans(
    points: Points,
    k: int,
    options: KMeansOptions,
    seed: int,
    file: Path | None,
    on_iteration: Callable[[KMeansState], None] | None,
) -> KMeansResult:
    """`kmeans` that goes on from what an interrupted one left in `file`, and leaves there what it comes to."""

    def keep(state: KMeansState) -> None:
        if file is not None:
            save_state(state, file)
        if on_iteration is not None:
            on_iteration(state)

    state = None if file is None else load_state(file)
    return kmeans(points, k, options, seed=seed, state=state, on_iteration=keep)


STATE_LISTS = ("start", "objective", "imbalance", "splits")


def save_state(state: KMeansState, file: Path) -> None:
    """Write what an interrupted k-means goes on from, whole or not at all."""
    parts = {"now": state} | ({"best": state.best} if state.best else {})
    arrays = {part: one.centroids for part, one in parts.items()}
    about = {part: json.dumps({name: getattr(one, name) for name in STATE_LISTS}) for part, one in parts.items()}
    write_atomic(file, save(arrays, about))


def load_state(file: Path) -> KMeansState | None:
    """What `save_state` wrote; None when there is none that can be read."""
    try:
        with safe_open(file, "np") as found:
            parts = {
                part: KMeansState(found.get_tensor(part), **json.loads(about))
                for part, about in found.metadata().items()
            }
    except (FileNotFoundError, SafetensorError):
        return None
    parts["now"].best = parts.get("best")
    return parts["now"]
