"""What a report page is made of, and how its numbers are written. The template draws these; nothing here reads data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from markupsafe import Markup

NONE = "–"


@dataclass
class Cell:
    """One table cell: a text, and a smaller line under it."""

    text: str
    note: str = ""
    strong: bool = False


@dataclass
class Table:
    """A table; the first column is left-aligned text, the others are right-aligned unless `text_columns` has them."""

    kind: ClassVar[str] = "table"
    head: list[str]
    rows: Sequence[Sequence[Cell | str]]
    caption: str = ""
    text_columns: set[int] = field(default_factory=lambda: {0})
    strong_rows: set[int] = field(default_factory=set)
    faint_rows: set[int] = field(default_factory=set)


@dataclass
class Figure:
    """An inline SVG with its caption."""

    kind: ClassVar[str] = "figure"
    svg: Markup
    caption: str = ""


@dataclass
class Text:
    """A paragraph; `note` sets it apart as a remark."""

    kind: ClassVar[str] = "text"
    text: str
    note: bool = False


@dataclass
class Details:
    """Something long behind a line to click: a table, or text as it stands."""

    kind: ClassVar[str] = "details"
    summary: str
    text: str = ""
    table: Table | None = None


Block = Table | Figure | Text | Details


@dataclass
class Tile:
    """One large number."""

    label: str
    value: str
    note: str = ""


@dataclass
class Section:
    """A titled part of the page."""

    id: str
    title: str
    blocks: Sequence[Block]


def number(value: Any, digits: int = 4) -> str:
    """A metric with fixed digits, or a dash."""
    return NONE if value is None else f"{value:.{digits}f}"


def percent(value: Any, digits: int = 1) -> str:
    """A share as a percentage, or a dash."""
    return NONE if value is None else f"{100 * value:.{digits}f}%"


def interval(bounds: Any, digits: int = 4) -> str:
    """A 95% interval, or nothing."""
    return f"{bounds[0]:.{digits}f}–{bounds[1]:.{digits}f}" if bounds else ""


def seconds(value: Any) -> str:
    """A duration in the unit that reads best."""
    if value is None:
        return NONE
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def plain(value: Any) -> str:
    """Any JSON value as a reader wants it: grouped integers, four significant digits, joined lists."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value == round(value) and abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list):
        shown = ", ".join(plain(v) for v in value[:12])
        return shown + (f", … ({len(value)} in all)" if len(value) > 12 else "")
    return str(value)


def flatten(value: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested mapping with their paths."""
    for key, inner in value.items():
        path = f"{prefix} › {key}" if prefix else str(key)
        if isinstance(inner, dict):
            yield from flatten(inner, path)
        else:
            yield path.replace("_", " "), inner


def pairs(value: dict, text: bool = False) -> Table:
    """A nested mapping as a two-column table; `text` aligns the values to the left."""
    rows = [[name, plain(leaf)] for name, leaf in flatten(value)]
    return Table(["", ""], rows, text_columns={0, 1} if text else {0})
