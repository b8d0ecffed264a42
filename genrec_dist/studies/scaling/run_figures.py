"""Figures of the runs themselves, without a fit: metrics by depth, seed spread, costs, learning curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_hex

from genrec_dist.studies.scaling.claims import by_seed
from genrec_dist.studies.scaling.fit_figures import title_of
from genrec_dist.studies.scaling.plot import (
    SOFT,
    Panel,
    Plot,
    axis,
    bars,
    colour,
    dots,
    end_labels,
    line,
    log_ticks,
    si,
    swatches,
)
from genrec_dist.studies.scaling.points import LOSSES, QUANTITIES
from genrec_dist.studies.scaling.seeds import difference, mean_of
from genrec_dist.studies.scaling.study import ScalingStudy
from genrec_dist.studies.scaling.trials import CurvePoint, Trial

BASE_DEPTH = 8
"""Depth that differences are taken to: where PRORec's text lets HSTU stop to grow."""
CURVE_METRICS = ("ndcg@20", "ndcg@10", "recall@20", "recall@10")


def by_depth(study: ScalingStudy) -> Plot | None:
    """Metrics over depth, as PRORec's Figure 6 has them, and differences to the base depth."""
    panels, rows = [], []
    for quantity in study.quantities():
        if quantity in LOSSES:
            continue
        traces, notes, changes = [], [], []
        drawn: list[float] = []
        for index, arm in enumerate(study.arms):
            values = by_seed(study.trials, arm, quantity)
            if not values:
                continue
            depths = sorted(values)
            found = [mean_of(values, d) for d in depths]
            means = [f.mean for f in found]
            hover = [f"{arm}, {d} layers\n{_said(f)}" for d, f in zip(depths, found, strict=True)]
            edges = [f.interval or (f.mean, f.mean) for f in found]
            traces.append(
                dots(
                    depths, means, index, arm, hover, mode="lines+markers", line={"color": colour(index), "width": 1.5},
                    error_y=bars(means, edges, colour(index)),
                )
            )  # fmt: skip
            drawn += means
            notes.append((arm, float(np.log10(depths[-1])), means[-1], colour(index)))
            for depth, value, edge in zip(depths, found, edges, strict=True):
                change = difference(values, depth, BASE_DEPTH)
                rows.append(
                    {
                        "arm": arm, "quantity": quantity, "depth": depth, "mean": value.mean, "low": edge[0],
                        "high": edge[1],
                        "seeds": value.num_seeds, f"change_from_{BASE_DEPTH}": change.mean if change else None,
                        "change_low": change.interval[0] if change and change.interval else None,
                        "change_high": change.interval[1] if change and change.interval else None,
                    }
                )  # fmt: skip
                if change:
                    changes.append((index, arm, depth, change))
        if not traces:
            continue
        layout: dict[str, Any] = {"xaxis": _depth_axis(study), "yaxis": axis(QUANTITIES[quantity])}
        layout["annotations"] = end_labels(notes, min(drawn), max(drawn), 270)
        layout["margin"] = {"l": 58, "r": 14 + 8 * max(len(arm) for arm in study.arms), "t": 26, "b": 46}
        panels.append(Panel(f"{QUANTITIES[quantity]} by depth", traces, layout))
        if changes:
            panels.append(_change_panel(study, quantity, changes))
    if not panels:
        return None
    caption = (
        f"By depth: means over seeds with 95% t intervals for these seeds. Change from {BASE_DEPTH} layers: of the "
        "same seeds, which takes out what a seed adds at every depth, with 95% t intervals; one that covers zero "
        "decides nothing. The noise of a run is pooled over the depths of its arm; with one seed there is no interval."
    )
    return Plot("by-depth", panels, caption, rows, swatches(study.arms))


def seed_spread(study: ScalingStudy) -> Plot | None:
    """How far each run lies from the mean of its depth."""
    panels, rows = [], []
    for quantity in study.quantities():
        traces = []
        for index, arm in enumerate(study.arms):
            x, y, hover = [], [], []
            for depth, values in sorted(by_seed(study.trials, arm, quantity).items()):
                mean = float(np.mean(list(values.values())))
                if len(values) < 2 or mean == 0:
                    continue
                for seed, value in sorted(values.items()):
                    shift = 100 * (value / mean - 1)
                    x.append(depth * 1.04 ** (index - (len(study.arms) - 1) / 2))
                    y.append(shift)
                    hover.append(f"{arm}, {depth} layers, seed {seed}\n{value:.4f}, {shift:+.2f}% from the mean")
                    rows.append(
                        {
                            "arm": arm,
                            "quantity": quantity,
                            "depth": depth,
                            "seed": seed,
                            "value": value,
                            "from_mean_percent": shift,
                        }
                    )
            if x:
                traces.append(dots(x, y, index, arm, hover))
        if traces:
            layout = {
                "xaxis": _depth_axis(study),
                "yaxis": axis("from the mean of the depth, %", zeroline=True, zerolinecolor=SOFT),
            }
            panels.append(Panel(title_of(quantity), traces, layout, 280))
    if not panels:
        return None
    caption = "Each mark is one run: its distance from the mean over the seeds of its depth, in percent of that mean."
    return Plot("seed-spread", panels, caption, rows, swatches(study.arms), small=len(panels) == 3)


def costs(study: ScalingStudy) -> Plot | None:
    """Throughput, memory and utilisation over depth, where they were measured."""
    measures: list[tuple[str, str, Callable[[Trial], float | None], bool, dict[str, Any]]] = [
        ("Throughput", "tokens a second", lambda t: t.tokens_per_second, True, {}),
        ("Peak memory", "GiB", lambda t: t.peak_memory_bytes / 2**30 if t.peak_memory_bytes else None, False, {}),
        ("MFU", "share of peak FLOP/s", lambda t: t.mfu, False, {"tickformat": ".2~%"}),
        ("Training compute", "FLOPs to the best checkpoint", lambda t: t.train_flops, True, {}),
    ]
    panels, rows = [], []
    for title, unit, read, log, more in measures:
        traces = []
        for index, arm in enumerate(study.arms):
            runs = [(t, value) for t in study.finished if t.arm == arm and (value := read(t)) is not None]
            if runs:
                hover = [f"{arm}, {t.depth} layers, seed {t.seed}\n{si(v)} {unit}\n{t.hardware}" for t, v in runs]
                depths = sorted({t.depth for t, _ in runs})
                means = [np.mean([v for t, v in runs if t.depth == depth]) for depth in depths]
                traces.append(line(depths, means, colour(index), arm, line={"color": colour(index), "width": 1.5}))
                traces.append(dots([t.depth for t, _ in runs], [v for _, v in runs], index, arm, hover))
                rows += [
                    {
                        "measure": title,
                        "unit": unit,
                        "arm": arm,
                        "depth": t.depth,
                        "seed": t.seed,
                        "value": float(v),
                        "hardware": t.hardware,
                    }
                    for t, v in runs
                ]
        if traces:
            values = [row["value"] for row in rows if row["measure"] == title]
            more = log_ticks(values, power=title == "Training compute") if log else {"rangemode": "tozero"} | more
            yaxis = axis(unit, log=log, **more)
            panels.append(Panel(title, traces, {"xaxis": _depth_axis(study), "yaxis": yaxis}, 280))
    if not panels:
        return None
    caption = "Each mark is one run, lines join the means of the depths. Compare only runs on the same hardware."
    return Plot("costs", panels, caption, rows, swatches(study.arms))


def learning_curves(study: ScalingStudy) -> Plot | None:
    """Validation loss, or where there is none a validation metric, over training compute, one line a run."""
    panels, rows = [], []
    depths = sorted({trial.depth for trial in study.finished})
    shades = _shades(len(depths))
    for arm in study.arms:
        runs = [trial for trial in study.finished if trial.arm == arm and trial.curve]
        name, read = _curve_quantity(runs)
        traces, seen = [], set()
        for trial in runs:
            points = [(p, value) for p in trial.curve if (value := read(p)) is not None]
            if not points:
                continue
            stroke = shades[depths.index(trial.depth)]
            traces.append(
                line(
                    [p.flops for p, _ in points], [v for _, v in points], stroke, str(trial.depth),
                    line={"color": stroke, "width": 1.6}, legendgroup=str(trial.depth),
                    showlegend=trial.depth not in seen,
                    hoverinfo="text",
                    text=[f"{trial.depth} layers, seed {trial.seed}<br>epoch {p.epoch:g}: {v:.4f}" for p, v in points],
                )
            )  # fmt: skip
            seen.add(trial.depth)
            rows += [
                {
                    "arm": arm, "depth": trial.depth, "seed": trial.seed, "epoch": p.epoch, "step": p.step,
                    "flops": p.flops, "train_loss": p.train_loss, "bits_per_item": p.bits_per_item,
                    **p.metrics,
                }
                for p, _ in points
            ]  # fmt: skip
        if traces:
            spent = [x for trace in traces for x in trace["x"]]
            log = min(spent) > 0
            layout = {
                "xaxis": axis(
                    "training FLOPs", log=log, **(log_ticks(spent, power=True) if log else {"exponentformat": "power"})
                ),
                "yaxis": axis(name),
                "showlegend": True,
                "legend": {"title": {"text": "layers "}, "orientation": "h", "y": -0.2, "yanchor": "top", "x": 0},
                "margin": {"l": 58, "r": 16, "t": 26, "b": 96},
            }
            panels.append(Panel(f"{arm}, validation", traces, layout, 400))
    if not panels:
        return None
    caption = "Validation after each evaluated epoch against the compute spent; one line a run, darker for more layers."
    return Plot("learning-curves", panels, caption, rows)


def _change_panel(study: ScalingStudy, quantity: str, changes) -> Panel:
    """Differences to the base depth."""
    traces = []
    for index, arm in enumerate(study.arms):
        own = [(depth, change) for i, _, depth, change in changes if i == index]
        if not own:
            continue
        x = [depth * 1.04 ** (index - (len(study.arms) - 1) / 2) for depth, _ in own]
        y = [change.mean for _, change in own]
        edges = [change.interval or (change.mean, change.mean) for _, change in own]
        hover = [f"{arm}, {depth} layers less {BASE_DEPTH}\n{_said(change, '+.4f')}" for depth, change in own]
        traces.append(dots(x, y, index, arm, hover, error_y=bars(y, edges, colour(index))))
    layout = {
        "xaxis": _depth_axis(study),
        "yaxis": axis(f"change from {BASE_DEPTH} layers", zeroline=True, zerolinecolor=SOFT),
    }
    return Panel(f"{QUANTITIES[quantity]}, change from {BASE_DEPTH} layers", traces, layout)


def _said(difference, form: str = ".4f") -> str:
    text = f"mean {difference.mean:{form}} of {difference.num_seeds} seed{'s' if difference.num_seeds > 1 else ''}"
    if difference.interval is None:
        return text
    return f"{text}\n95% {difference.interval[0]:{form}} to {difference.interval[1]:{form}}"


def _depth_axis(study: ScalingStudy) -> dict[str, Any]:
    """Logarithmic, ticks at the depths of the sweep that do not crowd."""
    depths = sorted({trial.depth for trial in study.finished})
    kept: list[int] = []
    for depth in reversed(depths):
        if not kept or kept[-1] / depth >= 1.4:
            kept.append(depth)
    return axis("layers", log=True, tickangle=0, tickvals=kept[::-1], ticktext=[str(depth) for depth in kept[::-1]])


def _shades(count: int) -> list[str]:
    """From light to dark, all of them readable on white and on near black."""
    scale = mpl.colormaps["viridis_r"]
    return [to_hex(scale(0.12 + 0.6 * i / max(count - 1, 1))) for i in range(count)]


def _curve_quantity(runs: Sequence[Trial]) -> tuple[str, Callable[[CurvePoint], float | None]]:
    """Loss where the model has one, else the first metric that was validated."""
    points = [point for trial in runs for point in trial.curve]
    if any(point.bits_per_item is not None for point in points):
        return "validation loss, bits an item", lambda point: point.bits_per_item
    names = [name for name in CURVE_METRICS if any(name in point.metrics for point in points)]
    name = names[0] if names else CURVE_METRICS[0]
    return f"validation {QUANTITIES.get(name, name.upper().replace('RECALL', 'Recall'))}", lambda p: p.metrics.get(name)
