"""Embeddings to and from other formats: `.npy`, `.parquet`, `.safetensors`. Nothing here holds a whole table in memory.

`.npy` and `.safetensors` (tensor `embeddings`) are bare tables, row = item index, an item without an embedding is a
row of NaN. `.parquet` has the columns item_index, item_id and embedding, null where there is none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genrec_dist.artifacts.embeddings import (
    Dtype,
    EmbeddingWriter,
    bytes_per_value,
    from_bfloat16,
    space_checked,
    to_bfloat16,
)
from genrec_dist.artifacts.ledger import Ledger
from genrec_dist.artifacts.reader import EmbeddingStore
from genrec_dist.errors import ConfigError, DataError

FORMATS = (".npy", ".parquet", ".safetensors")
TENSOR = "embeddings"
SAFE_DTYPES: dict[Dtype, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
READ_ROWS = 4096


def check_format(path: Path) -> str:
    """The file's ending.

    Raises:
        ConfigError: not one of `FORMATS`.
    """
    if path.suffix not in FORMATS:
        raise ConfigError("unknown embedding format", where=path, got=path.suffix or "no ending", expected=FORMATS)
    return path.suffix


def export_embeddings(store: EmbeddingStore, path: Path) -> None:
    """Write the table of a store to a file; `path` holds either its old content or all of the new one.

    Args:
        store: finished embeddings.
        path: file whose ending says the format. Parquet needs `ids.parquet` beside the array for item ids, else
            they are left out. `.npy` has no bfloat16: such a store is written as float32.

    Raises:
        ConfigError: unknown ending.
        ClusterError: the disk is full.
    """
    write = {".npy": _write_npy, ".parquet": _write_parquet, ".safetensors": _write_safetensors}[check_format(path)]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        with space_checked(path):
            write(store, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _tables(store: EmbeddingStore) -> Iterator[tuple[int, np.ndarray]]:
    """First row and values of every shard, NaN where there is no embedding."""
    for shard in range(store.num_shards):
        start = shard * store.rows_per_shard
        rows = min(store.rows_per_shard, store.num_items - start)
        table = np.full((rows, store.dim), np.nan, np.float32)
        index, values = store.shard(shard)
        table[index - start] = values
        yield start, table


def _write_npy(store: EmbeddingStore, path: Path) -> None:
    dtype = "<f4" if store.dtype == "bfloat16" else np.dtype(store.dtype).str
    out = np.lib.format.open_memmap(path, "w+", dtype, (store.num_items, store.dim))
    for start, table in _tables(store):
        out[start : start + len(table)] = table
    out.flush()


def _write_safetensors(store: EmbeddingStore, path: Path) -> None:
    size = store.num_items * store.dim * bytes_per_value(store.dtype)
    tensor = {"dtype": SAFE_DTYPES[store.dtype], "shape": [store.num_items, store.dim], "data_offsets": [0, size]}
    header = json.dumps({TENSOR: tensor}).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        for _, table in _tables(store):
            stored = to_bfloat16(table) if store.dtype == "bfloat16" else table.astype(store.dtype, copy=False)
            out.write(np.ascontiguousarray(stored).data)


def _write_parquet(store: EmbeddingStore, path: Path) -> None:
    kind = pa.float16() if store.dtype == "float16" else pa.float32()
    fields = [("item_index", pa.int32()), ("embedding", pa.list_(kind, store.dim))]
    ids = store.folder / "ids.parquet"
    known = pq.read_table(ids, columns=["item_id"])["item_id"] if ids.exists() else None
    if known is not None:
        fields.insert(1, ("item_id", pa.string()))
    with pq.ParquetWriter(path, pa.schema(fields)) as out:
        for start, table in _tables(store):
            missing = np.isnan(table).all(axis=1)
            flat = pa.array(table.ravel().astype(kind.to_pandas_dtype(), copy=False), kind)
            lists = pa.FixedSizeListArray.from_arrays(flat, store.dim, mask=pa.array(missing))
            columns: list[Any] = [pa.array(np.arange(start, start + len(table), dtype=np.int32)), lists]
            if known is not None:
                columns.insert(1, known.slice(start, len(table)).combine_chunks())
            out.write_table(pa.table(columns, schema=out.schema))


def import_embeddings(
    path: Path,
    folder: Path,
    item_ids: pa.ChunkedArray | None = None,
    *,
    dtype: Dtype = "float32",
    rows_per_shard: int = 0,
    normalize: bool = False,
) -> Ledger:
    """Write embeddings of a file as an array with its records, ids and ledger.

    Args:
        path: `.npy`, `.safetensors` or `.parquet`. Parquet needs the column embedding, and item_id (or item_index).
        folder: where embeddings.zarr goes; it holds no other artifact.
        item_ids: ids of the items in the order of their index; rows of a Parquet file are found by id, ids that are
            not in the list are counted and left out. None takes the file's own rows and order.
        dtype: of the stored values.
        rows_per_shard: 0 chooses from width and dtype.
        normalize: scale rows to unit length.

    Returns:
        The ledger, also written to the folder: items without a vector in the file are listed there.

    Raises:
        ConfigError: unknown ending.
        DataError: not a table of floats, another number of rows than items, an id twice.
    """
    ledger = Ledger()
    folder.mkdir(parents=True, exist_ok=True)
    with _opened(path, folder / ".import", item_ids, ledger) as (table, names):
        writer = EmbeddingWriter(folder, len(table), table.shape[1], rows_per_shard, dtype)
        for shard in range(writer.num_shards):
            start, end = writer.rows(shard)
            values = np.array(table[start:end])
            values = from_bfloat16(values) if values.dtype == np.uint16 else values.astype(np.float32)
            if normalize:
                values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
            reasons = np.where(np.isnan(values).all(axis=1), "no_vector", "non_finite_embedding")
            reasons[writer.overflows(values)] = f"overflows_{dtype}"
            values[reasons == f"overflows_{dtype}"] = np.nan
            bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
            failed = [{"row": start + int(row), "reason": str(reasons[row]), "detail": path.name} for row in bad]
            writer.write(shard, values, failed)
            for row in bad:
                ledger.add(path.name, start + int(row) + 1, str(reasons[row]), "failed")
    index = pa.array(np.arange(writer.num_items, dtype=np.int32))
    columns = {"item_index": index} | ({} if names is None else {"item_id": names})
    pq.write_table(pa.table(columns), folder / "ids.parquet")
    ledger.write(folder)
    return ledger


@contextmanager
def _opened(path: Path, scratch: Path, item_ids: pa.ChunkedArray | None, ledger: Ledger) -> Iterator[tuple]:
    """The file as an array on disk, rows in the order of items (float, or uint16 for bfloat16), and the item ids."""
    if not path.is_file():
        raise DataError("no such embedding file", where=path, fix="check the path")
    if check_format(path) == ".parquet":
        try:
            yield _scatter_parquet(path, scratch, item_ids, ledger)
        finally:
            scratch.unlink(missing_ok=True)
        return
    table = _map_npy(path) if path.suffix == ".npy" else _map_safetensors(path)
    if item_ids is not None and len(table) != len(item_ids):
        raise DataError(
            "file has another number of rows than there are items",
            where=path,
            got=len(table),
            expected=len(item_ids),
            fix="give a Parquet file with the column item_id: its rows are found by id",
        )
    yield table, item_ids


def _map_npy(path: Path) -> np.ndarray:
    try:
        return _check_table(np.load(path, mmap_mode="r", allow_pickle=False), path)
    except ValueError as error:
        raise DataError("not a .npy file", where=path, got=str(error)) from None


def _map_safetensors(path: Path) -> np.ndarray:
    try:
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if length > 100 << 20:
                raise ValueError(f"header of {length} bytes")
            header = json.loads(handle.read(length))
        names = [name for name in header if name != "__metadata__"]
        tensor = header[TENSOR if TENSOR in names or len(names) != 1 else names[0]]
        kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}[tensor["dtype"]]
        first, last = tensor["data_offsets"]
        shape = tuple(tensor["shape"])
        if last - first != int(np.prod(shape)) * np.dtype(kind).itemsize:
            raise ValueError(f"{last - first} bytes for shape {shape}")
        table = np.memmap(path, kind, "r", 8 + length + first, shape)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            "not a safetensors file with one table of floats",
            where=path,
            got=f"{type(error).__name__}: {error}",
            expected=f"tensor {TENSOR!r}, or a single tensor",
        ) from None
    return _check_table(table, path, bits=kind == "<u2")


def _check_table(table: np.ndarray, path: Path, bits: bool = False) -> np.ndarray:
    if table.ndim != 2 or 0 in table.shape or not (bits or table.dtype.kind == "f"):
        raise DataError(
            "not a table of floats",
            where=path,
            got=f"shape {table.shape}, {table.dtype}",
            expected="(items, dim) float",
        )
    return table


def _scatter_parquet(path: Path, scratch: Path, item_ids: pa.ChunkedArray | None, ledger: Ledger) -> tuple:
    """Rows of a Parquet file written to their item's place in a file on disk, NaN where an item has none."""
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise DataError("not a Parquet file", where=path, got=error) from None
    columns = set(file.schema_arrow.names)
    key = "item_id" if "item_id" in columns else "item_index"
    if "embedding" not in columns or (item_ids is not None and key != "item_id"):
        raise DataError("column missing", where=path, got=sorted(columns), expected="embedding and item_id")
    names, place = item_ids, None
    if item_ids is None and key == "item_id":
        names = pq.read_table(path, columns=["item_id"])["item_id"]
    if item_ids is not None:
        place = {name: row for row, name in enumerate(item_ids.to_pylist())}
    num_items = file.metadata.num_rows if item_ids is None else len(item_ids)
    out: np.ndarray | None = None
    seen, row = np.zeros(num_items, bool), 0
    for batch in file.iter_batches(READ_ROWS, columns=[c for c in ("embedding", "item_id") if c in columns]):
        values = _rows_of_lists(batch["embedding"], path)
        if place is None:
            target = np.arange(row, row + len(values))
        else:
            target = np.array([place.get(name, -1) for name in batch["item_id"].to_pylist()], np.int64)
            for unknown in np.flatnonzero(target < 0):
                ledger.add(path.name, row + int(unknown) + 1, "unknown_item", "ignored")
        row += len(values)
        known = target >= 0
        if seen[target[known]].any() or len(np.unique(target[known])) < known.sum():
            raise DataError("an item id stands twice", where=path, got=f"rows up to {row}", expected="each id once")
        seen[target[known]] = True
        if values.shape[1]:
            if out is None:
                out = np.memmap(scratch, np.float32, "w+", shape=(num_items, values.shape[1]))
                for first in range(0, num_items, READ_ROWS):
                    out[first : first + READ_ROWS] = np.nan
            elif out.shape[1] != values.shape[1]:
                raise DataError("rows of different width", where=path, got=values.shape[1], expected=out.shape[1])
            out[target[known]] = values[known]
    if out is None:
        raise DataError("no embedding in the file", where=path)
    return out, names


def _rows_of_lists(column: pa.Array, path: Path) -> np.ndarray:
    """A list column as (n, dim) float32, NaN where the list is null; (n, 0) when all are."""
    missing = column.is_null().to_numpy(zero_copy_only=False)
    present = column.drop_null()
    flat = present.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    if not len(present):
        return np.empty((len(column), 0), np.float32)
    dim, rest = divmod(len(flat), len(present))
    widths = {len(value) for value in present} if not pa.types.is_fixed_size_list(column.type) else {dim}
    if rest or widths != {dim}:
        raise DataError("rows of different width", where=path, got=sorted(widths)[:5], expected="one width")
    table = np.full((len(column), dim), np.nan, np.float32)
    table[~missing] = flat.reshape(-1, dim)
    return table
