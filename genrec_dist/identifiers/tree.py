"""What is kept of a tree's splits, and codes for items that came later: no old code changes.

A new item goes down to the nearest child that still has room below it, and gets the next free code of a node that lists
its items. Nothing is trained, nothing is moved.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from genrec_dist.artifacts.embeddings import space_checked
from genrec_dist.artifacts.files import write_atomic
from genrec_dist.errors import ArtifactError, DataError
from genrec_dist.identifiers.hierarchical import Split
from genrec_dist.identifiers.kmeans import deferred_acceptance
from genrec_dist.identifiers.points import distances_of
from genrec_dist.identifiers.rows import rows_by_cluster, unit
from genrec_dist.identifiers.trie import Trie

FILE, CENTROIDS = "splits.safetensors", "centroids.npy"


@dataclass(frozen=True)
class Splits:
    """Centroids of the nodes that k-means split: of their children that have two items or more.

    Args:
        num_clusters: K, codes of a level.
        metric: 'euclidean' or 'cosine'.

    Shapes:
        item: (m,) int64, an item below each node; level: (m,) int32, codes that lead to it.
        begin: (m + 1,) int64, first centroid of each node.
        code: (n,) int32, children; centroids: (n, dim) float32, theirs, mapped into memory.
    """

    num_clusters: int
    metric: str
    item: np.ndarray
    level: np.ndarray
    begin: np.ndarray
    code: np.ndarray
    centroids: np.ndarray

    @staticmethod
    def write(folder: Path, splits: Sequence[Split], num_clusters: int, metric: str, dim: int) -> Splits:
        """Write centroids.npy and splits.safetensors from what the building of a tree noted; returns them mapped."""
        begin = np.concatenate([[0], np.cumsum([len(split.codes) for split in splits], dtype=np.int64)])
        temporary = folder / f".{CENTROIDS}.tmp"
        layout = {"descr": "<f4", "fortran_order": False, "shape": (int(begin[-1]), dim)}
        try:
            with space_checked(temporary), open(temporary, "wb") as handle:
                np.lib.format.write_array_header_1_0(handle, layout)
                for split in splits:
                    handle.write(np.ascontiguousarray(split.centroids, "<f4").data)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, folder / CENTROIDS)
        finally:
            temporary.unlink(missing_ok=True)
        arrays = {
            "item": np.array([split.item for split in splits], np.int64),
            "level": np.array([len(split.path) for split in splits], np.int32),
            "begin": begin,
            "code": np.concatenate([np.empty(0, np.int32), *(split.codes for split in splits)]),
        }
        about = json.dumps({"num_clusters": num_clusters, "metric": metric})
        write_atomic(folder / FILE, save(arrays, {"about": about}))  # one entry: the order of several is not fixed
        return Splits.load(folder)

    @classmethod
    def load(cls, folder: Path) -> Splits:
        """Read what `write` wrote.

        Raises:
            ArtifactError: there is none, or it cannot be read.
        """
        try:
            with safe_open(folder / FILE, "np") as found:
                arrays = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118 - not a mapping
                about = json.loads(found.metadata()["about"])
            centroids = np.load(folder / CENTROIDS, mmap_mode="r" if len(arrays["code"]) else None)
        except (FileNotFoundError, SafetensorError, ValueError) as error:
            raise ArtifactError(
                "no splits of a tree of codes",
                where=folder / FILE,
                got=f"{type(error).__name__}: {error}",
                expected="identifiers made by hierarchical_kmeans",
                fix="build the identifiers again, or name another folder",
            ) from None
        return cls(about["num_clusters"], about["metric"], **arrays, centroids=centroids)

    def nodes(self, trie: Trie) -> np.ndarray:
        """Trie node of each split, (m,) int64."""
        paths = trie.item_path[self.item, np.maximum(self.level - 1, 0)]
        return np.where(self.level > 0, paths, 0).astype(np.int64)


@dataclass(frozen=True)
class Extended:
    """Codes of old and new items.

    Shapes:
        codes: (old + new, max_depth) int32; the old ones first, as they were. depth: (old + new,) int32.
        report: counts, JSON-ready.
    """

    codes: np.ndarray
    depth: np.ndarray
    report: dict


def extend_codes(splits: Splits, trie: Trie, rows: np.ndarray) -> Extended:
    """Codes for new items below an existing tree.

    Args:
        splits: centroids of the tree.
        trie: its codes.
        rows: embeddings of the new items, by the model that made the old ones.

    Shapes:
        rows: (n, dim) float32.

    Raises:
        DataError: rows of another width, not finite, or more than there are free codes.
    """
    old = trie.num_items
    free = _free_below(splits, trie)
    if rows.ndim != 2 or rows.shape[1] != splits.centroids.shape[1]:
        raise DataError(
            "new items' embeddings have another width",
            got=rows.shape,
            expected=f"(n, {splits.centroids.shape[1]})",
            fix="embed them by the model and the settings of the old ones",
        )
    if not np.isfinite(rows).all():
        wrong = np.flatnonzero(~np.isfinite(rows).all(1))
        raise DataError(
            "new items' embeddings are not finite",
            got=f"{len(wrong)} rows, the first is {wrong[0]}",
            fix="leave these items out, or embed them again",
        )
    if len(rows) > free[0]:
        raise DataError(
            "more new items than free codes",
            got=f"{len(rows)} items",
            expected=f"at most {int(free[0])}",
            fix="build the identifiers of the whole catalog anew",
        )
    rows = unit(rows) if splits.metric == "cosine" else rows
    codes = np.full((old + len(rows), trie.max_depth), -1, np.int32)
    codes[:old] = trie.codes
    split_of = np.full(trie.num_nodes, -1, np.int64)
    split_of[splits.nodes(trie)] = np.arange(len(splits.item))
    pending = [(0, np.arange(len(rows)), 0)] if len(rows) else []
    off_path = np.zeros(len(rows), bool)
    while pending:
        node, items, level = pending.pop()
        first, count = int(trie.first_child[node]), int(trie.num_children[node])
        here = int(split_of[node])
        if here < 0:  # lists its items: codes that no child has
            used = trie.code[first : first + count]
            codes[old + items, level] = np.setdiff1d(np.arange(splits.num_clusters), used)[: len(items)]
            continue
        code = splits.code[splits.begin[here] : splits.begin[here + 1]]
        child = first + np.searchsorted(trie.code[first : first + count], code)
        room = np.minimum(free[child], len(items))
        cost = distances_of(rows.__getitem__, items, splits.centroids[splits.begin[here] : splits.begin[here + 1]])
        nearest = cost.argmin(1)
        fits = (np.bincount(nearest, minlength=len(child)) <= room).all()
        chosen = nearest if fits else deferred_acceptance(cost, room)
        off_path[items] |= chosen != nearest
        codes[old + items, level] = code[chosen]
        for node, below in zip(child.tolist(), rows_by_cluster(chosen, len(child)), strict=True):
            if len(below):
                pending.append((node, items[below], level + 1))
    depth = np.concatenate([trie.depth.astype(np.int32), (codes[old:] >= 0).sum(1, dtype=np.int32)])
    report = {
        "old_items": old,
        "new_items": len(rows),
        "changed": int((codes[:old] != trie.codes).any(1).sum()),
        "off_nearest_path": int(off_path.sum()),
        "free_codes_before": int(free[0]),
        "free_codes_after": int(free[0]) - len(rows),
    }
    return Extended(codes, depth, report)


def _free_below(splits: Splits, trie: Trie) -> np.ndarray:
    """Codes below each node that a new item can have, (num_nodes,) int64: those of nodes that list their items."""
    free = np.where(trie.num_children > 0, splits.num_clusters - trie.num_children.astype(np.int64), 0)
    free[splits.nodes(trie)] = 0
    for level in range(trie.max_depth - 1, 0, -1):
        nodes = np.flatnonzero(trie.level == level)
        free += np.bincount(trie.parent[nodes], free[nodes], trie.num_nodes).astype(np.int64)
    return free
