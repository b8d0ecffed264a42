"""Item text: a template filled from an item's metadata, missing fields left out, bad bytes and characters mended.

A template is a row of segments separated by '; ', each with at most a few placeholders:
`title: {title}; brand: {brand}`. A segment with a placeholder whose field is missing is left out whole.
Text does not depend on anything but the item's own row.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import lru_cache
from string import Formatter
from typing import Any

import pyarrow as pa

from genrec_dist.errors import ConfigError

FIELDS = ("title", "brand", "categories", "description")
SEPARATOR = "; "
UNKNOWN_TEXT = "unknown item"
"""What is embedded for an item without any text: an empty text has no meaning to an encoder."""
CONTROL = dict.fromkeys((*range(32), *range(127, 160)), " ")

Segment = tuple[tuple[str, str | None], ...]


@lru_cache(maxsize=16)
def parse_template(template: str) -> tuple[Segment, ...]:
    """Split a template into segments of (literal text, field or None) pairs.

    Raises:
        ConfigError: unbalanced brace, unknown placeholder, a conversion or format, or no placeholder at all.
    """
    try:
        segments = tuple(_parse_segment(part) for part in template.split(SEPARATOR))
    except ValueError as error:  # from string.Formatter: unbalanced braces
        raise _bad_template(f"{error} in {template!r}") from None
    if not any(field for segment in segments for _, field in segment):
        raise _bad_template(f"no placeholder in {template!r}")
    return segments


def _parse_segment(part: str) -> Segment:
    pieces = []
    for literal, field, spec, conversion in Formatter().parse(part):
        if field is not None and field not in FIELDS:
            near = difflib.get_close_matches(field, FIELDS, 1)
            raise _bad_template(f"{{{field}}}" + (f"; nearest: {{{near[0]}}}" if near else ""))
        if spec or conversion:
            raise _bad_template(f"{{{field}}} with a conversion or format")
        pieces.append((literal, field))
    return tuple(pieces)


def _bad_template(got: str) -> ConfigError:
    return ConfigError(
        "item text template is not valid",
        where="semantic.template",
        got=got,
        expected="segments separated by '; ' with " + ", ".join(f"{{{field}}}" for field in FIELDS),
        fix="correct the placeholder; a literal brace is written {{ or }}",
    )


def item_text(
    template: str,
    title: str | None,
    brand: str | None,
    categories: Sequence[str | None] | None,
    description: str | None,
) -> str:
    """Fill the template; the empty string when every field it names is missing.

    Args:
        template: see the module's docstring.
        title: product title; None or blank counts as missing, as for brand and description.
        brand: brand name.
        categories: category paths 'A > B > C'; joined by ', '.
        description: product description.

    Raises:
        ConfigError: the template is not valid.
    """
    paths = [_clean(path) for path in categories or []]
    values = {
        "title": _clean(title),
        "brand": _clean(brand),
        "categories": ", ".join(path for path in paths if path),
        "description": _clean(description),
    }
    filled, found = [], False
    for segment in parse_template(template):
        fields = [field for _, field in segment if field]
        if all(values[field] for field in fields):
            filled.append("".join(literal + (values[field] if field else "") for literal, field in segment))
            found = found or bool(fields)
    return SEPARATOR.join(filled) if found else ""


def _clean(value: str | None) -> str:
    """One line: control characters and runs of white space become one space."""
    return " ".join(value.translate(CONTROL).split()) if value else ""


def item_texts(items: pa.Table, template: str) -> tuple[list[str], list[tuple[int, str, str]]]:
    """Text of every item of a table, and what had to be mended.

    Args:
        items: the columns of `FIELDS`; strings need not be valid UTF-8, as Parquet does not check them.
        template: see the module's docstring.

    Returns:
        Texts, never empty, and (row, reason, detail) of items whose text is not what the metadata say:
        'empty_text' and 'invalid_utf8'.
    """
    columns = [_decoded(items[name]) for name in FIELDS]
    texts, notes = [], []
    for row, fields in enumerate(zip(*columns)):
        values, broken = zip(*fields)
        text = item_text(template, *values)
        if any(broken):
            notes.append((row, "invalid_utf8", "embedded with the replacement character"))
        if not text:
            notes.append((row, "empty_text", f"embedded as {UNKNOWN_TEXT!r}"))
        texts.append(text or UNKNOWN_TEXT)
    return texts, notes


def _decoded(column: pa.ChunkedArray) -> list[tuple[Any, bool]]:
    """Values of a column of strings, or of lists of strings, each with True where bytes had to be replaced."""
    if pa.types.is_list(column.type):
        return [_decode_list(value) for value in column.cast(pa.list_(pa.binary())).to_pylist()]
    return [_decode(value) for value in column.cast(pa.binary()).to_pylist()]


def _decode(value: bytes | None) -> tuple[str | None, bool]:
    try:
        return value if value is None else value.decode("utf-8"), False
    except UnicodeDecodeError:
        return value.decode("utf-8", "replace"), True  # type: ignore[union-attr]


def _decode_list(value: list[bytes | None] | None) -> tuple[list[str | None] | None, bool]:
    pairs = [_decode(part) for part in value or []]
    return [text for text, _ in pairs], any(broken for _, broken in pairs)
