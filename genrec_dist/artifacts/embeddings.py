"""Embedding arrays in Zarr v3: one sharded (num_items, dim) array, one writer a shard, fill value NaN.

Completion of shards is recorded outside Zarr (`shards/<n>.json` beside the array), because a missing chunk
reads back as the fill value without a word. Row = item index. Several processes may write different shards of
one array at once; two must never share a shard. Reading is in reader.py.

Values are stored uncompressed: float embeddings hardly compress, and a raw shard can be mapped into memory.
Zarr has no bfloat16, so bfloat16 is stored as its bits (uint16) with the attribute `dtype`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
import zarr
from zarr.errors import ContainsArrayError

from genrec_dist.artifacts.files import read_json, write_json
from genrec_dist.errors import ArtifactError, ClusterError, DataError

ARRAY = "embeddings.zarr"
Dtype = Literal["float32", "float16", "bfloat16"]
SHARD_BYTES = 16 << 20
MAX_SHARD_ROWS = 2048
CHUNK_BYTES = 1 << 20
BFLOAT16_NAN = 0x7FC0
INDEX_ENTRY = 16
CHECKSUM = 4
OVERFLOW = {"float16": 65520.0, "bfloat16": float.fromhex("0x1.ffp127")}
"""Least values that round to infinity."""


def bytes_per_value(dtype: Dtype) -> int:
    """4 or 2."""
    return 4 if dtype == "float32" else 2


def choose_rows_per_shard(dim: int, dtype: Dtype) -> int:
    """Rows of a shard: a power of two that fits 16 MiB, at most 2048.

    A shard is what a lost worker costs, so it must not take minutes to compute; and a file, so it must not be
    tiny. 4096 bfloat16 columns (Llama2-7b) give 2048 rows, the same in float32 1024.
    """
    fitting = max(1, SHARD_BYTES // (dim * bytes_per_value(dtype)))
    return min(MAX_SHARD_ROWS, 1 << (fitting.bit_length() - 1))


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
    try:
        recorded = {entry.name for entry in os.scandir(folder / "shards")}
    except FileNotFoundError:
        recorded = set()
    return [s for s in range(num_shards(num_items, rows_per_shard)) if record_path(folder, s).name not in recorded]


def iterate_records(folder: Path) -> Iterator[dict]:
    """Completion records in shard order, one in memory at a time."""
    for file in sorted((folder / "shards").glob("*.json")):
        yield read_json(file)


def failed_items(folder: Path) -> np.ndarray:
    """Indices of the items that have no embedding, ascending.

    Shapes:
        returns: (number of failed rows,) int64.
    """
    return np.array(sorted(row["row"] for record in iterate_records(folder) for row in record["failed"]), np.int64)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> bits of bfloat16, rounded to nearest even; NaN stays NaN.

    Shapes:
        values: any shape, float32. returns: the same shape, uint16.
    """
    import torch  # twenty times as fast as numpy's integer operations

    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(torch.bfloat16).view(torch.uint16).numpy()


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Bits of bfloat16 (uint16) -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def finite_rows(values: np.ndarray) -> np.ndarray:
    """Rows without NaN and infinity.

    Their sum is finite, that of the others never is, and only a sum that overflowed has to be looked at again: one pass
    without a copy.

    Shapes:
        values: (n, dim) float32. returns: (n,) bool.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        finite = np.isfinite(values.sum(axis=1))
    doubtful = np.flatnonzero(~finite)
    finite[doubtful] = np.isfinite(values[doubtful]).all(axis=1)
    return finite


def stored_dtype(array: zarr.Array) -> Dtype:
    """What the values of an array are.

    Raises:
        ArtifactError: the array does not hold floats.
    """
    found = array.attrs.get("dtype", str(array.dtype))
    if found not in ("float32", "float16", "bfloat16"):
        raise ArtifactError("not an embedding array", where=array.store_path, got=f"dtype {found}", expected="float")
    return found  # type: ignore[return-value]


@contextmanager
def space_checked(where: Path) -> Iterator[None]:
    """Turn 'disk full' into an error that says what to do.

    Raises:
        ClusterError: no space, or no quota, is left.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ClusterError(
            "disk is full",
            where=where,
            got=os.strerror(error.errno),
            expected="room for the shard that is being written",
            fix="free space and run the same command again: finished shards are kept",
        ) from error


class EmbeddingWriter:
    """Writer of whole shards; opens the array, or creates it when it is not there.

    Args:
        folder: artifact work folder; the array is `folder/embeddings.zarr`.
        num_items: rows.
        dim: columns.
        rows_per_shard: rows of a shard, the unit of writing and resuming; 0 chooses by `choose_rows_per_shard`.
        dtype: 'float32', 'float16' or 'bfloat16'.

    Raises:
        ArtifactError: there is an array of another shape or dtype.
        ClusterError: the disk is full.
    """

    def __init__(
        self, folder: Path, num_items: int, dim: int, rows_per_shard: int = 0, dtype: Dtype = "float32"
    ) -> None:
        rows_per_shard = rows_per_shard or choose_rows_per_shard(dim, dtype)
        self.folder, self.num_items, self.dim, self.rows_per_shard = folder, num_items, dim, rows_per_shard
        self.dtype: Dtype = dtype
        path = folder / ARRAY
        bits = dtype == "bfloat16"
        try:
            with space_checked(path):
                self.array = zarr.create_array(
                    store=str(path),
                    shape=(num_items, dim),
                    dtype="uint16" if bits else dtype,
                    chunks=(_chunk_rows(rows_per_shard, dim * bytes_per_value(dtype)), dim),
                    shards=(rows_per_shard, dim),
                    fill_value=BFLOAT16_NAN if bits else float("nan"),
                    compressors=None,
                    attributes={"dtype": dtype},
                    zarr_format=3,
                )
        except ContainsArrayError:  # a killed build, or another worker, made it
            self.array = zarr.open_array(store=str(path), mode="r+")
        found = (self.array.shape, self.array.shards, stored_dtype(self.array))
        wanted = ((num_items, dim), (rows_per_shard, dim), dtype)
        if found != wanted or not is_plain(self.array):
            raise ArtifactError(
                "unfinished embedding array has another shape",
                where=path,
                got="shape {}, shards {}, {}".format(*found),
                expected="shape {}, shards {}, {}".format(*wanted),
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
        """Write one whole shard, make it durable, then write its completion record.

        Args:
            shard: shard number.
            values: embeddings; NaN rows must be listed in `failed`.
            failed: `{"row": item index, "reason": str}` of rows without an embedding.
            info: whatever else the record should keep, JSON-ready.

        Shapes:
            values: (rows of the shard, dim) float32.

        Raises:
            DataError: wrong shape, or a non-finite row that `failed` does not name.
            ClusterError: the disk is full; nothing is recorded then.
        """
        start, end = self.rows(shard)
        if values.shape != (end - start, self.dim):
            raise DataError(
                "shard has the wrong shape",
                where=f"shard {shard}",
                got=values.shape,
                expected=(end - start, self.dim),
            )
        bad = set((start + np.flatnonzero(~finite_rows(values) | self.overflows(values))).tolist())
        named = {row["row"] for row in failed or []}
        if bad != named:
            raise DataError(
                "non-finite embedding rows differ from the rows named as failed",
                where=f"shard {shard}",
                got=sorted(bad ^ named)[:10],
                expected="every non-finite row in the ledger, and no other",
            )
        record = {"shard": shard, "rows": [start, end], "failed": failed or [], "info": info or {}}
        with space_checked(self.folder / ARRAY):
            self.write_array(shard, self._encode(values))
            write_json(record_path(self.folder, shard), record)

    def write_array(self, shard: int, stored: np.ndarray) -> None:
        """Write the file of one shard and make it durable: its chunks, and their places (codec `sharding_indexed`).

        Zarr's own writing copies the values several times; this costs what a plain write of the bytes costs.

        Args:
            shard: shard number.
            stored: values as they are stored.
        """
        chunk_rows = self.array.chunks[0]
        size = chunk_rows * self.dim * stored.itemsize
        used = -(-len(stored) // chunk_rows)
        index = np.full((self.rows_per_shard // chunk_rows, 2), 2**64 - 1, "<u8")  # chunks that are not there
        index[:used, 0], index[:used, 1] = np.arange(used) * size, size
        tail = index.tobytes()
        padding = np.full((used * chunk_rows - len(stored), self.dim), self.array.fill_value, stored.dtype)
        path = shard_file(self.folder, shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"0.{os.getpid()}.{shard}.partial")
        try:
            with open(temporary, "wb") as file:
                for part in (np.ascontiguousarray(stored).data, padding.data):
                    file.write(part)
                file.write(tail + google_crc32c.value(tail).to_bytes(CHECKSUM, "little"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def overflows(self, values: np.ndarray) -> np.ndarray:
        """Rows that are finite as they are but not in the stored dtype (float16 ends at 65,504).

        Shapes:
            values: (n, dim) float32. returns: (n,) bool.
        """
        if self.dtype == "float32":
            return np.zeros(len(values), bool)
        peak = np.maximum(values.max(axis=1), -values.min(axis=1))
        return (peak >= OVERFLOW[self.dtype]) & np.isfinite(peak)

    def _encode(self, values: np.ndarray) -> np.ndarray:
        """Values as they are stored."""
        if self.dtype == "bfloat16":
            return to_bfloat16(values)
        with np.errstate(over="ignore"):
            return values.astype(self.dtype, copy=False)


def _chunk_rows(rows_per_shard: int, row_bytes: int) -> int:
    """Rows of an inner chunk, what another Zarr reader reads at once: about 1 MiB, a divisor of the shard."""
    rows = min(rows_per_shard, max(1, CHUNK_BYTES // row_bytes))
    while rows_per_shard % rows:
        rows -= 1
    return rows


def shard_file(folder: Path, shard: int) -> Path:
    """File that holds one shard of the array."""
    return folder / ARRAY / "c" / str(shard) / "0"


def is_plain(array: zarr.Array) -> bool:
    """True when a shard's file is raw little-endian chunks of whole rows and an index at the end."""
    from zarr.codecs import BytesCodec, ShardingCodec

    codecs: Any = array.metadata.codecs  # type: ignore[union-attr]
    codec = codecs[0]
    return (
        len(codecs) == 1
        and isinstance(codec, ShardingCodec)
        and len(codec.codecs) == 1
        and isinstance(codec.codecs[0], BytesCodec)
        and getattr(codec.codecs[0].endian, "value", None) == "little"
        and codec.index_location.value == "end"
        and len(codec.index_codecs) == 2  # bytes and checksum
        and array.chunks[1] == array.shape[1]
    )


def write_embeddings(folder: Path, values: np.ndarray, rows_per_shard: int = 0, dtype: Dtype = "float32") -> None:
    """Write a whole in-memory table, (num_items, dim) float32, every row finite."""
    num_items, dim = values.shape
    stream_embeddings(folder, num_items, dim, lambda start, stop: values[start:stop], rows_per_shard, dtype)


def stream_embeddings(
    folder: Path,
    num_items: int,
    dim: int,
    rows: Callable[[int, int], np.ndarray],
    rows_per_shard: int = 0,
    dtype: Dtype = "float32",
) -> None:
    """Write a table of which one shard at a time is in memory.

    Shards of an earlier attempt are written again: it may have been of another training.

    Args:
        rows: (start, stop) -> rows start..stop - 1, (n, dim) float32, every row finite.
    """
    writer = EmbeddingWriter(folder, num_items, dim, rows_per_shard, dtype)
    for shard in range(writer.num_shards):
        writer.write(shard, rows(*writer.rows(shard)))
