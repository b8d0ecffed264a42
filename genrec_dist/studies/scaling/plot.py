"""Interactive figures as Plotly specifications in plain dictionaries: theme, colours, number formats, rows of numbers.

The page gives colours of text and grid at drawing time (`INK`, `SOFT`, `LINE` are CSS variables), so that a figure
follows the light or dark setting. Knows nothing of trials.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, ClassVar

import numpy as np
from markupsafe import Markup

from genrec_dist.studies.plots import COLOURS

INK, SOFT, LINE = "var(--ink)", "var(--soft)", "var(--line)"
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon")
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
LABEL_PIXELS = 15
GLYPHS = "●■◆▲✚✖★⬟"
Row = dict[str, Any]


@dataclass
class Panel:
    """One drawing area.

    Args:
        title: above it.
        traces: Plotly traces.
        layout: Plotly layout, on top of the theme.
        height: CSS pixels.
    """

    title: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int = 350

    @property
    def spec(self) -> Markup:
        """JSON for a script element."""
        theme = {
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", "size": 12, "color": INK},
            "margin": {"l": 58, "r": 16, "t": 26, "b": 46},
            "showlegend": False,
            "hovermode": "closest",
            "hoverlabel": {"align": "left"},
            "dragmode": "zoom",
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": SOFT, "activecolor": INK},
        }
        text = json.dumps({"data": self.traces, "layout": theme | self.layout}, allow_nan=False)
        return Markup(text.replace("<", "\\u003c").replace("&", "\\u0026"))


@dataclass
class Plot:
    """A figure of one or more panels; its numbers lie in figures/ID.csv and .json beside the page."""

    kind: ClassVar[str] = "plot"
    id: str
    panels: Sequence[Panel]
    caption: str
    rows: Sequence[Row]
    legend: Sequence[tuple[str, str, str]] = ()
    small: bool = False

    def csv(self) -> str:
        """Rows under the union of their columns, numbers in full."""
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return text.getvalue()

    def as_dict(self) -> dict[str, Any]:
        """The same rows for a program."""
        return {"figure": self.id, "panels": [p.title for p in self.panels], "caption": self.caption, "rows": self.rows}


def colour(index: int) -> str:
    """Of an arm."""
    return COLOURS[index % len(COLOURS)]


def swatches(arms: Sequence[str]) -> list[tuple[str, str, str]]:
    """(sign, name, colour) of each arm for a line above a figure; nothing where there is one arm."""
    named = [(GLYPHS[i % len(GLYPHS)], arm, colour(i)) for i, arm in enumerate(arms)]
    return named if len(arms) > 1 else []


def shade(hex_colour: str, opacity: float) -> str:
    """The colour, translucent."""
    red, green, blue = (int(hex_colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def dots(x, y, index: int, name: str, hover: Sequence[str], **more: Any) -> dict[str, Any]:
    """Points of an arm, told apart by colour and by shape."""
    marker = {
        "color": colour(index), "symbol": SYMBOLS[index % len(SYMBOLS)], "size": 8, "opacity": 0.85,
        "line": {"width": 0},
    }  # fmt: skip
    return {
        "type": "scatter", "mode": "markers", "x": numbers(x), "y": numbers(y), "name": escape(name), "marker": marker,
        "text": [escape(text).replace("\n", "<br>") for text in hover], "hovertemplate": "%{text}<extra></extra>",
    } | more  # fmt: skip


def line(x, y, stroke: str, name: str, **more: Any) -> dict[str, Any]:
    """A line that does not answer to the pointer."""
    base = {"type": "scatter", "mode": "lines", "x": numbers(x), "y": numbers(y), "name": escape(name)}
    return base | {"line": {"color": stroke, "width": 2}, "hoverinfo": "skip"} | more


def band(x, low, high, stroke: str) -> dict[str, Any]:
    """A filled band between two curves."""
    x, low, high = numbers(x), numbers(low), numbers(high)
    return {
        "type": "scatter", "mode": "lines", "x": x + x[::-1], "y": high + low[::-1], "fill": "toself",
        "fillcolor": shade(stroke, 0.16), "line": {"width": 0}, "hoverinfo": "skip",
    }  # fmt: skip


def bars(values, edges, stroke: str) -> dict[str, Any]:
    """Error bars of points, from low to high; `edges` are pairs."""
    values = numbers(values)
    return {
        "type": "data", "symmetric": False, "thickness": 1.8, "width": 0, "color": stroke,
        "array": [float(high - v) for v, (_, high) in zip(values, edges, strict=True)],
        "arrayminus": [float(v - low) for v, (low, _) in zip(values, edges, strict=True)],
    }  # fmt: skip


def axis(title: str, log: bool = False, **more: Any) -> dict[str, Any]:
    """An axis with grid and without a frame."""
    return {
        "title": {"text": title, "standoff": 8, "font": {"size": 12, "color": SOFT}},
        "type": "log" if log else "linear",
        "gridcolor": LINE, "linecolor": LINE, "zerolinecolor": LINE, "tickcolor": LINE, "automargin": True,
        "exponentformat": "SI", "ticks": "outside", "ticklen": 4,
    } | more  # fmt: skip


def label(text: str, x: float, y: float, stroke: str, **more: Any) -> dict[str, Any]:
    """A name at the end of a curve; on a logarithmic axis the coordinate is the power of ten."""
    return {
        "text": f"<b>{escape(text)}</b>", "x": x, "y": y, "xanchor": "left", "xshift": 6, "showarrow": False,
        "font": {"size": 12, "color": stroke},
    } | more  # fmt: skip


def numbers(values) -> list[float]:
    """Plain floats for JSON."""
    return [float(value) for value in values]


def si(value: float | None, digits: int = 3) -> str:
    """A count with a suffix: 12.3M; powers of ten beyond 10^15."""
    if value is None:
        return "–"
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 1e16:
            break
        if value >= 0.9995 * size:
            return f"{value / size:.{digits}g}{suffix}" if value < 999.5 * size else f"{value / size:,.0f}{suffix}"
    return scientific(value) if value >= 1e16 else f"{value:.{digits}g}"


def scientific(value: float | None, digits: int = 2) -> str:
    """A number as 4.80×10¹⁵."""
    if value is None:
        return "–"
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}×10{str(int(exponent)).translate(SUPERSCRIPTS)}"


def log_ticks(values, power: bool = False) -> dict[str, Any]:
    """Ticks of a logarithmic axis at round multiples of powers of ten; nothing where that gives fewer than three.

    Args:
        values: that the axis has to show.
        power: write powers of ten, not 200k.
    """
    low, high = min(values), max(values)
    decades = np.log10(high / low)
    steps = (1,) if decades > 2.2 else (1, 3) if power else (1, 2, 5)
    first = int(np.floor(np.log10(low)))
    places = [step * 10.0**p for p in range(first, first + int(decades) + 3) for step in steps]
    kept = [place for place in places if low / 1.3 <= place <= high * 1.3]
    if len(kept) < 3:
        return {}
    return {
        "tickvals": kept,
        "tickangle": 0,
        "ticktext": [scientific(v, 0).removeprefix("1×") if power else si(v) for v in kept],
    }


def end_labels(ends: Sequence[tuple[str, float, float, str]], low: float, high: float, height: int) -> list[dict]:
    """Names at the ends of curves, pushed apart where they would cover each other.

    Args:
        ends: (name, x, y, colour) in the coordinates of `label`.
        low, high: what the y axis shows.
        height: of the drawing area in pixels.
    """
    pixels = height / max(high - low, 1e-12)
    notes, last = [], -np.inf
    for name, x, y, stroke in sorted(ends, key=lambda end: end[2]):
        place = max(y * pixels, last + LABEL_PIXELS)
        notes.append(label(name, x, y, stroke, yshift=round(place - y * pixels)))
        last = place
    return notes
