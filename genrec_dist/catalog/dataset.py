"""Reading a finished catalog artifact.

The artifact holds
- items.parquet: item_index int32 (= row, 0..N-1, rank of item_id), item_id string, title, brand, description
  string (null when missing), categories list<string> (paths 'A > B > C', empty when missing), price float64;
- sequences.parquet: user_index int32 (= row), user_id string, items list<int32>, timestamps list<int64>
  (seconds; null when the source has none), in time order (timestamp, then item_id);
- stats.json, ledger.parquet, ledger.json.

The order is a view that a reader takes: 'time' as stored, 'file' by item within a user (what follows when
timestamps are zeroed). Leave-one-out split: the last item of a user is the test target, the one before it the
validation target, the rest is for training.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genrec_dist.artifacts.files import read_json
from genrec_dist.catalog.mapped import FROM_INTERACTIONS, mapped_arrays
from genrec_dist.errors import DataError

NO_TIMESTAMP = np.iinfo(np.int64).min


@dataclass(frozen=True)
class Sequences:
    """All user sequences in CSR layout.

    Shapes:
        indptr: (num_users + 1,) int64; user u owns items[indptr[u] : indptr[u + 1]].
        items: (num_interactions,) int32 item indices.
        timestamps: (num_interactions,) int64 seconds, NO_TIMESTAMP when missing.
    """

    indptr: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray
    num_items: int

    @property
    def num_users(self) -> int:
        return len(self.indptr) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.indptr)

    @property
    def span(self) -> tuple[int, int]:
        """First and last time of the train parts, seconds.

        Raises:
            DataError: no interaction of them has a time.
        """
        trained = self.timestamps != NO_TIMESTAMP
        for held_out in self.split_ends()[1:]:
            trained[held_out[held_out >= 0]] = False
        known = self.timestamps[trained]
        if not len(known):
            raise DataError(
                "no interaction has a time",
                where="catalog",
                expected="timestamps, which time_bumps asks for",
                fix="set time_bumps=0",
            )
        return int(known.min()), int(known.max())

    def by_item(self) -> Sequences:
        """The same interactions, each user's sorted by item (equal items keep their order)."""
        user = np.repeat(np.arange(self.num_users), self.lengths)
        order = np.lexsort((self.items, user))
        return Sequences(self.indptr, self.items[order], self.timestamps[order], self.num_items)

    def split_ends(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Global end positions of the train part, and positions of the validation and test targets.

        Users with fewer than 3 interactions have no held-out target: their positions are -1 and the
        train part is the whole sequence.

        Shapes:
            returns: three (num_users,) int64 arrays of positions in `items`.
        """
        ends = self.indptr[1:]
        split = self.lengths >= 3
        train_end = np.where(split, ends - 2, ends)
        return train_end, np.where(split, ends - 2, -1), np.where(split, ends - 1, -1)

    def tied_users(self) -> np.ndarray:
        """True for users whose validation and test item bear the same timestamp (order not knowable).

        Shapes:
            returns: (num_users,) bool; a missing timestamp counts as a tie.
        """
        _, valid, test = self.split_ends()
        has = test >= 0
        a, b = self.timestamps[np.maximum(valid, 0)], self.timestamps[np.maximum(test, 0)]
        return has & ((a == b) | (a == NO_TIMESTAMP) | (b == NO_TIMESTAMP))


class Catalog:
    """A finished catalog artifact.

    Args:
        folder: artifact folder.
        order: 'time' or 'file'.

    Raises:
        DataError: time order of a catalog whose source had neither complete timestamps nor positions.
    """

    def __init__(self, folder: Path, order: str = "time") -> None:
        self.folder, self.order = Path(folder), order

    @cached_property
    def sequences(self) -> Sequences:
        """All sequences: in memory, or mapped where they are many (see mapped.py)."""
        path = self.folder / "sequences.parquet"
        num_users, num_interactions = _size(path)
        if num_interactions >= FROM_INTERACTIONS:
            self._check_order()
            try:
                arrays = mapped_arrays(path, self.order, self.iterate_sequences(), num_users, num_interactions)
                return Sequences(*arrays, self.num_items)
            except OSError as error:
                warnings.warn(f"sequences are read into memory, not mapped: {error}", RuntimeWarning, stacklevel=2)
        return self.read_sequences()

    def read_sequences(self) -> Sequences:
        """All sequences in memory, however many."""
        return self._sequences(pq.read_table(self.folder / "sequences.parquet", columns=["items", "timestamps"]))

    def iterate_sequences(self) -> Iterator[Sequences]:
        """The sequences of one row group after the other: consecutive users, nothing else in memory."""
        with pq.ParquetFile(self.folder / "sequences.parquet") as file:
            for group in range(file.num_row_groups):
                yield self._sequences(file.read_row_group(group, columns=["items", "timestamps"]))

    def _sequences(self, table: pa.Table) -> Sequences:
        items = table["items"].combine_chunks()
        stamps = table["timestamps"].combine_chunks()
        sequences = Sequences(
            indptr=np.asarray(items.offsets, dtype=np.int64) - items.offsets[0].as_py(),
            items=items.flatten().to_numpy().astype(np.int32),
            timestamps=stamps.flatten().fill_null(int(NO_TIMESTAMP)).to_numpy().astype(np.int64),
            num_items=self.num_items,
        )
        self._check_order()
        return sequences.by_item() if self.order == "file" else sequences

    def _check_order(self) -> None:
        if self.order == "file":
            return
        stats = self.folder / "stats.json"
        if stats.exists() and read_json(stats)["input"]["interactions"]["ordered_by"] == "item":
            raise DataError(
                "this catalog has no time order",
                where="catalog.order",
                got="time; the source had neither complete timestamps nor complete positions",
                expected="file",
                fix="set catalog.order=file, or complete the source",
            )

    @cached_property
    def num_items(self) -> int:
        return pq.read_metadata(self.folder / "items.parquet").num_rows

    @cached_property
    def item_ids(self) -> list[str]:
        return pq.read_table(self.folder / "items.parquet", columns=["item_id"])["item_id"].to_pylist()

    @cached_property
    def titles(self) -> list[str | None]:
        return pq.read_table(self.folder / "items.parquet", columns=["title"])["title"].to_pylist()


def _size(path: Path) -> tuple[int, int]:
    """Users and interactions of a sequences.parquet, from its footer."""
    with pq.ParquetFile(path) as file:
        metadata = file.metadata
        names = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
        column = next(i for i, name in enumerate(names) if name.split(".")[0] == "items")
        groups = (metadata.row_group(g).column(column) for g in range(metadata.num_row_groups))
        return metadata.num_rows, sum(group.statistics.num_values for group in groups)
