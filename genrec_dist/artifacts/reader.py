"""Reading finished embedding arrays: random rows, shard-aligned streams, the whole table, integrity.

Shards are mapped into memory: a raw, uncompressed Zarr shard is its chunks one after the other, with their places
in an index at its end (Zarr v3 specification, codec `sharding_indexed`). Arrays that other software wrote in another
way are read through Zarr itself. A row without an embedding is never handed out as if it had one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
import zarr

from genrec_dist.artifacts.embeddings import (
    ARRAY,
    CHECKSUM,
    INDEX_ENTRY,
    failed_items,
    finite_rows,
    from_bfloat16,
    is_plain,
    num_shards,
    pending_shards,
    shard_file,
    shard_rows,
    stored_dtype,
)
from genrec_dist.artifacts.files import read_json
from genrec_dist.errors import ArtifactError, DataError

MAX_MAPPED = 1024


class EmbeddingStore:
    """A finished embedding array.

    Args:
        folder: folder of the artifact (or a part of one) that holds `embeddings.zarr` and `shards/`.

    Raises:
        ArtifactError: no array, or shards are missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.array = zarr.open_array(store=str(self.folder / ARRAY), mode="r")
        except FileNotFoundError:
            raise ArtifactError(
                "no embedding array", where=self.folder, expected=ARRAY, fix="run the stage that builds it"
            ) from None
        self.num_items, self.dim = self.array.shape
        self.dtype = stored_dtype(self.array)
        self.rows_per_shard = (self.array.shards or self.array.chunks)[0]
        self.num_shards = num_shards(self.num_items, self.rows_per_shard)
        missing = pending_shards(self.folder, self.num_items, self.rows_per_shard)
        if missing:
            raise ArtifactError(
                "embedding array is unfinished",
                where=self.folder,
                got=f"{len(missing)} shards without a completion record, first {missing[0]}",
                expected=f"records of all {self.num_shards} shards",
                fix="run the stage that builds it",
            )
        self._mapped: OrderedDict[int, np.ndarray] = OrderedDict()
        self._mapping = Lock()

    @cached_property
    def failed(self) -> np.ndarray:
        """Items without an embedding, (n,) int64, ascending."""
        return failed_items(self.folder)

    def rows(self, items: Sequence[int] | np.ndarray, failed: Literal["raise", "zero"] = "raise") -> np.ndarray:
        """Embeddings of any items, in the order asked for.

        Args:
            items: item indices, repeats allowed.
            failed: what an item without an embedding does: raise, or become zeros.

        Shapes:
            items: (n,) integers. returns: (n, dim) float32.

        Raises:
            DataError: an index out of range, or (failed='raise') an item without an embedding.
            ArtifactError: a row is not finite though no failure is recorded.
        """
        index = np.asarray(items, np.int64)
        if len(index) and (index.min() < 0 or index.max() >= self.num_items):
            raise DataError(
                "no such item",
                where=self.folder,
                got=f"{index.min()} to {index.max()}",
                expected=f"0..{self.num_items - 1}",
            )
        bad = np.isin(index, self.failed)
        if failed == "raise" and bad.any():
            raise DataError(
                "items have no embedding",
                where=self.folder,
                got=f"{int(bad.sum())} of {len(index)}, first item {index[bad][0]}",
                expected="items that are not in the ledger",
                fix="leave out the items in `failed`, or ask for failed='zero'",
            )
        values = np.empty((len(index), self.dim), self._raw_dtype)
        order = np.argsort(index // self.rows_per_shard, kind="stable")
        shard_of = index[order] // self.rows_per_shard
        bounds = np.flatnonzero(np.diff(shard_of, prepend=-1, append=-1))
        for first, last in pairwise(bounds.tolist()):
            shard, places = int(shard_of[first]), order[first:last]
            values[places] = self._raw(shard)[index[places] - shard * self.rows_per_shard]
        return self._checked(values, bad, index)

    def stream(
        self, shards: Sequence[int] | None = None, *, seed: int | None = None, prefetch: int = 1
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Whole shards one after the other, items without an embedding left out.

        Args:
            shards: which shards; all by default. A worker of many takes `range(rank, num_shards, world_size)`.
            seed: shuffle the shards and the rows within each; None keeps the order of items.
            prefetch: shards that are read ahead in a thread.

        Yields:
            Item indices (n,) int64 and their embeddings (n, dim) float32.
        """
        wanted = list(range(self.num_shards) if shards is None else shards)
        generator = None if seed is None else np.random.default_rng(seed)
        if generator is not None:
            generator.shuffle(wanted)
        with ThreadPoolExecutor(1) as pool:
            ahead = [pool.submit(self.shard, shard) for shard in wanted[: prefetch + 1]]
            for place in range(len(wanted)):
                index, values = ahead.pop(0).result()
                if place + prefetch + 1 < len(wanted):
                    ahead.append(pool.submit(self.shard, wanted[place + prefetch + 1]))
                if generator is not None:
                    order = generator.permutation(len(index))
                    index, values = index[order], values[order]
                yield index, values

    def shard(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Items of one shard that have an embedding, and their embeddings: (n,) int64, (n, dim) float32."""
        start, end = shard_rows(shard, self.num_items, self.rows_per_shard)
        index = np.arange(start, end)
        bad = np.isin(index, self.failed)
        values = self._checked(np.array(self._raw(shard)), bad, index)
        return (index[~bad], values[~bad]) if bad.any() else (index, values)

    def read(self, failed: Literal["raise", "zero"] = "raise") -> np.ndarray:
        """The whole table, (num_items, dim) float32; see `rows`."""
        return self.rows(np.arange(self.num_items), failed)

    def verify(self) -> list[str]:
        """Problems of the content: failures that are not recorded, recorded ones that have a vector, ids, ledger."""
        problems = []
        for shard in range(self.num_shards):
            start, end = shard_rows(shard, self.num_items, self.rows_per_shard)
            finite = finite_rows(self._as_float32(np.array(self._raw(shard))))
            recorded = np.isin(np.arange(start, end), self.failed)
            for what, wrong in (
                ("not finite, no failure recorded", ~finite & ~recorded),
                ("finite, recorded as failed", finite & recorded),
            ):
                if wrong.any():
                    problems.append(
                        f"shard {shard}: {int(wrong.sum())} rows {what}, first {start + int(wrong.argmax())}"
                    )
        return problems + self._id_problems() + self._ledger_problems()

    def _id_problems(self) -> list[str]:
        file = self.folder / "ids.parquet"
        if not file.exists():
            return []
        index = pq.read_table(file, columns=["item_index"])["item_index"].to_numpy()
        if not np.array_equal(index, np.arange(self.num_items)):
            return [f"ids.parquet: item_index is not 0..{self.num_items - 1}, each once"]
        return []

    def _ledger_problems(self) -> list[str]:
        summary = self.folder / "ledger.json"
        if not summary.exists():
            return []
        ledger = read_json(summary)
        counted = sum(actions.get("failed", 0) for actions in ledger["counts"].values())
        if counted != len(self.failed):
            return [f"ledger.json: {counted} failed items, the shards' records have {len(self.failed)}"]
        if ledger["listed"] < ledger["total"]:  # the rest is counted only
            return []
        rows = pq.read_table(self.folder / "ledger.parquet", filters=[("action", "=", "failed")])["line"].to_numpy()
        if not np.array_equal(np.sort(rows) - 1, self.failed):
            return ["ledger.parquet: failed items differ from the shards' records"]
        return []

    @property
    def _raw_dtype(self) -> np.dtype:
        return np.dtype(self.array.dtype)

    def _as_float32(self, values: np.ndarray) -> np.ndarray:
        return from_bfloat16(values) if self.dtype == "bfloat16" else values.astype(np.float32, copy=False)

    def _checked(self, values: np.ndarray, bad: np.ndarray, index: np.ndarray) -> np.ndarray:
        """As float32, failed rows zero, every other row finite."""
        floats = self._as_float32(values)
        finite = finite_rows(floats)
        if not np.array_equal(finite, ~bad):
            wrong = index[finite == bad]
            raise ArtifactError(
                "non-finite embedding rows differ from the recorded failures",
                where=self.folder,
                got=f"{len(wrong)} rows, first {wrong[0]}",
                expected="every row finite but the recorded failures",
                fix="rebuild the artifact",
            )
        floats[bad] = 0.0
        return floats

    def _raw(self, shard: int) -> np.ndarray:
        """Rows of a shard as stored, mapped where the layout allows."""
        with self._mapping:  # several threads may read
            if shard in self._mapped:
                self._mapped.move_to_end(shard)
                return self._mapped[shard]
        start, end = shard_rows(shard, self.num_items, self.rows_per_shard)
        values = self._map(shard, end - start) if self._is_plain else None
        if values is None:
            return np.asarray(self.array[start:end])
        with self._mapping:
            self._mapped[shard] = values
            while len(self._mapped) > MAX_MAPPED:
                self._mapped.popitem(last=False)
        return values

    @cached_property
    def _is_plain(self) -> bool:
        return is_plain(self.array)

    def _map(self, shard: int, rows: int) -> np.ndarray | None:
        """Map a shard whose chunks lie one after the other; None when they do not."""
        file = shard_file(self.folder, shard)
        if not file.is_file():
            return None  # Zarr reads the fill value, which the check of finite rows then refuses
        chunk_rows, row_bytes = self.array.chunks[0], self.dim * self._raw_dtype.itemsize
        chunks, used = self.rows_per_shard // chunk_rows, -(-rows // chunk_rows)
        data = np.memmap(file, np.uint8, "r")
        tail = chunks * INDEX_ENTRY + CHECKSUM
        if len(data) < tail:
            return None
        index = data[-tail:-CHECKSUM].view("<u8").reshape(chunks, 2)[:used].astype(np.int64)
        expected = index[0, 0] + np.arange(used) * chunk_rows * row_bytes
        if not np.array_equal(index[:, 0], expected) or (index[:, 1] != chunk_rows * row_bytes).any():
            return None
        first, size = int(index[0, 0]), rows * row_bytes
        return data[first : first + size].view(self._raw_dtype).reshape(rows, self.dim)


def read_embeddings(folder: Path) -> np.ndarray:
    """All embeddings of a finished artifact, (num_items, dim) float32.

    Failed rows come back as zeros, so that no NaN spreads; `failed_items` names them.

    Raises:
        ArtifactError: shards are missing, or rows are non-finite that are not recorded as failed.
    """
    return EmbeddingStore(folder).read(failed="zero")
