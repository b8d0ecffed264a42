"""Figures that only studies have, inline SVG as in plots.py: a number over a setting, maps whose colours are labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from genrec_dist.studies.plots import CLUSTERS, COLOURS, STYLE, WIDTH, new_figure, to_svg
from genrec_dist.studies.study_data import Pooled

GREY = "#8b929c"
PALETTE = tuple(colour for colour in CLUSTERS if colour != GREY)


@dataclass(frozen=True)
class Line:
    """Numbers over a setting; a paper's are drawn hollow and dashed.

    Args:
        label: in the legend.
        points: number by position on the axis.
        bounds: lowest and highest, by position.
        paper: printed by a paper.
    """

    label: str
    points: dict[int, float]
    bounds: dict[int, tuple[float, float]] = field(default_factory=dict)
    paper: bool = False


def pooled_line(label: str, found: dict[int, Pooled]) -> Line:
    """Means over the seeds with their bounds, by position."""
    bounds = {i: value.spread for i, value in found.items() if value.spread}
    return Line(label, {i: value.mean for i, value in found.items()}, bounds)


def sweep(
    panels: Sequence[tuple[str, Sequence[Line]]], ticks: Sequence[str], axis: str, name: str, log: bool = False
) -> Markup:
    """Numbers over the values of one setting, a panel a metric.

    Args:
        panels: title and lines.
        ticks: values of the setting, in order.
        axis: name of the setting.
        name: unique on the page.
        log: logarithmic numbers.
    """
    with mpl.rc_context(STYLE):
        figure, all_axes = new_figure(len(panels), 2.9)
        for axes, (title, lines) in zip(all_axes, panels, strict=True):
            for line in lines:
                colour = COLOURS[1] if line.paper else COLOURS[0]
                x = sorted(line.points)
                look: dict[str, Any] = (
                    {"linestyle": "--", "marker": "D", "markerfacecolor": "none"} if line.paper else {"marker": "o"}
                )
                axes.plot(x, [line.points[i] for i in x], color=colour, markersize=5, label=line.label, **look)
                for place, bounds in line.bounds.items():
                    axes.plot([place, place], bounds, color=colour, linewidth=2.5, alpha=0.55, solid_capstyle="round")
            axes.set_title(title, loc="left")
            axes.set_xticks(range(len(ticks)), ticks)
            axes.set_xlabel(axis)
            axes.margins(x=0.08)
            if log and all(value > 0 for line in lines for value in line.points.values()):
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axes.yaxis.set_minor_formatter(NullFormatter())
        if any(len(lines) > 1 for _, lines in panels):
            all_axes[0].legend()
        return to_svg(figure, name)


@dataclass(frozen=True)
class LabelledMap:
    """One table laid out in the plane, coloured by a label of its items.

    Shapes:
        points: (num_sampled, 2) float32.
        labels: (num_sampled,) int, -1 for the rest.
    """

    title: str
    points: np.ndarray
    labels: np.ndarray
    names: Sequence[str]
    note: str = ""


def labelled_maps(panels: Sequence[LabelledMap], name: str) -> Markup:
    """Maps side by side, each with a legend below; items of no named label are grey and lie underneath."""
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        figure, all_axes = new_figure(len(panels), WIDTH / max(len(panels), 2) + 1.0)
        for axes, panel in zip(all_axes, panels, strict=True):
            size = min(24.0, max(4.0, 12_000 / max(len(panel.points), 1)))
            for label in range(-1, len(panel.names)):
                chosen = panel.points[panel.labels == label]
                if len(chosen):
                    title = panel.names[label] if label >= 0 else "other"
                    colour = PALETTE[label % len(PALETTE)] if label >= 0 else GREY
                    x, y = chosen.T
                    axes.scatter(x, y, size, colour, label=title, linewidths=0, alpha=0.8, rasterized=True)
            axes.set_title(panel.title, loc="left")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.set_aspect("equal", adjustable="datalim")
            axes.set_xlabel(panel.note)
            axes.legend(
                loc="upper center",
                bbox_to_anchor=(0.5, -0.07),
                ncols=3,
                markerscale=2.5 if size < 10 else 1.2,
                handletextpad=0.2,
                fontsize=8,
            )
        return to_svg(figure, name)
