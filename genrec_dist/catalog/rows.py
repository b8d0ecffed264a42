"""What one input file becomes: tables of rows, good and bad, each with its file number and line.

A row is good (`reason` null) or goes to the ledger (`reason` set, the data columns null). Both kinds travel in
one table, so nothing can get lost between reader and ledger. Also: cleaning of text, categories and prices,
shared by the readers. Reads and writes no files.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

PLACE = [("file", pa.int32()), ("line", pa.int64()), ("reason", pa.string()), ("detail", pa.string())]
INTERACTIONS = pa.schema(
    [
        *PLACE,
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("timestamp", pa.int64()),
        ("position", pa.int64()),
    ]
)
ITEMS = pa.schema(
    [
        *PLACE,
        ("item_id", pa.string()),
        ("title", pa.string()),
        ("brand", pa.string()),
        ("categories", pa.list_(pa.string())),
        ("description", pa.string()),
        ("price", pa.float64()),
    ]
)
SCHEMAS = {"interactions": INTERACTIONS, "items": ITEMS}
ROWS_PER_BATCH = 50_000
LATEST_SECOND = 4_102_444_800  # the year 2100: anything later is a wrong unit, not a date
_PRICE = re.compile(r"^\$?\s*(\d[\d,]*(?:\.\d+)?)(?:\s*-\s*\$?\s*\d[\d,]*(?:\.\d+)?)?$")


class BadRow(ValueError):
    """A row that cannot be used.

    Args:
        reason: ledger reason, one word.
        detail: what exactly, for the reader of the ledger.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail[:200]


class RowBuffer:
    """Collects rows of one file and turns them into tables of a fixed schema.

    Args:
        role: 'interactions' or 'items'.
        file: number of the input file.
    """

    def __init__(self, role: str, file: int) -> None:
        self.schema, self.file = SCHEMAS[role], file
        self.rows: list[dict[str, Any]] = []

    def good(self, line: int, values: dict[str, Any]) -> None:
        """Keep a usable row."""
        self.rows.append({"file": self.file, "line": line, **values})

    def bad(self, line: int, problem: BadRow) -> None:
        """Keep the place and the reason of an unusable row."""
        self.rows.append({"file": self.file, "line": line, "reason": problem.reason, "detail": problem.detail})

    def full(self) -> Iterator[pa.Table]:
        """The next table, once enough rows are there."""
        if len(self.rows) >= ROWS_PER_BATCH:
            yield from self.rest()

    def rest(self) -> Iterator[pa.Table]:
        """The rows not yet given out, if any."""
        if self.rows:
            table = pa.Table.from_pylist(self.rows, schema=self.schema)
            self.rows = []
            yield table


def clean_text(value: Any) -> str | None:
    """Text with HTML entities unescaped and whitespace collapsed; a list is joined; None when empty."""
    if isinstance(value, (list, tuple)):
        value = " ".join(str(part) for part in value if part is not None)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    text = " ".join(html.unescape(str(value)).split())
    return text.encode("utf-8", "replace").decode("utf-8") or None


def clean_id(value: Any, field: str) -> str:
    """An id as a string.

    Raises:
        BadRow: missing, empty, or not representable as UTF-8.
    """
    if value is None or isinstance(value, (list, dict, bool)):
        raise BadRow("missing_field", field)
    text = str(value).strip()
    if not text:
        raise BadRow("missing_field", field)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("non_utf8", field) from None
    return text


def category_paths(value: Any, flat_is_path: bool) -> list[str]:
    """Category paths 'A > B > C'.

    Args:
        value: a string, a list of strings or a list of lists of strings.
        flat_is_path: a flat list is the steps of one path; otherwise each of its strings is a whole path.
    """
    if not isinstance(value, (list, tuple)):
        value = [] if value is None else [value]
    nested = any(isinstance(part, (list, tuple)) for part in value)
    paths = [value] if flat_is_path and not nested else [p if isinstance(p, (list, tuple)) else [p] for p in value]
    joined = (" > ".join(step for step in map(clean_text, path) if step) for path in paths)
    return list(dict.fromkeys(path for path in joined if path))


def parse_price(value: Any) -> float | None:
    """A price as a number; '$1,299.00' is read, of '$5.00 - $9.00' the lower end; None when it is neither."""
    if isinstance(value, str):
        match = _PRICE.match(value.strip())
        value = float(match[1].replace(",", "")) if match else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None
