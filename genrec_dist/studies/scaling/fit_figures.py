"""Figures of fits: loss and metrics over N and C with bands and residuals, L - E, prediction against actual.

Takes a study (study.py), returns plots; every plot's rows are the numbers that are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from genrec_dist.studies.scaling.plot import (
    SOFT,
    Panel,
    Plot,
    Row,
    axis,
    band,
    bars,
    colour,
    dots,
    end_labels,
    line,
    log_ticks,
    numbers,
    scientific,
    si,
    swatches,
)
from genrec_dist.studies.scaling.points import COMPUTE, LOSS, LOSSES, LOWEST_LOSS, QUANTITIES, SIZES, Points
from genrec_dist.studies.scaling.seeds import mean_of
from genrec_dist.studies.scaling.study import MAIN_SIZE, Case, ScalingStudy

GRID_POINTS = 90
SEEDS_APART = 0.7
"""Room that the seeds of a depth share on an axis of depths."""
OTHER_SIZES = tuple(size for size in SIZES if size not in (MAIN_SIZE, COMPUTE))


def title_of(quantity: str) -> str:
    """Heading of a panel."""
    return QUANTITIES[quantity][0].upper() + QUANTITIES[quantity][1:]


def size_title(size: str, quantity: str = LOSS) -> str:
    """Axis title of a size."""
    until = "lowest loss" if quantity == LOWEST_LOSS else "best checkpoint"
    return f"C, training FLOPs to the {until}" if size == COMPUTE else f"N, {SIZES[size]}"


def loss_over_sizes(study: ScalingStudy, sizes: Sequence[str], name: str, loss: str = LOSS) -> Plot | None:
    """Loss against each of `sizes`, logarithmic axes, fitted power law with its band, residuals below."""
    panels, rows = [], []
    for size in sizes:
        cases = _cases(study, size, loss)
        if cases:
            title = f"{'Loss' if loss == LOSS else 'Lowest loss'} against {_short(size)}"
            panel, drawn = _curves(study, cases, title, log_y=True, residuals=True)
            panels.append(panel)
            rows += drawn
    if not panels:
        return None
    caption = (
        "Each mark is one run; nothing is averaged. Line: fitted power law of the seeds in the mean, with the 95% "
        "confidence band of its bootstrap. Below: by how much a run lies above (+) or below its arm's curve; what its "
        "seed adds at every depth is part of that and was allowed for in the fit. A curve is drawn whether or not "
        "a power law is supported; the verdict says that."
    )
    if loss == LOWEST_LOSS:
        caption += " Lowest: of all validations of a run, with the compute spent up to it."
    return Plot(name, panels, caption, rows, swatches(study.arms))


def excess_over_sizes(study: ScalingStudy) -> Plot | None:
    """L - E against N and C: a straight line where the power law holds."""
    panels, rows = [], []
    lost = 0
    for size in (MAIN_SIZE, COMPUTE):
        traces, notes = [], []
        drawn_x: list[float] = []
        drawn_y: list[float] = []
        for arm, case in _cases(study, size, LOSS):
            if case.fit is None:
                continue
            index, points, power = study.arms.index(arm), case.points, case.fit.power
            added = np.exp([power.offsets[seed][0] for seed in points.seed.tolist()])
            excess = points.y / added - power.e
            shown = excess > 0
            lost += int((~shown).sum())
            hover = _hover(points.where(shown))
            drawn_x += numbers(points.x)
            drawn_y += numbers(excess[shown])
            traces.append(dots(points.x[shown], excess[shown], index, arm, hover))
            if power.a > 0:
                x = np.geomspace(points.x.min(), points.x.max(), GRID_POINTS)
                y = power.a * x**-power.alpha
                traces.insert(0, line(x, y, colour(index), arm))
                drawn_y += numbers(y)
                notes.append((arm, np.log10(x[-1]), np.log10(y[-1]), colour(index)))
            rows += [
                {"arm": arm, "over": size, "depth": d, "seed": s, "x": x, "loss_minus_E": e, "E": power.e}
                for d, s, x, e in _columns(points, excess)
            ]
        if drawn_y:
            layout = {
                "xaxis": axis(size_title(size), log=True, **_ticks(size, drawn_x)),
                "yaxis": axis("L − E, bits an item", log=True, **log_ticks(drawn_y)),
                "annotations": end_labels(notes, np.log10(min(drawn_y)), np.log10(max(drawn_y)), 250),
                "margin": _margin(study),
            }
            panels.append(Panel(f"L − E against {_short(size)}", traces, layout))
    if not panels:
        return None
    caption = (
        "Loss above its fitted floor E, without what its seed adds at every depth. On these axes a power law is a "
        "straight line of slope −α."
    )
    if lost:
        caption += (
            f" {lost} run{'s lie' if lost > 1 else ' lies'} below the floor and cannot be drawn; the CSV has them."
        )
    return Plot("excess-loss", panels, caption, rows, swatches(study.arms))


def metrics_over_size(study: ScalingStudy) -> Plot | None:
    """Metrics against N: runs, means over seeds with their intervals, fitted M∞ - A N^-alpha."""
    panels, rows = [], []
    for quantity in QUANTITIES:
        cases = _cases(study, MAIN_SIZE, quantity)
        if quantity not in LOSSES and cases:
            panel, drawn = _curves(study, cases, f"{QUANTITIES[quantity]} against {_short(MAIN_SIZE)}", means=True)
            panels.append(panel)
            rows += drawn
    if not panels:
        return None
    caption = (
        "Small marks: runs. Large marks: means over seeds with 95% t intervals for these seeds, the noise pooled over "
        "the depths of an arm. Line and band: M∞ − A N^−α, fitted to the runs."
    )
    return Plot("metrics", panels, caption, rows, swatches(study.arms))


def extrapolation(study: ScalingStudy) -> Plot | None:
    """Runs deeper than those of the fit beside their prediction intervals."""
    panels, rows = [], []
    for quantity in study.quantities():
        traces: list[dict] = []
        ticks: list[str] = []
        for arm, case in _cases(study, MAIN_SIZE, quantity):
            prediction = case.fit.prediction if case.fit else None
            if prediction is None:
                continue
            held, index = prediction.held_out, study.arms.index(arm)
            for depth in held.depths:
                at = np.flatnonzero(held.depth == depth)
                place = len(ticks)
                ticks.append(f"{arm}<br>{depth} layers")
                beside = place + SEEDS_APART * (np.arange(len(at)) - (len(at) - 1) / 2) / len(at)
                found, edges = prediction.predicted[at], prediction.interval[:, at].T
                said = [
                    f"{arm}, {depth} layers, seed {seed}\npredicted {mean:.4f}\n95% {low:.4f} to {high:.4f}"
                    for seed, mean, (low, high) in zip(held.seed[at].tolist(), found, edges, strict=True)
                ]
                traces.append(
                    dots(
                        beside - 0.04, found, index, arm, said,
                        marker={"color": colour(index), "symbol": "line-ew-open", "size": 10, "line": {"width": 2}},
                        error_y=bars(numbers(found), [(float(low), float(high)) for low, high in edges], colour(index)),
                    )
                )  # fmt: skip
                traces.append(dots(beside + 0.04, held.y[at], index, arm, _hover(held.where(held.depth == depth))))
            rows += [
                {
                    "arm": arm, "quantity": quantity, "over": MAIN_SIZE, "fitted_to_depth": prediction.fitted_to,
                    "depth": d, "seed": s, "x": x, "actual": y, "predicted": float(p), "low": float(lo),
                    "high": float(hi),
                }
                for (d, s, x, y), p, lo, hi in zip(
                    _columns(held, held.y), prediction.predicted, *prediction.interval, strict=True
                )
            ]  # fmt: skip
        if traces:
            layout = {
                "xaxis": axis(
                    "",
                    tickvals=list(range(len(ticks))),
                    ticktext=ticks,
                    range=[-0.5, len(ticks) - 0.5],
                    showgrid=False,
                    zeroline=False,
                    tickangle=0,
                ),
                "yaxis": axis(QUANTITIES[quantity]),
            }
            panels.append(Panel(title_of(quantity), traces, layout, 300))
    if not panels:
        return None
    fitted_to = rows[0]["fitted_to_depth"]
    caption = (
        f"A power law in {SIZES[MAIN_SIZE]} was fitted to runs of at most {fitted_to} layers and asked for the deeper "
        "ones. Bar: prediction with the 95% interval of one run, for each seed with what it adds at every depth. Mark "
        "beside it: the run itself."
    )
    return Plot("extrapolation", panels, caption, rows, swatches(study.arms), small=len(panels) == 3)


def _curves(
    study: ScalingStudy, cases: list[tuple[str, Case]], title: str, log_y=False, residuals=False, means=False
) -> tuple[Panel, list[Row]]:
    """Runs and fitted curves of all arms on one pair of axes; residuals on a second pair below."""
    bands: list[dict] = []
    lines: list[dict] = []
    marks: list[dict] = []
    notes: list[tuple[str, float, float, str]] = []
    rows: list[Row] = []
    for arm, case in cases:
        points, index = case.points, study.arms.index(arm)
        stroke = colour(index)
        fitted = case.fit.families["power"].solution.predict(points.x)[0] if case.fit else None
        small = {"marker": {"color": stroke, "size": 5, "opacity": 0.55}} if means else {}
        marks.append(dots(points.x, points.y, index, arm, _hover(points), **small))
        ends = points.x[-1], points.y[-1]
        if case.fit and fitted is not None:
            x = np.geomspace(points.x.min(), points.x.max(), GRID_POINTS)
            y = case.fit.families["power"].solution.predict(x)[0]
            low, high = case.fit.power.band(x)
            bands.append(band(x, np.maximum(low, 1e-12), high, stroke))
            lines.append(line(x, y, stroke, arm))
            ends = x[-1], y[-1]
            if residuals:
                shift = 100 * (points.y / fitted - 1)
                marks.append(dots(points.x, shift, index, arm, _hover(points, shift), yaxis="y2"))
        if means:
            marks += _means(points, index, arm)
        notes.append((arm, np.log10(ends[0]), np.log10(ends[1]) if log_y else ends[1], stroke))
        rows += [
            {
                "arm": arm, "over": points.size, "quantity": points.quantity, "depth": d, "seed": s, "x": x, "value": y,
                "fitted": float(fitted[i]) if fitted is not None else None,
                "band_low": float(edges[0]) if edges is not None else None,
                "band_high": float(edges[1]) if edges is not None else None,
            }
            for i, (d, s, x, y) in enumerate(_columns(points, points.y))
            for edges in [case.fit.power.band(np.array([x]))[:, 0] if case.fit else None]
        ]  # fmt: skip
    size, quantity = cases[0][1].points.size, cases[0][1].points.quantity
    shown = [float(y) for _, case in cases for y in case.points.y]
    low, high = (np.log10(min(shown)), np.log10(max(shown))) if log_y else (min(shown), max(shown))
    layout: dict[str, Any] = {
        "xaxis": axis(
            size_title(size, quantity), log=True, **_ticks(size, [float(x) for _, case in cases for x in case.points.x])
        ),
        "yaxis": axis(QUANTITIES[quantity], log=log_y),
        "annotations": end_labels(notes, low, high, 260),
        "margin": _margin(study),
    }
    if residuals:
        layout["xaxis"] |= {"anchor": "y2"}
        layout["yaxis"] |= {"domain": [0.34, 1]}
        layout["yaxis2"] = axis("residual, %", domain=[0, 0.24], zeroline=True, zerolinecolor=SOFT)
    return Panel(title, bands + lines + marks, layout, 440 if residuals else 340), rows


def _means(points: Points, index: int, arm: str) -> list[dict]:
    """Means over seeds with their intervals, at the mean size of a depth."""
    x, y, edges, hover = [], [], [], []
    values: dict[int, dict[int, float]] = {}
    for depth, seed, _, value in _columns(points, points.y):
        values.setdefault(depth, {})[seed] = value
    for depth in points.depths:
        at = points.depth == depth
        found = mean_of(values, depth)
        if found.interval:
            x.append(np.exp(np.log(points.x[at]).mean()))
            y.append(found.mean)
            edges.append(found.interval)
            hover.append(
                f"{arm}, {depth} layers\nmean {found.mean:.4f} of {found.num_seeds} seeds\n"
                f"95% {found.interval[0]:.4f} to {found.interval[1]:.4f}"
            )
    return [dots(x, y, index, arm, hover, error_y=bars(y, edges, colour(index)))] if x else []


def _cases(study: ScalingStudy, size: str, quantity: str) -> list[tuple[str, Case]]:
    found = ((arm, study.case(arm, size, quantity)) for arm in study.arms)
    return [(arm, case) for arm, case in found if case]


def _columns(points: Points, values: np.ndarray):
    """Plain (depth, seed, x, value) of each run."""
    return [
        (int(d), int(s), float(x), float(v))
        for d, s, x, v in zip(points.depth, points.seed, points.x, values, strict=True)
    ]


def _hover(points: Points, residual: np.ndarray | None = None) -> list[str]:
    said = []
    for i, (depth, seed, x, y) in enumerate(_columns(points, points.y)):
        where = f"C = {scientific(x)}" if points.size == COMPUTE else f"N = {si(x)}"
        text = f"{points.arm}, {depth} layers, seed {seed}\n{where}\n{QUANTITIES[points.quantity]}: {y:.4f}"
        said.append(text if residual is None else f"{text}\nresidual {residual[i]:+.2f}%")
    return said


def _short(size: str) -> str:
    return "training compute" if size == COMPUTE else SIZES[size]


def _ticks(size: str, values: Sequence[float]) -> dict[str, Any]:
    return log_ticks(values, power=size == COMPUTE) or ({"exponentformat": "power"} if size == COMPUTE else {})


def _margin(study: ScalingStudy) -> dict[str, int]:
    """Room for the names at the right."""
    longest = max(len(arm) for arm in study.arms)
    return {"l": 58, "r": 14 + 8 * min(longest, 14), "t": 26, "b": 46}
