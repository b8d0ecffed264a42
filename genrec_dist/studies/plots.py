"""Figures of the report as inline SVG: take numbers, return markup; read and write nothing.

Text and grid take the page's colours (`currentColor` and a CSS variable), so that one figure serves a light and a
dark page. Namespaces are dropped (HTML does not need them) and ids carry the figure's name, as all figures share a
page.
"""

from __future__ import annotations

import io
import itertools
import re
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation

from genrec_dist.studies.tsne import Map

TEXT, GRID = "#010203", "#040506"
COLOURS = ("#3f7fd0", "#d9772b", "#2f9a72", "#b0559b", "#a08a1f", "#6f7bd1", "#c4504f", "#3d97a8")
CLUSTERS = (
    "#4c8bd6", "#e08a3c", "#3fa678", "#c85c5b", "#9273c9", "#a47551", "#d678b4", "#8b929c", "#b3a62e", "#3ba9b8",
)  # fmt: skip
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "genrec",
    "text.parse_math": False,
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "axes.prop_cycle": cycler(color=COLOURS),
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.titlecolor": TEXT,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "axes.edgecolor": GRID,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
WIDTH = 9.4
MAX_POINTS = 400
LEGEND_ROW = 0.17


def new_figure(columns: int, height: float, ratios: list[float] | None = None) -> tuple[Figure, list[Axes]]:
    """A figure of panels side by side, as wide as a page; equally wide, or by `ratios`."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, columns, width_ratios=ratios)))


def to_svg(figure: Figure, name: str) -> Markup:
    """A figure as markup for the inside of an HTML page.

    Args:
        figure: what to draw.
        name: unique on the page; prefix of every id.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", dpi=140, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'^<svg[^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg role="img" aria-label="{name}" \1>', text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    return Markup(text.replace(TEXT, "currentColor").replace(GRID, "var(--line)"))


def headline(entries: list[dict], metrics: list[str], oracle: dict[str, float]) -> Markup:
    """Each method's metrics as points with their 95% intervals.

    Args:
        entries: `label`, `values` and `intervals` by metric, and `kind`: 'run', 'reference' or 'paper'.
        metrics: one panel each.
        oracle: the best reachable value by metric, drawn as a line where known.
    """
    with mpl.rc_context(STYLE):
        figure, panels = new_figure(len(metrics), 0.75 + 0.34 * len(entries))
        look = {"run": (COLOURS[0], "o"), "reference": ("#8b929c", "o"), "paper": (COLOURS[1], "D")}
        for axes, metric in zip(panels, metrics, strict=True):
            for y, entry in enumerate(reversed(entries)):
                value = entry["values"].get(metric)
                if value is None:
                    continue
                colour, marker = look[entry["kind"]]
                bounds = entry["intervals"].get(metric)
                if bounds:
                    axes.plot(bounds, [y, y], color=colour, linewidth=2.5, alpha=0.55, solid_capstyle="round")
                face = "none" if entry["kind"] == "paper" else colour
                axes.plot(value, y, marker, color=colour, markerfacecolor=face, markersize=6.5)
            if metric in oracle:
                axes.axvline(oracle[metric], color=COLOURS[2], linestyle="--", linewidth=1.2)
                above = axes.get_xaxis_transform()
                axes.text(oracle[metric], 1.03, "oracle", transform=above, ha="right", fontsize=8.5, color=COLOURS[2])
            axes.set_title(_metric_name(metric), loc="left")
            axes.set_yticks(range(len(entries)), [e["label"] for e in reversed(entries)] if axes is panels[0] else [])
            axes.set_ylim(-0.6, len(entries) - 0.4)
            axes.set_xlim(left=0)
            axes.margins(x=0.08)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
            axes.grid(axis="y", visible=False)
        return to_svg(figure, "headline")


def stage_curves(records: list[dict], name: str) -> Markup | None:
    """Loss, parts of the loss and validation metrics of one training stage; None when nothing was logged."""
    train = [r for r in records if r.get("split") == "train"]
    valid = [r for r in records if r.get("split") == "valid"]
    axis = "epoch" if all("epoch" in r for r in records) else "step"
    parts = sorted({k for r in train for k in r if k.startswith("loss_")})
    metrics = _validated(valid)
    panels = [p for p in (("loss", ["loss"]), ("parts of the loss", parts), ("validation", metrics)) if p[1]]
    if not any("loss" in r for r in records):
        panels = panels[1:]
    if not panels:
        return None
    with mpl.rc_context(STYLE):
        figure, all_axes = new_figure(len(panels), 2.7)
        entries = 0
        for axes, (title, names) in zip(all_axes, panels, strict=True):
            for i, key in enumerate(names):
                if title == "loss":
                    _line(axes, train, axis, key, label="train", alpha=0.9)
                    _line(axes, valid, axis, key, label="validation", marker="o", markersize=3)
                elif title == "validation":
                    _line(axes, valid, axis, key, label=_metric_name(key), marker="o", markersize=3, color=COLOURS[i])
                else:
                    _line(axes, train, axis, key, label=key.removeprefix("loss_"))
            if title == "validation":
                _mark_best(axes, valid, axis, metrics[-1])
                if axes.get_ylim()[0] > 0 or metrics[-1] == "ndcg@10":
                    axes.set_ylim(bottom=0)
            axes.set_title(title, loc="left")
            axes.set_xlabel(axis)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
            if len(axes.lines) > 1:
                entries = max(entries, _legend_below(figure, axes))
        figure.set_figheight(2.7 + LEGEND_ROW * entries)
        return to_svg(figure, name)


def _legend_below(figure: Figure, axes: Axes) -> int:
    """Legend under the axis label, where it covers nothing; returns how many entries it has."""
    below = axes.transAxes + ScaledTranslation(0, -0.48, figure.dpi_scale_trans)
    legend = axes.legend(
        loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, borderaxespad=0, labelspacing=0.3
    )
    return len(legend.get_texts())


def _validated(valid: list[dict]) -> list[str]:
    """Metrics of a validation that are drawn, the one that decides last: of a ranking, else of a tokenizer."""
    names = {name for record in valid for name, value in record.items() if value is not None}
    ranking = [name for name in ("recall@10", "ndcg@10") if name in names]
    parts = sorted(name for name in names if name.startswith("explained_"))
    kept = ["unique", *(parts if len(parts) > 1 else []), "explained"]
    return ranking or [name for name in kept if name in names]


def _line(axes: Axes, records: list[dict], axis: str, key: str, **look: Any) -> None:
    points = [(r[axis], r[key]) for r in records if r.get(key) is not None and axis in r]
    if points:
        step = -(-len(points) // MAX_POINTS)
        kept = points[::step] if (len(points) - 1) % step == 0 else [*points[::step], points[-1]]
        axes.plot(*zip(*kept, strict=True), **look)


def _mark_best(axes: Axes, valid: list[dict], axis: str, metric: str) -> None:
    scored = [r for r in valid if r.get(metric) is not None]
    best = max(scored, key=lambda r: r[metric])
    axes.axvline(
        best[axis], color=TEXT, linestyle=":", linewidth=1.0, label=f"best {_metric_name(metric)} {best[metric]:.4f}"
    )


def ranks(ranks_by_method: dict[str, np.ndarray]) -> Markup:
    """Recall@k over k for every method, and where the held-out items of the first method stand."""
    with mpl.rc_context(STYLE):
        figure, (curve, bars) = new_figure(2, 2.9)
        longest = max(2, min(int(next(iter(ranks_by_method.values())).max(initial=0)), 100))
        for method, values in ranks_by_method.items():
            counts = np.bincount(np.where(values > longest, 0, values), minlength=longest + 1)[1:]
            own = max(1, min(longest, int(values.max(initial=0))))  # a list says nothing past its end
            curve.plot(np.arange(1, own + 1), (counts.cumsum() / len(values))[:own], label=method)
        curve.set_xscale("log")
        ticks = [k for k in (1, 2, 5, 10, 20, 50, 100) if k <= longest]
        curve.set_xticks(ticks, [str(k) for k in ticks])
        curve.minorticks_off()
        curve.set(xlabel="k", xlim=(1, longest))
        curve.set_ylim(bottom=0)
        curve.set_title("Recall@k", loc="left")
        curve.legend()

        method, values = next(iter(ranks_by_method.items()))
        edges = [k for k in (1, 2, 4, 6, 11, 21, 51, 101) if k <= longest] + [longest + 1]
        shares = [((values >= a) & (values < b)).mean() for a, b in itertools.pairwise(edges)]
        names = [str(a) if b == a + 1 else f"{a}–{b - 1}" for a, b in itertools.pairwise(edges)]
        bars.bar(names, shares, color=COLOURS[0], width=0.72)
        bars.set_xlabel("rank of the held-out item")
        missed = 1 - sum(shares)
        bars.set_title(f"share of users, {method} ({100 * missed:.1f}% not within {longest})", loc="left")
        bars.grid(axis="x", visible=False)
        return to_svg(figure, "ranks")


def codebook_levels(quality: dict) -> Markup:
    """Use of the codes and explained variance by level."""
    levels = quality["levels"]
    x = [level["level"] for level in levels]
    most = np.log2(quality["num_clusters"])
    with mpl.rc_context(STYLE):
        figure, (entropy, perplexity, variance) = new_figure(3, 2.5)
        look: dict[str, Any] = {"marker": "o", "markersize": 4, "clip_on": False}
        entropy.plot(x, [level["entropy_bits"] for level in levels], **look)
        entropy.axhline(most, color=TEXT, linestyle=":", linewidth=1.0)
        entropy.set_ylim(0, 1.15 * max(most, 1.0))
        place = (0.99, most)
        entropy.annotate(
            "log₂ K", place, (0, 3), entropy.get_yaxis_transform(), "offset points", ha="right", fontsize=8.5
        )
        entropy.set_title("entropy of the codes, bits", loc="left")
        perplexity.plot(x, [level["normalised_perplexity"] for level in levels], **look)
        perplexity.set_ylim(0, 1.03)
        perplexity.set_title("perplexity / K", loc="left")
        variance.plot([0, *x], [0] + [level["variance_explained"] for level in levels], **look)
        variance.set_ylim(0, 1.03)
        variance.set_title("variance explained", loc="left")
        for axes in (entropy, perplexity, variance):
            axes.set_xlabel("level")
            axes.margins(x=0.08)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        return to_svg(figure, "codebook-levels")


def codebook_sizes(quality: dict) -> Markup:
    """Depths of the items, and node sizes by level."""
    levels = quality["levels"]
    with mpl.rc_context(STYLE):
        figure, (depths, sizes) = new_figure(2, 2.9, [1, 2.6])
        histogram = quality["depth_histogram"]
        depths.bar(list(histogram), list(histogram.values()), color=COLOURS[0], width=0.72)
        depths.set_title("items by code length", loc="left")
        depths.set_xlabel("codes")
        depths.yaxis.set_major_formatter(EngFormatter(sep=""))
        depths.grid(axis="x", visible=False)

        most = max(len(level["size_histogram"]["nodes"]) for level in levels)
        for i, level in enumerate(levels):
            nodes = level["size_histogram"]["nodes"]
            shares = np.array(nodes + [0] * (most - len(nodes))) / level["nodes"]
            place = np.arange(most) + (i - (len(levels) - 1) / 2) * 0.8 / len(levels)
            sizes.bar(place, shares, width=0.8 / len(levels), label=f"level {level['level']}", color=COLOURS[i % 8])
        names = [_short(2**b) if b == 0 else f"{_short(2**b)}–{_short(2 ** (b + 1) - 1)}" for b in range(most)]
        sizes.set_xticks(range(most), names, rotation=40, ha="right", rotation_mode="anchor")
        sizes.set_title("share of nodes by size", loc="left")
        sizes.set_xlabel("items below the node")
        sizes.grid(axis="x", visible=False)
        if len(levels) > 1:
            sizes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        return to_svg(figure, "codebook-sizes")


def _short(value: int) -> str:
    """A size in at most four characters."""
    for unit, name in ((10**6, "M"), (10**3, "k")):
        if value >= unit:
            return f"{value / unit:.0f}{name}"
    return str(value)


def kmeans_curves(objective: list[float], imbalance: list[float]) -> Markup:
    """Objective, relative to the first, and largest cluster over the mean one, by iteration of one k-means."""
    with mpl.rc_context(STYLE):
        figure, panels = new_figure(2, 2.5)
        relative = [value / objective[0] if objective[0] else 1.0 for value in objective]
        for axes, title, values in zip(
            panels, ("objective / first", "largest cluster / mean"), (relative, imbalance), strict=True
        ):
            axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3)
            axes.set_title(title, loc="left")
            axes.set_xlabel("iteration")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        return to_svg(figure, "kmeans")


def maps(panels: list[Map]) -> Markup:
    """t-SNE maps side by side; the points are one picture, not thousands of marks."""
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        figure, all_axes = new_figure(len(panels), WIDTH / max(len(panels), 2) + 0.2)
        for axes, panel in zip(all_axes, panels, strict=True):
            colours = np.array(CLUSTERS)[panel.clusters % len(CLUSTERS)]
            axes.scatter(
                panel.points[:, 0], panel.points[:, 1], c=colours, s=4, linewidths=0, alpha=0.8, rasterized=True
            )
            axes.set_title(panel.title, loc="left")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.set_aspect("equal", adjustable="datalim")
        return to_svg(figure, "maps")


def similarity_bars(rows: list[tuple[str, float, float]]) -> Markup:
    """Shares of the two modalities as stacked bars: (label, semantic, collaborative)."""
    with mpl.rc_context(STYLE):
        figure, (axes,) = new_figure(1, 0.6 + 0.36 * len(rows))
        labels = [row[0] for row in reversed(rows)]
        semantic = np.array([row[1] for row in reversed(rows)])
        axes.barh(labels, semantic, color=COLOURS[0], height=0.62, label="semantic")
        axes.barh(labels, 1 - semantic, left=semantic, color=COLOURS[1], height=0.62, label="collaborative")
        axes.axvline(0.5, color=TEXT, linewidth=0.8, linestyle=":")
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
        axes.grid(visible=False)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        return to_svg(figure, "similarity")


def _metric_name(metric: str) -> str:
    return metric.replace("recall", "Recall").replace("ndcg", "NDCG").replace("_", " ")
