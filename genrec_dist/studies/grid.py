"""One table of a study in its three forms: HTML block, CSV and JSON, from the same rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from genrec_dist.studies.blocks import NONE, Cell, Section, Table, number
from genrec_dist.studies.study_data import Pooled, StudyData

OURS, PAPER, REFERENCE, DERIVED = "this study", "paper", "reference", "difference"


@dataclass(frozen=True)
class Column:
    """One number of every row."""

    key: str
    label: str
    show: Callable[[float], str] = number


@dataclass(frozen=True)
class Row:
    """One line: where it comes from, and its numbers by column.

    Args:
        label: first cell.
        source: one of the constants above.
        values: by column key.
        show: how this row's numbers are written, where it differs from the column's way.
    """

    label: str
    source: str
    values: dict[str, Pooled | float | None]
    show: Callable[[float], str] | None = None


@dataclass
class Grid:
    """A table of a study.

    Args:
        name: stem of the CSV file.
        corner: heading of the first column.
        columns: numbers.
        rows: lines.
        caption: what the reader has to know.
        highlight: the first row of this study stands out.
    """

    name: str
    corner: str
    columns: list[Column]
    rows: list[Row] = field(default_factory=list)
    caption: str = ""
    highlight: bool = False

    def table(self, keys: Sequence[str] | None = None) -> Table:
        """For the page: means, and below them the bounds.

        Args:
            keys: columns that are shown; all by default.
        """
        columns = [column for column in self.columns if keys is None or column.key in keys]
        rows = [[row.label, *(self._cell(row, column) for column in columns)] for row in self.rows]
        ours = [i for i, row in enumerate(self.rows) if row.source == OURS]
        return Table(
            [self.corner, *(column.label for column in columns)],
            rows,
            self.caption,
            strong_rows=set(ours[:1]) if self.highlight else set(),
            faint_rows={i for i, row in enumerate(self.rows) if row.source in (PAPER, REFERENCE)},
        )

    def _cell(self, row: Row, column: Column) -> Cell | str:
        value, show = row.values.get(column.key), row.show or column.show
        if value is None:
            return NONE
        if not isinstance(value, Pooled):
            return show(value)
        low, high = map(show, value.spread) if value.spread else ("", "")
        bounds = f"{low}–{high}" if low != high else ""
        if value.deviation is None:
            return Cell(show(value.mean), bounds)
        return Cell(f"{show(value.mean)} ± {show(value.deviation)}", bounds)

    def csv(self) -> str:
        """Every number in full, with the pooled bounds and the deviation over the seeds beside it."""
        bounded = [c.key for c in self.columns if any(_spread(row.values.get(c.key)) for row in self.rows)]
        seeded = [c.key for c in self.columns if any(_deviation(row.values.get(c.key)) for row in self.rows)]
        head = [self.corner or "row", "source"]
        for column in self.columns:
            head += [column.key, *([f"{column.key} low", f"{column.key} high"] if column.key in bounded else [])]
            head += [f"{column.key} deviation"] if column.key in seeded else []
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(head)
        for row in self.rows:
            line: list[Any] = [row.label, row.source]
            for column in self.columns:
                value = row.values.get(column.key)
                line.append(value.mean if isinstance(value, Pooled) else value)
                if column.key in bounded:
                    line += _spread(value) or [None, None]
                if column.key in seeded:
                    line.append(_deviation(value))
            writer.writerow(["" if cell is None else cell for cell in line])
        return buffer.getvalue()

    def as_dict(self) -> list[dict]:
        """JSON-ready rows."""
        return [
            {
                "row": row.label,
                "source": row.source,
                "values": {
                    key: value.as_dict() if isinstance(value, Pooled) else value for key, value in row.values.items()
                },
            }
            for row in self.rows
        ]

    def seed_sections(self) -> list[Section]:
        """Section with each seed's numbers; none with one seed."""
        table = self.by_seed()
        return [Section(f"seeds-{self.name}", "Each seed", [table])] if table else []

    def by_seed(self) -> Table | None:
        """Each seed's numbers with their intervals; None with one seed."""
        seeds = sorted({s for row in self.rows for v in row.values.values() if isinstance(v, Pooled) for s in v.values})
        if len(seeds) < 2:
            return None
        rows = [
            [row.label, str(seed), *(_seed_cell(row, column, seed) for column in self.columns)]
            for row in self.rows
            if row.source == OURS
            for seed in seeds
        ]
        head = [self.corner, "seed", *(column.label for column in self.columns)]
        bounded = any(isinstance(v, Pooled) and v.intervals for row in self.rows for v in row.values.values())
        return Table(head, rows, "Below a number: the seed's own 95% bootstrap interval over users." if bounded else "")


def _spread(value: Pooled | float | None) -> list[float] | None:
    return list(value.spread) if isinstance(value, Pooled) and value.spread else None


def _deviation(value: Pooled | float | None) -> float | None:
    return value.deviation if isinstance(value, Pooled) else None


def _seed_cell(row: Row, column: Column, seed: int) -> Cell | str:
    value, show = row.values.get(column.key), row.show or column.show
    if not isinstance(value, Pooled) or seed not in value.values:
        return NONE if not isinstance(value, float) else show(value)
    bounds = value.intervals.get(seed)
    return Cell(show(value.values[seed]), f"{show(bounds[0])}–{show(bounds[1])}" if bounds else "")


def bounds_note(data: StudyData, intervals: bool = True) -> str:
    """What stands below a number, for a caption."""
    seeds = len(data.seeds)
    if seeds == 1:
        return "Below a number: 95% bootstrap interval over users." if intervals else ""
    found = [data.metric(variant.name, "recall@10") for variant in data.variants]
    some_lack = any(pooled is not None and len(pooled.values) < seeds for pooled in found)
    mean = f"Mean ± standard deviation of {seeds} seeds{', fewer where runs are missing' if some_lack else ''}"
    if intervals:
        return f"{mean}; below it the lowest lower and highest upper bound of their 95% intervals."
    return f"{mean}; below it the range of the seeds."


def result_rows(data: StudyData, metrics: list[str]) -> list[Row]:
    """Test metrics of every variant that has a result."""
    found = [(v.label, {name: data.metric(v.name, name) for name in metrics}) for v in data.variants]
    return [Row(label, OURS, dict(values)) for label, values in found if any(values.values())]


def reference_rows(data: StudyData, metrics: list[str]) -> list[Row]:
    """Test metrics of the runs' references."""
    return [
        Row(name.replace("_", " "), REFERENCE, {metric: data.reference(name, metric) for metric in metrics})
        for name in data.references
    ]


def entries(rows: list[Row]) -> list[dict]:
    """Rows as `plots.headline` takes them."""
    kinds = {OURS: "run", REFERENCE: "reference", PAPER: "paper"}
    drawn = []
    for row in rows:
        if row.source not in kinds:
            continue
        present = {key: value for key, value in row.values.items() if value is not None}
        drawn.append(
            {
                "label": row.label,
                "values": {k: v.mean if isinstance(v, Pooled) else v for k, v in present.items()},
                "intervals": {k: v.spread for k, v in present.items() if isinstance(v, Pooled) and v.spread},
                "kind": kinds[row.source],
            }
        )
    return drawn


def signed_percent(value: float) -> str:
    """'+12.3%'."""
    return f"{100 * value:+.1f}%"
