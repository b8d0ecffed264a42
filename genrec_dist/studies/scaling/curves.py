"""Curves y = c0 ± c1 f(x; theta) fitted in log space by variable projection, many resamples at once.

A curve has two linear parameters and at most one that is not, theta. For each theta of a dense grid the linear two are
solved for, under their bounds, by Gauss-Newton steps with Huber weights; the grid is then refined around the best
theta. So a whole axis is searched instead of hoping for starts, and arrays carry the resamples of a bootstrap along.
Knows nothing of trials.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

DELTA = 1e-3
"""Where the Huber loss turns from quadratic to linear, in units of log y (Hoffmann et al. 2022, approach 3)."""

CurveName = Literal["constant", "log_linear", "power", "saturating", "peaked"]
STEPS, ZOOM_POINTS, NEAR, CHUNK = 8, 7, 3, 64
LARGEST_EXPONENT, SMALLEST_EXPONENT = 4.0, 0.004


@dataclass(frozen=True)
class Curve:
    """One family.

    Args:
        name: of the family; docs/scaling_report.md has the formulas.
        num_parameters: of the curve, without the scale of the noise.
        shape: f(x, theta), x in units of its geometric mean; arrays that broadcast.
        grid: values of theta to search, from x.
        signed: the second coefficient may be negative.
    """

    name: CurveName
    num_parameters: int
    shape: Callable[[np.ndarray, np.ndarray], np.ndarray]
    grid: Callable[[np.ndarray], np.ndarray]
    signed: bool = False


def _exponents(x: np.ndarray) -> np.ndarray:
    positive = np.geomspace(SMALLEST_EXPONENT, LARGEST_EXPONENT, 36)
    return np.concatenate([-positive[::-1], positive])


def _rates(x: np.ndarray) -> np.ndarray:
    return np.geomspace(0.2 / x.max(), 6.0 / x.min(), 40)


def _peaks(x: np.ndarray) -> np.ndarray:
    sizes = np.log(np.unique(x))
    inner = sizes[1:-1] if len(sizes) > 2 else sizes
    return np.linspace(inner[0], inner[-1], 24)


CURVES: dict[CurveName, Curve] = {
    curve.name: curve
    for curve in (
        Curve("constant", 1, lambda x, theta: 0 * (x + theta), lambda x: np.ones(1)),
        Curve("log_linear", 2, lambda x, theta: -np.log(x) + 0 * theta, lambda x: np.ones(1), True),
        Curve("power", 3, lambda x, theta: x**-theta, _exponents),
        Curve("saturating", 3, lambda x, theta: np.exp(-theta * x), _rates),
        Curve("peaked", 3, lambda x, theta: (np.log(x) - theta) ** 2, _peaks),
    )
}
"""Families: LAST1, LOG2, POW3, EXP3 of Viering and Loog 2022 (The Shape of Learning Curves, table 1), and a parabola in
log N whose best size lies inside the range, for systems that get worse again."""


def huber(residual: np.ndarray, delta: float = DELTA) -> np.ndarray:
    """Huber loss of each residual: r²/2 up to delta, then delta (|r| - delta/2)."""
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


@dataclass(frozen=True)
class Solution:
    """Best parameters, one entry a resample.

    Shapes:
        all: (num_resamples,) float64. c0, c1 and theta belong to x in units of `unit`.
        objective: sum of Huber losses over the points that count.
    """

    curve: Curve
    sign: int
    unit: float
    c0: np.ndarray
    c1: np.ndarray
    theta: np.ndarray
    objective: np.ndarray

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Values at x.

        Shapes:
            x: (num_points,). Returns (num_resamples, num_points).
        """
        f = self.curve.shape(np.asarray(x, float)[None] / self.unit, self.theta[:, None])
        return self.c0[:, None] + self.sign * self.c1[:, None] * f


def solve(
    curve: Curve,
    x: np.ndarray,
    log_y: np.ndarray,
    sign: int = 1,
    limit: float = np.inf,
    delta: float = DELTA,
    unit: float | None = None,
    kept: np.ndarray | None = None,
) -> Solution:
    """Fit a curve to one set of points, or to each of many.

    One set gets the whole grid under the Huber loss. Of many, each gets the grid under least squares of relative
    errors, which are a few matrix products, and the Huber loss around the best theta of each sign.

    Args:
        curve: family.
        x: sizes.
        log_y: logarithm of what was measured.
        sign: 1 for a loss (c0 + c1 f), -1 for a metric (c0 - c1 f).
        limit: largest c0; 1 for a metric that cannot exceed it.
        delta: of the Huber loss.
        unit: of x inside; its geometric mean by default.
        kept: which points count, for each set; None: all.

    Shapes:
        x: (num_points,); log_y: (num_points,) or (num_sets, num_points); kept: (num_sets, num_points) bool.
    """
    unit = unit or float(np.exp(np.log(x).mean()))
    scaled = x / unit
    log_y = np.atleast_2d(log_y)
    bounds = ((0.0, limit), (-np.inf if curve.signed else 0.0, 0.0 if curve.name == "constant" else np.inf))
    whole = curve.grid(scaled)
    parts = []
    for first in range(0, len(log_y), CHUNK):
        some = log_y[first : first + CHUNK]
        counted = None if kept is None else kept[first : first + CHUNK]
        if len(log_y) == 1 or len(whole) == 1:
            grid = np.broadcast_to(whole, (len(some), len(whole)))
        else:
            grid = _promising(curve, scaled, some, sign, bounds, whole, counted)
        parts.append(_search(curve, scaled, some, sign, bounds, delta, grid, 6 if len(log_y) == 1 else 3, counted))
    c0, c1, theta, objective = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Solution(curve, sign, unit, c0, c1, theta, objective)


def _search(curve, x, log_y, sign, bounds, delta, grid, zooms, kept):
    """Best (c0, c1, theta, objective) of each set, from a grid that is refined around its best point."""
    zooms = zooms if grid.shape[1] > 1 else 0
    kept = None if kept is None else kept[:, None]
    for zoom in range(zooms + 1):
        f = curve.shape(x, grid[..., None])
        c0, c1, objective = _linear_part(f, log_y[:, None], sign, bounds, delta, kept)
        best = objective.argmin(axis=1)[:, None]
        if zoom < zooms:
            low, middle, high = (
                np.take_along_axis(grid, np.clip(best + shift, 0, grid.shape[1] - 1), 1) for shift in (-1, 0, 1)
            )
            half = np.linspace(0, 1, ZOOM_POINTS // 2 + 1)
            grid = np.concatenate([low + (middle - low) * half[:-1], middle + (high - middle) * half], axis=1)
    return [np.take_along_axis(part, best, 1)[:, 0] for part in (c0, c1, grid, objective)]


def _promising(curve, x, log_y, sign, bounds, whole, kept):
    """Thetas near the least-squares optimum of every set, for each sign of theta. Returns (num_sets, num_thetas)."""
    g = sign * curve.shape(x, whole[:, None])
    over = np.exp(-log_y) if kept is None else np.exp(-log_y) * kept
    square = over**2
    sums = [square.sum(-1)[:, None], square @ g.T, square @ (g**2).T, over.sum(-1)[:, None], over @ g.T]
    s00, s01, s11, b0, b1 = np.broadcast_arrays(*sums)
    c0, c1 = _in_box(s00, s01, s11, b0, b1, bounds)
    value = s00 * c0**2 + 2 * s01 * c0 * c1 + s11 * c1**2 - 2 * (b0 * c0 + b1 * c1)
    found = []
    for side in ((whole < 0), (whole >= 0)):
        places = np.flatnonzero(side)
        if len(places):
            best = value[:, places].argmin(1)[:, None] + np.arange(-NEAR, NEAR + 1)
            found.append(whole[places][np.clip(best, 0, len(places) - 1)])
    return np.concatenate(found, axis=1)


def _linear_part(f, log_y, sign, bounds, delta, kept):
    """Bounded c0 and c1 for every (set, theta), and the objective there.

    Gauss-Newton on log(c0 ± c1 f) - log y from the least-squares solution of relative errors; each step solves a
    weighted 2 x 2 problem in the box of the bounds. No step takes a prediction below a third of the last, so that
    logarithms exist.

    Shapes:
        f: (1 or num_sets, num_thetas, num_points); log_y, kept: (num_sets, 1, num_points).
    """
    g = sign * f
    over = np.exp(-log_y) if kept is None else np.exp(-log_y) * kept
    square = np.broadcast_to(over**2, np.broadcast_shapes(g.shape, log_y.shape))
    first = square * g
    c0, c1 = _in_box(
        square.sum(-1), first.sum(-1), (first * g).sum(-1), over.sum(-1) + 0 * g[..., 0], (over * g).sum(-1), bounds
    )
    p = np.maximum(c0[..., None] + g * c1[..., None], np.exp(log_y) / 3)
    best = None
    for step in range(STEPS + 1):
        if kept is not None:
            p = np.where(kept, p, 1.0)  # a point left out may be predicted below zero
        residual = np.log(p) - log_y
        size = np.maximum(np.abs(residual), delta)
        # Huber: r²/2 inside delta, delta |r| - delta²/2 outside; written with the clipped size, once for both.
        losses = 0.5 * np.minimum(residual**2, delta**2) + delta * (size - delta)
        objective = losses.sum(-1) if kept is None else (losses * kept).sum(-1)
        if best is None:
            best = [c0, c1, objective]
        else:
            better = objective < best[2]
            best = [np.where(better, new, old) for new, old in zip((c0, c1, objective), best, strict=True)]
        if step == STEPS:
            return best
        w1 = 1 / (size * p) if kept is None else kept / (size * p)
        w2 = w1 / p
        target = w1 - w1 * residual
        w2g = w2 * g
        t0, t1 = _in_box(w2.sum(-1), w2g.sum(-1), (w2g * g).sum(-1), target.sum(-1), (target * g).sum(-1), bounds)
        goal = t0[..., None] + g * t1[..., None]
        room = 2 / 3 * p / np.maximum(p - goal, 1e-300)
        room = np.minimum((room if kept is None else np.where(kept, room, 1.0)).min(-1), 1.0)
        c0, c1 = c0 + room * (t0 - c0), c1 + room * (t1 - c1)
        p = p + room[..., None] * (goal - p)
    return best


def _in_box(s00, s01, s11, b0, b1, bounds):
    """Minimum of c'Sc - 2 b'c in a box: the free one where it is feasible, else the best on an edge."""
    (low0, high0), (low1, high1) = bounds
    with np.errstate(divide="ignore", invalid="ignore"):
        determinant = s00 * s11 - s01**2
        free0 = (s11 * b0 - s01 * b1) / determinant
        free1 = (s00 * b1 - s01 * b0) / determinant
        inside = (
            (determinant > 1e-14 * s00 * s11)
            & (free0 >= low0) & (free0 <= high0) & (free1 >= low1) & (free1 <= high1)
        )  # fmt: skip
        candidates = []
        for c0 in (low0, high0):
            if np.isfinite(c0):
                c1 = np.nan_to_num(np.clip((b1 - s01 * c0) / s11, low1, high1))
                candidates.append((np.full_like(b0, c0), c1))
        for c1 in (low1, high1):
            if np.isfinite(c1):
                candidates.append((np.clip((b0 - s01 * c1) / s00, low0, high0), np.full_like(b0, c1)))
    value = np.stack([s00 * p**2 + 2 * s01 * p * q + s11 * q**2 - 2 * (b0 * p + b1 * q) for p, q in candidates])
    chosen = value.argmin(0)[None]
    edge = [np.take_along_axis(np.stack(part), chosen, 0)[0] for part in zip(*candidates, strict=True)]
    return np.where(inside, free0, edge[0]), np.where(inside, free1, edge[1])
