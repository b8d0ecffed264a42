"""Reader of the raw Amazon review files of 2014, 2018 and 2023: one file in, tables of rows out.

Reads .json.gz / .jsonl.gz (or the same uncompressed) line by line, and the rating-only .csv of 2014. Every
line that cannot be used comes out as a bad row with its line number, counted from 1. Pure functions: no Ray,
no writing; deduplication and filtering are done later.
"""

from __future__ import annotations

import ast
import gzip
import json
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from genrec_dist.catalog.rows import (
    LATEST_SECOND,
    BadRow,
    RowBuffer,
    category_paths,
    clean_id,
    clean_text,
    parse_price,
)
from genrec_dist.errors import DataError

MAX_LINE = 16 << 20
"""Bytes of a line; reviews and metadata have thousands."""
MOST_EXPANSION, FREE_BYTES = 200, 64 << 20
"""A compressed file may expand to so many times its size, and so many bytes more; reviews expand about fourfold."""
GZIP_MAGIC = b"\x1f\x8b"
# source: user field, item field, timestamp fields (first present wins), timestamp units in a second
REVIEW_FIELDS: dict[str, tuple[str, str, tuple[str, ...], int]] = {
    "amazon2014": ("reviewerID", "asin", ("unixReviewTime",), 1),
    "amazon2018": ("reviewerID", "asin", ("unixReviewTime",), 1),
    "amazon2023": ("user_id", "parent_asin", ("timestamp", "sort_timestamp"), 1000),
}
# source: item field, brand field, category field
META_FIELDS: dict[str, tuple[str, str, str]] = {
    "amazon2014": ("asin", "brand", "categories"),
    "amazon2018": ("asin", "brand", "category"),
    "amazon2023": ("parent_asin", "store", "categories"),
}


def read_interactions(path: Path, source: str, file: int) -> Iterator[pa.Table]:
    """Rows of a reviews or ratings file.

    Args:
        path: .json(.gz), .jsonl(.gz) or .csv(.gz).
        source: 'amazon2014', 'amazon2018' or 'amazon2023'.
        file: number of the file, stored in every row.

    Returns:
        Tables of schema rows.INTERACTIONS; timestamp in int64 seconds, position null.
    """
    is_csv = ".csv" in path.suffixes
    if is_csv and source != "amazon2014":
        raise DataError(
            "ratings as CSV are read for 2014 only: later years have other columns in another order",
            where=path,
            got=source,
            expected="reviews as JSON lines, or catalog.source=amazon2014",
            fix="take the file of reviews, or of ratings in 2014's form: user,item,rating,timestamp in seconds",
        )
    parse = _rating if is_csv else lambda text: _review(_json_object(text), source)
    return _read(path, "interactions", file, parse)


def read_items(path: Path, source: str, file: int) -> Iterator[pa.Table]:
    """Rows of a metadata file: strict JSON lines, for 2014 also Python literals.

    Args:
        path: .json(.gz) or .jsonl(.gz).
        source: 'amazon2014', 'amazon2018' or 'amazon2023'.
        file: number of the file, stored in every row.

    Returns:
        Tables of schema rows.ITEMS.
    """
    decode = _literal_or_json if source == "amazon2014" else _json_object
    return _read(path, "items", file, lambda text: _meta(decode(text), source))


def _read(path: Path, role: str, file: int, parse: Callable[[str], dict]) -> Iterator[pa.Table]:
    buffer = RowBuffer(role, file)
    for line, raw in _lines(path):
        try:
            if isinstance(raw, BadRow):
                raise raw
            buffer.good(line, parse(_decode(raw)))
        except BadRow as problem:
            buffer.bad(line, problem)
        except RecursionError:
            buffer.bad(line, BadRow("broken_line", "nested too deeply"))
        yield from buffer.full()
    yield from buffer.rest()


def _lines(path: Path) -> Iterator[tuple[int, bytes | BadRow]]:
    """Numbered lines; a compressed stream that breaks off gives one last bad row at the line it broke in."""
    with open(path, "rb") as probe:
        compressed = probe.read(2) == GZIP_MAGIC
    most = MOST_EXPANSION * path.stat().st_size + FREE_BYTES if compressed else None
    line = read = 0
    goes_on = False
    with gzip.open(path, "rb") if compressed else open(path, "rb") as handle:
        try:
            while raw := handle.readline(MAX_LINE):
                read += len(raw)
                if most is not None and read > most:
                    raise _expands(path, read)
                skipped, goes_on = goes_on, len(raw) == MAX_LINE and not raw.endswith(b"\n")
                if not skipped:
                    line += 1
                    yield line, BadRow("line_too_long", f"more than {MAX_LINE:,} bytes") if goes_on else raw
        except EOFError as error:
            yield line + 1, BadRow("truncated_gzip", str(error))
        except (gzip.BadGzipFile, zlib.error) as error:
            yield line + 1, BadRow("broken_gzip", str(error))


def _expands(path: Path, read: int) -> DataError:
    return DataError(
        "a compressed file expands to far more than reviews do",
        where=path,
        got=f"{read:,} bytes of {path.stat().st_size:,} compressed ones, and no end",
        expected=f"at most {MOST_EXPANSION} times its size",
        fix="look at the file; if it is what you want, decompress it first",
    )


def _decode(raw: bytes) -> str:
    try:
        text = raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadRow("non_utf8", f"byte {error.start}: {error.reason}") from None
    if not text:
        raise BadRow("broken_line", "empty line")
    return text


def _object(value: Any) -> dict:
    if not isinstance(value, dict):
        raise BadRow("broken_line", f"not an object but {type(value).__name__}")
    return value


def _json_object(text: str) -> dict:
    try:
        return _object(json.loads(text))
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
        raise BadRow("broken_line", f"not JSON: {error}") from None


def _literal_or_json(text: str) -> dict:
    """A 2014 metadata line: a Python literal as a rule, strict JSON in some repackaged copies."""
    if not text.startswith("{'"):
        try:
            return _object(json.loads(text))
        except (ValueError, RecursionError):
            pass  # a literal may also begin with a double quote
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # unknown escapes such as "\d" inside descriptions
            return _object(ast.literal_eval(text))
    except BadRow:
        raise
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        what = error.msg if isinstance(error, SyntaxError) else type(error).__name__
        raise BadRow("broken_line", f"neither a Python literal nor JSON: {what}") from None


def _review(record: dict, source: str) -> dict:
    user, item, stamps, units = REVIEW_FIELDS[source]
    stamp = next((record[name] for name in stamps if record.get(name) is not None), None)
    return {
        "user_id": clean_id(record.get(user), user),
        "item_id": clean_id(record.get(item), item),
        "timestamp": _seconds(stamp, stamps[0], units),
    }


def _rating(text: str) -> dict:
    fields = text.split(",")
    if len(fields) != 4:
        raise BadRow("broken_line", f"{len(fields)} fields, expected user,item,rating,timestamp")
    user, item, _, stamp = fields
    return {
        "user_id": clean_id(user, "user"),
        "item_id": clean_id(item, "item"),
        "timestamp": _seconds(stamp.strip() or None, "timestamp", 1),
    }


def _seconds(value: Any, field: str, units: int) -> int:
    if value is None:
        raise BadRow("missing_field", field)
    try:
        seconds = None if isinstance(value, bool) else int(value) // units
    except (ValueError, TypeError, OverflowError):
        seconds = None
    if seconds is None or not 0 <= seconds < LATEST_SECOND:
        raise BadRow("bad_timestamp", f"{field}: {value!r}")
    return seconds


def _meta(record: dict, source: str) -> dict:
    item, brand, categories = META_FIELDS[source]
    return {
        "item_id": clean_id(record.get(item), item),
        "title": clean_text(record.get("title")),
        "brand": clean_text(record.get(brand)),
        "categories": category_paths(record.get(categories), flat_is_path=True),
        "description": clean_text(record.get("description")),
        "price": parse_price(record.get("price")),
    }
