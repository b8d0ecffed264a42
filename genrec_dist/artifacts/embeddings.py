"""Embedding arrays in Zarr v3: one sharded (num_items, dim) array, one writer a shard, fill value NaN.

Completion of shards is recorded outside Zarr (`shards/<n>.json` beside the array), because a missing chunk
reads back as the fill value without a word. Row = item index. Reading refuses unfinished arrays.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import zarr

from genrec_dist.artifacts.files import read_json, write_json
from genrec_dist.errors import ArtifactError, DataError

ARRAY = "embeddings.zarr"


class EmbeddingWriter:
    """Writer of whole shards.

    Args:
        folder: artifact work folder; the array is `folder/embeddings.zarr`.
        num_items: rows.
        dim: columns.
        rows_per_shard: rows of a shard, the unit of writing and resuming.
        dtype: 'float32' or 'float16'.
    """

    def __init__(
        self, folder: Path, num_items: int, dim: int, rows_per_shard: int = 4096, dtype: str = "float32"
    ) -> None:
        self.folder, self.num_items, self.dim, self.rows_per_shard = folder, num_items, dim, rows_per_shard
        path = folder / ARRAY
        if path.exists():
            self.array = zarr.open_array(store=str(path), mode="r+")
            if self.array.shape != (num_items, dim):
                raise ArtifactError(
                    "unfinished embedding array has another shape",
                    where=path,
                    got=self.array.shape,
                    expected=(num_items, dim),
                    fix="remove the .building folder",
                )
        else:
            chunk = min(rows_per_shard, 1024)
            while rows_per_shard % chunk:
                chunk -= 1
            self.array = zarr.create_array(
                store=str(path),
                shape=(num_items, dim),
                dtype=dtype,
                chunks=(chunk, dim),
                shards=(rows_per_shard, dim),
                fill_value=float("nan"),
                zarr_format=3,
            )

    @property
    def num_shards(self) -> int:
        return -(-self.num_items // self.rows_per_shard)

    def rows(self, shard: int) -> tuple[int, int]:
        """First row and end row of a shard."""
        start = shard * self.rows_per_shard
        return start, min(start + self.rows_per_shard, self.num_items)

    def pending(self) -> list[int]:
        """Shards without a completion record."""
        return [s for s in range(self.num_shards) if not self._record(s).exists()]

    def _record(self, shard: int) -> Path:
        return self.folder / "shards" / f"{shard:06d}.json"

    def write(self, shard: int, values: np.ndarray, failed: list[dict] | None = None) -> None:
        """Write one whole shard, then its completion record.

        Args:
            shard: shard number.
            values: embeddings; NaN rows must be listed in `failed`.
            failed: `{"row": item index, "reason": str}` of rows without an embedding.

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
        write_json(self._record(shard), {"shard": shard, "rows": [start, end], "failed": failed or []})

    def failed_rows(self) -> list[dict]:
        """Failed rows of all finished shards."""
        return [
            row
            for shard in range(self.num_shards)
            if self._record(shard).exists()
            for row in read_json(self._record(shard))["failed"]
        ]


def write_embeddings(folder: Path, values: np.ndarray, rows_per_shard: int = 4096) -> None:
    """Write a whole in-memory table, (num_items, dim) float32, every row finite."""
    writer = EmbeddingWriter(folder, *values.shape, rows_per_shard=rows_per_shard)
    for shard in range(writer.num_shards):
        start, end = writer.rows(shard)
        writer.write(shard, values[start:end])


def read_embeddings(folder: Path) -> np.ndarray:
    """All embeddings of a finished artifact, (num_items, dim) float32; failed rows become zeros.

    Raises:
        ArtifactError: shards are missing.
    """
    array = zarr.open_array(store=str(folder / ARRAY), mode="r")
    num_shards = -(-array.shape[0] // array.shards[0])
    done = len(list((folder / "shards").glob("*.json")))
    if done != num_shards:
        raise ArtifactError(
            "embedding array is unfinished", where=folder, got=f"{done} shards", expected=num_shards
        )
    values = np.asarray(array[:], dtype=np.float32)
    bad = ~np.isfinite(values).all(axis=1)
    failed = {
        row["row"] for file in (folder / "shards").glob("*.json") for row in read_json(file)["failed"]
    }
    if set(np.flatnonzero(bad).tolist()) != failed:
        raise ArtifactError(
            "non-finite embedding rows differ from the recorded failures",
            where=folder,
            got=f"{int(bad.sum())} non-finite rows",
            expected=f"{len(failed)} recorded failures",
            fix="rebuild the artifact",
        )
    values[bad] = 0.0
    return values
