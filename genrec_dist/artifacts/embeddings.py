"""Embedding arrays in Zarr v3: one sharded (num_items, dim) array, one writer a shard, fill value NaN.

Completion of shards is recorded outside Zarr (`shards/<n>.json` beside the array), because a missing chunk
reads back as the fill value without a word. Row = item index. Reading refuses unfinished arrays. Several
processes may write different shards of one array at once; two must never share a shard.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import zarr
from zarr.errors import ContainsArrayError

from genrec_dist.artifacts.files import read_json, write_json
from genrec_dist.errors import ArtifactError, DataError

ARRAY = "embeddings.zarr"


def num_shards(num_items: int, rows_per_shard: int) -> int:
    """Number of shards of an array; the last may be short."""
    return -(-num_items // rows_per_shard)


def shard_rows(shard: int, num_items: int, rows_per_shard: int) -> tuple[int, int]:
    """First row and end row of a shard."""
    start = shard * rows_per_shard
    return start, min(start + rows_per_shard, num_items)


def record_path(folder: Path, shard: int) -> Path:
    """Completion record of a shard."""
    return folder / "shards" / f"{shard:06d}.json"


def pending_shards(folder: Path, num_items: int, rows_per_shard: int) -> list[int]:
    """Shards without a completion record."""
    return [s for s in range(num_shards(num_items, rows_per_shard)) if not record_path(folder, s).exists()]


def read_records(folder: Path) -> list[dict]:
    """Completion records in shard order."""
    return [read_json(file) for file in sorted((folder / "shards").glob("*.json"))]


class EmbeddingWriter:
    """Writer of whole shards; opens the array, or creates it when it is not there.

    Args:
        folder: artifact work folder; the array is `folder/embeddings.zarr`.
        num_items: rows.
        dim: columns.
        rows_per_shard: rows of a shard, the unit of writing and resuming.
        dtype: 'float32' or 'float16'.

    Raises:
        ArtifactError: there is an array of another shape.
    """

    def __init__(
        self, folder: Path, num_items: int, dim: int, rows_per_shard: int = 4096, dtype: str = "float32"
    ) -> None:
        self.folder, self.num_items, self.dim, self.rows_per_shard = folder, num_items, dim, rows_per_shard
        path = folder / ARRAY
        chunk = min(rows_per_shard, 1024)
        while rows_per_shard % chunk:
            chunk -= 1
        try:
            self.array = zarr.create_array(
                store=str(path),
                shape=(num_items, dim),
                dtype=dtype,
                chunks=(chunk, dim),
                shards=(rows_per_shard, dim),
                fill_value=float("nan"),
                zarr_format=3,
            )
        except ContainsArrayError:  # a killed build, or another worker, made it
            self.array = zarr.open_array(store=str(path), mode="r+")
        found = (self.array.shape, self.array.shards)
        if found != ((num_items, dim), (rows_per_shard, dim)):
            raise ArtifactError(
                "unfinished embedding array has another shape",
                where=path,
                got="shape {}, shards {}".format(*found),
                expected=f"shape {(num_items, dim)}, shards {(rows_per_shard, dim)}",
                fix="remove the .building folder",
            )

    @property
    def num_shards(self) -> int:
        return num_shards(self.num_items, self.rows_per_shard)

    def rows(self, shard: int) -> tuple[int, int]:
        """First row and end row of a shard."""
        return shard_rows(shard, self.num_items, self.rows_per_shard)

    def pending(self) -> list[int]:
        """Shards without a completion record."""
        return pending_shards(self.folder, self.num_items, self.rows_per_shard)

    def write(self, shard: int, values: np.ndarray, failed: list[dict] | None = None, info: dict | None = None) -> None:
        """Write one whole shard, then its completion record.

        Args:
            shard: shard number.
            values: embeddings; NaN rows must be listed in `failed`.
            failed: `{"row": item index, "reason": str}` of rows without an embedding.
            info: whatever else the record should keep, JSON-ready.

        Shapes:
            values: (rows of the shard, dim) float.

        Raises:
            DataError: wrong shape, or a non-finite row that `failed` does not name.
        """
        start, end = self.rows(shard)
        if values.shape != (end - start, self.dim):
            raise DataError(
                "shard has the wrong shape",
                where=f"shard {shard}",
                got=values.shape,
                expected=(end - start, self.dim),
            )
        values = values.astype(self.array.dtype, copy=False)  # first: a float16 overflow is not finite either
        bad = set((start + np.flatnonzero(~np.isfinite(values).all(axis=1))).tolist())
        named = {row["row"] for row in failed or []}
        if bad != named:
            raise DataError(
                "non-finite embedding rows differ from the rows named as failed",
                where=f"shard {shard}",
                got=sorted(bad ^ named)[:10],
                expected="every non-finite row in the ledger, and no other",
            )
        self.array[start:end] = values
        record = {"shard": shard, "rows": [start, end], "failed": failed or [], "info": info or {}}
        write_json(record_path(self.folder, shard), record)


def write_embeddings(folder: Path, values: np.ndarray, rows_per_shard: int = 4096) -> None:
    """Write a whole in-memory table, (num_items, dim) float32, every row finite."""
    num_items, dim = values.shape
    writer = EmbeddingWriter(folder, num_items, dim, rows_per_shard)
    for shard in range(writer.num_shards):
        start, end = writer.rows(shard)
        writer.write(shard, values[start:end])


def failed_items(folder: Path) -> np.ndarray:
    """Indices of the items that have no embedding, ascending.

    Shapes:
        returns: (number of failed rows,) int64.
    """
    return np.array(sorted(row["row"] for record in read_records(folder) for row in record["failed"]), dtype=np.int64)


def read_embeddings(folder: Path) -> np.ndarray:
    """All embeddings of a finished artifact, (num_items, dim) float32.

    Failed rows come back as zeros, so that no NaN spreads; `failed_items` names them.

    Raises:
        ArtifactError: shards are missing, or rows are non-finite that are not recorded as failed.
    """
    array = zarr.open_array(store=str(folder / ARRAY), mode="r")
    rows_per_shard = (array.shards or array.chunks)[0]
    missing = pending_shards(folder, array.shape[0], rows_per_shard)
    if missing:
        raise ArtifactError(
            "embedding array is unfinished",
            where=folder,
            got=f"{len(missing)} shards without a completion record, first {missing[0]}",
            expected=f"records of all {num_shards(array.shape[0], rows_per_shard)} shards",
            fix="run the stage that builds it",
        )
    values = np.asarray(array[:], dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    failed = failed_items(folder)
    if not np.array_equal(bad, failed):
        raise ArtifactError(
            "non-finite embedding rows differ from the recorded failures",
            where=folder,
            got=f"{len(bad)} non-finite rows",
            expected=f"{len(failed)} recorded failures",
            fix="rebuild the artifact",
        )
    values[bad] = 0.0
    return values
