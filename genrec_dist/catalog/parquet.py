"""Reader of a Parquet pair (interactions and items): one file in, tables of rows out.

user_id and item_id may be of any type and become strings; a row needs a timestamp or a position; all other
columns are optional. Rows that cannot be used come out as bad rows with their row number, counted from 1.
Pure functions: no Ray, no writing; deduplication and filtering are done later.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from genrec_dist.catalog.rows import (
    INTERACTIONS,
    LATEST_SECOND,
    ROWS_PER_BATCH,
    BadRow,
    RowBuffer,
    category_paths,
    clean_id,
    clean_text,
    parse_price,
)
from genrec_dist.errors import DataError

ITEM_COLUMNS = ("item_id", "title", "brand", "categories", "description", "price")


def read_interactions(path: Path, source: str, file: int) -> Iterator[pa.Table]:
    """Rows of an interactions file.

    Args:
        path: Parquet file with user_id, item_id, and timestamp or position or both.
        source: 'parquet'.
        file: number of the file, stored in every row.

    Returns:
        Tables of schema rows.INTERACTIONS. A timestamp is int64 seconds: numbers are taken as seconds,
        Arrow timestamps and dates are converted.

    Raises:
        DataError: not Parquet, or needed columns are absent.
    """
    for first, batch in _batches(path, ("user_id", "item_id"), ("timestamp", "position")):
        names = batch.schema.names
        if "timestamp" not in names and "position" not in names:
            raise DataError("no order in the interactions", where=path, expected="column timestamp or position")
        yield _interaction_rows(batch, first, file)


def read_items(path: Path, source: str, file: int) -> Iterator[pa.Table]:
    """Rows of an items file.

    Args:
        path: Parquet file with item_id; title, brand, categories, description, price are optional.
        source: 'parquet'.
        file: number of the file, stored in every row.

    Returns:
        Tables of schema rows.ITEMS.

    Raises:
        DataError: not Parquet, or no item_id.
    """
    for first, batch in _batches(path, ("item_id",), ITEM_COLUMNS[1:]):
        buffer = RowBuffer("items", file)
        ids, not_utf8 = _strings(batch["item_id"])
        columns = {name: batch[name] for name in batch.schema.names if name != "item_id"}
        for name, column in columns.items():
            text, broken = _strings(column) if _is_text(column.type) else (column, np.zeros(len(batch), bool))
            columns[name], not_utf8 = text, not_utf8 | broken
        values = {name: column.to_pylist() for name, column in columns.items()}
        for row, item in enumerate(ids.to_pylist()):
            try:
                if not_utf8[row]:
                    raise BadRow("non_utf8")
                record = {name: column[row] for name, column in values.items()}
                buffer.good(
                    first + row,
                    {
                        "item_id": clean_id(item, "item_id"),
                        "title": clean_text(record.get("title")),
                        "brand": clean_text(record.get("brand")),
                        "categories": category_paths(record.get("categories"), flat_is_path=False),
                        "description": clean_text(record.get("description")),
                        "price": parse_price(record.get("price")),
                    },
                )
            except BadRow as problem:
                buffer.bad(first + row, problem)
        yield from buffer.rest()


def _batches(path: Path, needed: tuple, optional: tuple) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(number of the first row, record batch) with the known columns of a file."""
    try:
        with pq.ParquetFile(path) as source:
            names = source.schema_arrow.names
            missing = [name for name in needed if name not in names]
            if missing:
                raise DataError("columns are absent", where=path, got=names, expected=missing, fix="rename the columns")
            first = 1
            wanted = [name for name in (*needed, *optional) if name in names]
            for batch in source.iter_batches(ROWS_PER_BATCH, columns=wanted):
                yield first, batch
                first += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            "not a readable Parquet file", where=path, got=error, fix="copy or download it again"
        ) from error


def _interaction_rows(batch: pa.RecordBatch, first: int, file: int) -> pa.Table:
    rows = len(batch)
    users, bad_users = _strings(batch["user_id"])
    items, bad_items = _strings(batch["item_id"])
    nothing = pa.nulls(rows, pa.int64())
    stamps, bad_stamps = _whole(batch["timestamp"]) if "timestamp" in batch.schema.names else (nothing, False)
    positions, bad_positions = _whole(batch["position"]) if "position" in batch.schema.names else (nothing, False)
    late = _mask(pc.or_(pc.greater_equal(stamps, LATEST_SECOND), pc.less(stamps, -LATEST_SECOND)))
    no_user, no_item = _empty(users), _empty(items)
    no_order = _mask(pc.is_null(stamps)) & _mask(pc.is_null(positions))
    problems = [  # the first that holds is the one in the ledger
        (bad_users | bad_items, "non_utf8", ""),
        (no_user, "missing_field", "user_id"),
        (no_item, "missing_field", "item_id"),
        (bad_stamps | late, "bad_timestamp", "not a date in seconds before the year 2100"),
        (bad_positions, "bad_position", "not a whole number"),
        (no_order, "missing_field", "timestamp and position"),
    ]
    conditions = [np.broadcast_to(holds, rows) for holds, _, _ in problems]
    choice = np.select(conditions, range(1, len(problems) + 1), 0)
    reasons = pa.array([None, *(reason for _, reason, _ in problems)]).take(pa.array(choice))
    details = pa.array([None, *(detail for _, _, detail in problems)]).take(pa.array(choice))
    good = pa.array(choice == 0)
    data = [pc.if_else(good, column, pa.scalar(None, column.type)) for column in (users, items, stamps, positions)]
    places = [pa.repeat(pa.scalar(file, pa.int32()), rows), pa.array(np.arange(first, first + rows))]
    return pa.Table.from_arrays([*places, reasons, details, *data], schema=INTERACTIONS)


def _mask(values: pa.Array) -> np.ndarray:
    return pc.fill_null(values, False).to_numpy(zero_copy_only=False)


def _empty(strings: pa.Array) -> np.ndarray:
    return pc.fill_null(pc.equal(strings, ""), True).to_numpy(zero_copy_only=False)


def _is_text(kind: pa.DataType) -> bool:
    return any(
        check(kind)
        for check in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_dictionary,
        )
    )


def _strings(column: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """(values as trimmed strings, mask of values that are not UTF-8); the latter are null."""
    kind = column.type
    none = np.zeros(len(column), dtype=bool)
    if pa.types.is_dictionary(kind):
        return _strings(column.dictionary_decode())
    if pa.types.is_floating(kind):  # whole numbers that met a null on their way through pandas
        values = pc.if_else(pc.is_finite(column), column, pa.scalar(None, kind))
        whole = _mask(pc.equal(pc.floor(values), values)) | _mask(pc.is_null(values))
        return (values.cast(pa.int64()) if whole.all() else values).cast(pa.string()), none
    if _is_text(kind):
        raw = column.cast(pa.large_binary() if "large" in str(kind) else pa.binary())
        try:
            return pc.utf8_trim_whitespace(_as_string(raw)), none
        except pa.ArrowInvalid:
            broken = np.array([not _is_utf8(value) for value in raw.to_pylist()])
            kept = pc.if_else(pa.array(~broken), raw, pa.scalar(None, raw.type))
            return pc.utf8_trim_whitespace(_as_string(kept)), broken
    if pa.types.is_nested(kind):
        raise DataError("an id cannot be a list or a struct", got=str(kind), expected="a number or a string")
    try:
        return column.cast(pa.string()), none
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return pa.array([None if v is None else str(v) for v in column.to_pylist()], pa.string()), none


def _as_string(raw: pa.Array) -> pa.Array:
    return raw.cast(pa.string())  # checks UTF-8 on the way


def _is_utf8(value: bytes | None) -> bool:
    try:
        (value or b"").decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _whole(column: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """(values as int64, dates as seconds; mask of values that are no number); the latter are null."""
    kind = column.type
    none = np.zeros(len(column), dtype=bool)
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return column.cast(pa.timestamp("s"), safe=False).cast(pa.int64()), none
    if _is_text(kind):
        text, broken = _strings(column)
        number = pc.match_substring_regex(text, r"^-?\d{1,18}$")
        values = pc.if_else(pc.fill_null(number, False), text, pa.scalar(None, text.type)).cast(pa.int64())
        return values, broken | ~_mask(pc.fill_null(number, True))
    if pa.types.is_floating(kind):
        values = pc.if_else(pc.is_nan(column), pa.scalar(None, kind), column)
        broken = _mask(pc.greater_equal(pc.abs(values), 2.0**62))  # infinities too
        values = pc.floor(pc.if_else(pa.array(broken), pa.scalar(None, kind), values))
        return values.cast(pa.int64()), broken
    try:
        return column.cast(pa.int64()), none
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise DataError("timestamp or position is not a number", got=str(kind), expected="numbers or dates") from error
