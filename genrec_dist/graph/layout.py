"""One partition of the graph as plain arrays: who owns what, and the local rows of the adjacency matrix.

Nodes are renumbered so that a partition's nodes are consecutive: partition p owns the new ids offsets[p] ..
offsets[p + 1], its users first, then its items, both by number or block by block (locality.py). A row of an owned node
lists all its neighbours in the order of the graph, which samples of neighbours rely on: owned ones by their place,
others as halo nodes. Knows nothing of DGL, torch or processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from genrec_dist.graph.interactions import Interactions


@dataclass(frozen=True)
class Partition:
    """The part of the graph that one worker owns.

    Args:
        part: its number.
        num_users: of the whole graph.
        num_items: of the whole graph.

    Shapes:
        offsets: (num_parts + 1,) int64, first new id of each partition.
        users: (n_u,) int64 user indices owned. items: (n_i,) int64 item indices owned.
        halo: (n_h,) int64 new ids of neighbours owned by others, ascending (so grouped by owner).
        indptr: (n + 1,) int64 with n = n_u + n_i. indices: (nnz,) int32; below n: owned, else n + place in halo.
    """

    part: int
    num_users: int
    num_items: int
    offsets: np.ndarray
    users: np.ndarray
    items: np.ndarray
    halo: np.ndarray
    indptr: np.ndarray
    indices: np.ndarray

    @property
    def num_parts(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_owned(self) -> int:
        return len(self.users) + len(self.items)

    @cached_property
    def degrees(self) -> np.ndarray:
        """Degree of each owned node in the whole graph, (n,) int64."""
        return np.diff(self.indptr)


def renumber(
    assignment: np.ndarray, num_parts: int, num_users: int = 0, blocks: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """New id of every node, and the first new id of every partition.

    Args:
        assignment: partition of each node, users before items.
        num_parts: partitions.
        num_users: users; needed with blocks.
        blocks: within a partition and type, nodes come by block and then by number; by default by number.

    Shapes:
        assignment: (num_nodes,) integers. blocks: (num_nodes,) integers.
        returns: (num_nodes,) int64, (num_parts + 1,) int64.
    """
    if blocks is None:
        order = np.argsort(assignment, kind="stable")
    else:
        order = np.lexsort((blocks, np.arange(len(assignment)) >= num_users, assignment))
    new_id = np.empty(len(assignment), np.int64)
    new_id[order] = np.arange(len(assignment))
    counts = np.bincount(assignment, minlength=num_parts)
    return new_id, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def build_partition(graph: Interactions, part: int, new_id: np.ndarray, offsets: np.ndarray) -> Partition:
    """The arrays of one partition; the edges in memory are its own, of nodes there are the new ids and a mask of all.

    Args:
        graph: may be mapped into memory.
        part: which.
        new_id: of every node.
        offsets: first new id of each partition.
    """
    num_users, num_items = graph.num_users, graph.num_items
    if len(offsets) == 2 and bool((new_id[1:] > new_id[:-1]).all()):  # everything is owned, in its own order
        indices = np.concatenate([graph.user_items.astype(np.int32) + np.int32(num_users), graph.item_users])
        indptr = np.concatenate([graph.user_indptr, graph.item_indptr[1:] + graph.num_pairs])
        users, items, halo = np.arange(num_users), np.arange(num_items), np.zeros(0, np.int64)
        return Partition(part, num_users, num_items, offsets, users, items, halo, indptr, indices)
    first, last = int(offsets[part]), int(offsets[part + 1])
    users = np.flatnonzero((new_id[:num_users] >= first) & (new_id[:num_users] < last))
    items = np.flatnonzero((new_id[num_users:] >= first) & (new_id[num_users:] < last))
    users, items = users[np.argsort(new_id[users])], items[np.argsort(new_id[num_users + items])]
    user_rows, user_counts = _rows(graph.user_indptr, graph.user_items, users)
    item_rows, item_counts = _rows(graph.item_indptr, graph.item_users, items)
    neighbour = np.concatenate([new_id[num_users + user_rows.astype(np.int64)], new_id[item_rows.astype(np.int64)]])
    indptr = np.concatenate([[0], np.cumsum(np.concatenate([user_counts, item_counts]))]).astype(np.int64)
    inside = (neighbour >= first) & (neighbour < last)
    halo = np.unique(neighbour[~inside])
    local = np.where(inside, neighbour - first, 0)
    local[~inside] = last - first + np.searchsorted(halo, neighbour[~inside])
    return Partition(part, num_users, num_items, offsets, users, items, halo, indptr, local.astype(np.int32))


def places_of_rows(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Places of the entries of some rows of a CSR matrix, row after row.

    Shapes:
        starts, counts: (n,) int64, first place and number of entries of each row. returns: (sum of counts,) int64.
    """
    return np.arange(counts.sum()) + np.repeat(starts - (np.cumsum(counts) - counts), counts)


def _rows(indptr: np.ndarray, indices: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Concatenated rows of a CSR matrix, and their lengths."""
    counts = np.asarray(indptr[rows + 1] - indptr[rows])
    return np.asarray(indices[places_of_rows(indptr[rows], counts)]), counts


def split_halo(
    partition: Partition,
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray], np.ndarray]:
    """The rows' owned columns; the halo columns of the rows that have any; which rows those are."""
    indices, count = np.asarray(partition.indices), partition.num_owned
    row = np.repeat(np.arange(count), partition.degrees)
    outside = indices >= count
    inner = np.concatenate([[0], np.cumsum(np.bincount(row[~outside], minlength=count))])
    boundary, lengths = np.unique(row[outside], return_counts=True)
    outer = np.concatenate([[0], np.cumsum(lengths)])
    return (inner, indices[~outside]), (outer, indices[outside] - count), boundary


ARRAYS = ("users", "items", "halo", "indptr", "indices")


def save_partition(folder: Path, partition: Partition) -> None:
    """Write `folder/part-<p>/*.npy`."""
    target = folder / f"part-{partition.part}"
    target.mkdir(parents=True, exist_ok=True)
    for name in ARRAYS:
        np.save(target / f"{name}.npy", getattr(partition, name), allow_pickle=False)


def load_partition(folder: Path, part: int, num_users: int, num_items: int, offsets: np.ndarray) -> Partition:
    """Map the arrays of one partition into memory."""
    arrays = (np.load(folder / f"part-{part}" / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS)
    return Partition(part, num_users, num_items, offsets, *arrays)
