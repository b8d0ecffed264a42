"""The user-item graph: distinct training interactions in CSR layout, by user and by item.

Reads a catalog's sequences.parquet a row group at a time and writes four .npy files that readers map into memory, so
the edge list never has to fit there. Validation and test interactions are not in the graph. Order within a user does
not matter here: a user's items are ascending.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genrec_dist.catalog.dataset import Catalog, Sequences
from genrec_dist.errors import DataError

BLOCK_EDGES = 1 << 24
"""Edges of the transposed graph that are sorted in memory at once: about 300 MiB of work space."""


@dataclass(frozen=True)
class Interactions:
    """Distinct (user, item) pairs of the training part, in CSR layout both ways.

    Node ids of the bipartite graph: user u is node u, item i is node num_users + i.

    Shapes:
        user_indptr: (num_users + 1,) int64; user_items: (num_pairs,) int32, ascending within a user.
        item_indptr: (num_items + 1,) int64; item_users: (num_pairs,) int32, ascending within an item.
    """

    user_indptr: np.ndarray
    user_items: np.ndarray
    item_indptr: np.ndarray
    item_users: np.ndarray

    @property
    def num_users(self) -> int:
        return len(self.user_indptr) - 1

    @property
    def num_items(self) -> int:
        return len(self.item_indptr) - 1

    @property
    def num_nodes(self) -> int:
        return self.num_users + self.num_items

    @property
    def num_pairs(self) -> int:
        return len(self.user_items)

    def node_degrees(self) -> np.ndarray:
        """Degree of each node, (num_nodes,) int64."""
        return np.concatenate([np.diff(self.user_indptr), np.diff(self.item_indptr)])

    @classmethod
    def from_pairs(cls, users: np.ndarray, items: np.ndarray, num_users: int, num_items: int) -> Interactions:
        """Build in memory from any pairs; repeated ones count once.

        Shapes:
            users, items: (n,) integers.

        Raises:
            DataError: an index outside its range.
        """
        users, items = np.asarray(users, np.int64), np.asarray(items, np.int64)
        for name, values, size in (("user", users, num_users), ("item", items, num_items)):
            if len(values) and not 0 <= values.min() <= values.max() < size:
                raise DataError(
                    f"{name} index outside the graph",
                    got=f"{values.min()} to {values.max()}",
                    expected=f"0 to {size - 1}",
                )
        keys = np.unique(users * num_items + items)
        user, item = np.divmod(keys, num_items)
        by_item = np.argsort(item, kind="stable")
        return cls(
            _indptr(np.bincount(user, minlength=num_users)),
            item.astype(np.int32),
            _indptr(np.bincount(item, minlength=num_items)),
            user[by_item].astype(np.int32),
        )

    @classmethod
    def load(cls, folder: Path) -> Interactions:
        """Map a written graph into memory."""
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in FILES))


FILES = ("user_indptr", "user_items", "item_indptr", "item_users")


def training_interactions(sequences: Sequences) -> Interactions:
    """Graph of the training part of sequences that are in memory."""
    return Interactions.from_pairs(*_training_pairs(sequences), sequences.num_users, sequences.num_items)


def _training_pairs(sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """User and item of every training interaction."""
    train_end, _, _ = sequences.split_ends()
    counts = train_end - sequences.indptr[:-1]
    users = np.repeat(np.arange(sequences.num_users), counts)
    within = np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts)
    return users, sequences.items[sequences.indptr[users] + within]


def write_interactions(catalog: Catalog, out: Path, block_edges: int = BLOCK_EDGES) -> dict:
    """Write the graph of a catalog's training interactions without holding its edges in memory.

    Args:
        catalog: finished catalog.
        out: folder that receives the .npy files.
        block_edges: edges of the transposed graph sorted in memory at once.

    Returns:
        Numbers of users, items, pairs, repeated interactions left out, and of users and items without an edge.

    Raises:
        DataError: the catalog has no training interaction.
    """
    num_items = catalog.num_items
    item_degree = np.zeros(num_items, np.int64)
    user_degree: list[np.ndarray] = []
    repeated = 0
    raw = out / "user_items.raw"
    with open(raw, "wb") as file:
        for sequences in catalog.iterate_sequences():
            users, items = _training_pairs(sequences)
            distinct, place = np.unique(items, return_inverse=True)  # as far as they go: a group has few of the items
            keys = np.unique(users * len(distinct) + place)
            user, item = np.divmod(keys, max(len(distinct), 1))
            repeated += len(users) - len(keys)
            user_degree.append(np.bincount(user, minlength=sequences.num_users))
            item_degree[distinct] += np.bincount(item, minlength=len(distinct))
            file.write(distinct[item].astype(np.int32).data)
    user_indptr = _indptr(np.concatenate(user_degree) if user_degree else np.zeros(0, np.int64))
    num_pairs = int(user_indptr[-1])
    if num_pairs == 0:
        raise DataError(
            "catalog has no training interaction",
            where=catalog.folder,
            expected="at least one user with a training part",
            fix="loosen the k-core filter or check the source",
        )
    item_indptr = _indptr(item_degree)
    user_items = np.memmap(raw, np.int32, "r", shape=(num_pairs,))
    _save(out / "user_indptr.npy", user_indptr)
    _save(out / "item_indptr.npy", item_indptr)
    _copy(out / "user_items.npy", user_items)
    _transpose(user_indptr, user_items, item_indptr, out / "item_users.npy", block_edges)
    del user_items
    raw.unlink()
    return {
        "users": len(user_indptr) - 1,
        "items": num_items,
        "pairs": num_pairs,
        "repeated": repeated,
        "users_without_edge": int((np.diff(user_indptr) == 0).sum()),
        "items_without_edge": int((item_degree == 0).sum()),
    }


def _transpose(
    user_indptr: np.ndarray, user_items: np.ndarray, item_indptr: np.ndarray, path: Path, block_edges: int
) -> None:
    """Write the users of every item: item ranges of at most `block_edges` edges, each gathered in one pass."""
    num_items, num_pairs = len(item_indptr) - 1, len(user_items)
    out = np.lib.format.open_memmap(path, "w+", np.int32, (num_pairs,))
    start = 0
    while start < num_items:
        end = int(np.searchsorted(item_indptr, item_indptr[start] + block_edges, side="right")) - 1
        end = min(max(end, start + 1), num_items)
        items, users = [], []
        for first in range(0, num_pairs, BLOCK_EDGES):
            part = np.asarray(user_items[first : first + BLOCK_EDGES])
            place = np.flatnonzero((part >= start) & (part < end))
            items.append(part[place])
            users.append((np.searchsorted(user_indptr, first + place, side="right") - 1).astype(np.int32))
        order = np.argsort(np.concatenate(items), kind="stable")
        out[item_indptr[start] : item_indptr[end]] = np.concatenate(users)[order]
        start = end
    out.flush()


def _indptr(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _save(path: Path, array: np.ndarray) -> None:
    np.save(path, array, allow_pickle=False)


def _copy(path: Path, source: np.ndarray) -> None:
    out = np.lib.format.open_memmap(path, "w+", source.dtype, source.shape)
    for first in range(0, len(source), BLOCK_EDGES):
        out[first : first + BLOCK_EDGES] = source[first : first + BLOCK_EDGES]
    out.flush()
