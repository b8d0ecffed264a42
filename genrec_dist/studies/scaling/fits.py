"""Scaling fits of one arm: parameters with intervals, choice between families, prediction of runs left out.

All runs enter, no mean over seeds does. What a seed adds to the log at every depth (its order of batches, Stage I,
codes) is no noise of the run: it is estimated from runs of one depth (seeds.py) and taken out. The loss is the
sum over runs of Huber losses of log residuals with delta = 0.001 (Hoffmann et al. 2022, approach 3). Besiroglu et al.
2024 showed what went wrong there: the mean instead of the sum let the optimiser stop early, and the intervals came out
too narrow. Here the search is exhaustive (curves.py) and a test measures how often the intervals cover the truth. Reads
points, writes nothing, draws nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import erf

from genrec_dist.studies.scaling.curves import CURVES, DELTA, Curve, CurveName, Solution, huber, solve
from genrec_dist.studies.scaling.points import Points
from genrec_dist.studies.scaling.seeds import TwoWay

NUM_RESAMPLES = 1000
TURNS = 4
"""Further fits of a curve and of what seeds add, in turn, where x differs between the runs of one depth."""
HELD_OUT_ABOVE = 16
"""Layers up to which the extrapolation test fits; it predicts the deeper ones."""
CONFIDENCE = 0.95
TAILS = (0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2)

Interval = tuple[float, float]


@dataclass(frozen=True)
class FamilyFit:
    """One family fitted to all points.

    Args:
        solution: its parameters.
        aicc: Akaike's criterion for small samples; lower is better, infinite where there are too few runs.
        left_out_error: root mean square relative error at depths that were left out in turn.
    """

    solution: Solution
    aicc: float
    left_out_error: float

    @property
    def curve(self) -> Curve:
        """Which family."""
        return self.solution.curve


@dataclass(frozen=True)
class PowerLaw:
    """E + A N^-alpha, or M∞ - A N^-alpha for a metric, of the runs' seeds in the mean, with bootstrap intervals.

    Args:
        e, a, alpha: of N as it is counted, not rescaled.
        e_interval, a_interval, alpha_interval: 95%.
        resamples: the bootstrap's fits.
        noise: scale of one run's log residual, a standard deviation.
        offsets: what a seed adds to the log at every depth; entry 0: found, the others: of the resamples.

    Shapes:
        offsets: seed -> (1 + num_resamples,).
    """

    e: float
    a: float
    alpha: float
    e_interval: Interval
    a_interval: Interval
    alpha_interval: Interval
    resamples: Solution
    noise: float
    offsets: dict[int, np.ndarray]

    def band(self, x: np.ndarray) -> np.ndarray:
        """95% confidence band of the curve. Returns (2, num_points)."""
        return np.quantile(self.resamples.predict(x), TAILS, axis=0)


@dataclass(frozen=True)
class Prediction:
    """Held-out runs beside what a power law through the smaller ones says of them.

    Args:
        fitted_to: deepest depth of the fit.
        held_out: the deeper runs of seeds that have shallower ones.
        power: fitted to the others.
        predicted: value at each held-out run, of its seed.
        interval: 95% prediction interval of one run there: of the curve, the seed's offset and a run's own noise.

    Shapes:
        predicted: (num_held_out,); interval: (2, num_held_out).
    """

    fitted_to: int
    held_out: Points
    power: PowerLaw
    predicted: np.ndarray
    interval: np.ndarray

    @property
    def inside(self) -> np.ndarray:
        """Which runs lie in their interval. (num_held_out,) bool."""
        return (self.interval[0] <= self.held_out.y) & (self.held_out.y <= self.interval[1])

    @property
    def error(self) -> float:
        """Mean signed relative error: positive where the prediction was too high."""
        return float((self.predicted / self.held_out.y - 1).mean())


@dataclass(frozen=True)
class Fit:
    """Everything that was fitted to one arm, size and quantity."""

    points: Points
    families: dict[CurveName, FamilyFit]
    power: PowerLaw
    prediction: Prediction | None

    @property
    def comparable(self) -> bool:
        """Whether the runs are enough to tell a power law from other families: its AICc is finite."""
        return math.isfinite(self.families["power"].aicc)

    @property
    def best(self) -> FamilyFit | None:
        """The family with the lowest AICc; None where too few runs tell families apart."""
        return min(self.families.values(), key=lambda family: family.aicc) if self.comparable else None


def fit_all(points: Points, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Fit | None:
    """Fit every family.

    Args:
        points: of one arm.
        num_resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        None with fewer than three depths, where a power law passes through anything, or where a run scored 0, which
        has no logarithm.
    """
    if len(points.depths) < 3 or not (points.y > 0).all():
        return None
    families = {name: _fit_family(points, curve) for name, curve in CURVES.items()}
    power = bootstrap(points, num_resamples, seed)
    return Fit(points, families, power, predict_held_out(points, num_resamples, seed))


def fit_curve(points: Points, name: CurveName) -> Solution:
    """One family through all points, what their seeds add taken out."""
    return _fit(points, CURVES[name], np.log(points.y), _effects(points))[0]


def _effects(points: Points) -> np.ndarray:
    return TwoWay(points.depth, points.seed).effects


def _fit(
    points: Points,
    curve: Curve,
    log_y: np.ndarray,
    effects: np.ndarray,
    unit: float | None = None,
    kept: np.ndarray | None = None,
) -> tuple[Solution, np.ndarray]:
    """A curve and what the seeds add beside it, of one set of values or of many.

    What a seed adds is judged by what runs of one depth leave of the curve. Where x is the same at a depth the curve
    has no part in that, and once is enough. Compute differs between runs of one depth: then curve and offsets are
    fitted by turns.

    Shapes:
        log_y: (num_runs,) or (num_sets, num_runs); effects: (num_runs, num_runs), or one for each set. Returns offsets
        of the runs, (num_sets, num_runs).
    """
    log_y = np.atleast_2d(log_y)
    of = lambda values: (effects @ values[..., None])[..., 0]  # noqa: E731
    of_size = len(np.unique(np.stack([points.depth, points.x]), axis=1).T) == len(points.depths)
    offsets = of(log_y) if of_size else np.zeros_like(log_y)
    solution = solve(curve, points.x, log_y - offsets, points.sign, points.limit, unit=unit, kept=kept)
    for _ in range(0 if of_size or not effects.any() else TURNS):
        offsets = of(log_y - np.log(solution.predict(points.x)))
        solution = solve(curve, points.x, log_y - offsets, points.sign, points.limit, unit=unit, kept=kept)
    return solution, offsets


def _offset_of_seeds(points: Points, offsets: np.ndarray) -> dict[int, np.ndarray]:
    """Offsets by seed from those of the runs, (num_sets, num_runs)."""
    return {int(seed): offsets[:, points.seed == seed][:, 0] for seed in np.unique(points.seed)}


def _fit_family(points: Points, curve: Curve) -> FamilyFit:
    log_y, layout = np.log(points.y), TwoWay(points.depth, points.seed)
    solution, offsets = _fit(points, curve, log_y, layout.effects)
    residuals = log_y - offsets[0] - np.log(solution.predict(points.x)[0])
    out = points.depth == np.array(points.depths)[:, None]
    others = np.stack([_effects_without(points, chosen) for chosen in out])
    without, added = _fit(points, curve, np.broadcast_to(log_y, out.shape), others, kept=~out)
    errors = (without.predict(points.x) * np.exp(added) / points.y - 1)[out]
    left_out = float(np.sqrt((errors**2).mean()))
    return FamilyFit(solution, aicc(residuals, curve.num_parameters + layout.num_effects), left_out)


def _effects_without(points: Points, out: np.ndarray) -> np.ndarray:
    """What turns values into what each run's seed adds, judged without the runs that are out; 0 for a seed that has no
    other."""
    others, kept = points.where(~out), np.flatnonzero(~out)
    known, found = _effects(others), np.zeros((len(out), len(out)))
    for row, seed in enumerate(points.seed.tolist()):
        same = np.flatnonzero(others.seed == seed)
        if len(same):
            found[row, kept] = known[same[0]]
    return found


def aicc(residuals: np.ndarray, num_parameters: int) -> float:
    """Akaike's information criterion, corrected for small samples, under the density that the Huber loss belongs to.

    That density is exp(-huber(r) / (delta b)) / Z(b): normal within delta, exponential outside, of scale b, which
    counts as a parameter. So families are compared by the very sum that was minimised.

    Args:
        residuals: of log y, (num_runs,).
        num_parameters: of the curve and of the seeds.

    Source:
        Huber 1964 (the density); Hurvich and Tsai 1989 (the correction).
    """
    n, k = len(residuals), num_parameters + 1
    if n - k - 1 <= 0:
        return float("inf")
    total = huber(residuals).sum() / DELTA

    def negative_log_likelihood(log_b: float) -> float:
        b = np.exp(log_b)
        inner = np.sqrt(2 * np.pi * DELTA * b) * erf(np.sqrt(DELTA / (2 * b)))
        return float(n * np.log(inner + 2 * b * np.exp(-DELTA / (2 * b))) + total / b)

    best = minimize_scalar(negative_log_likelihood, bounds=(np.log(1e-7), np.log(10.0)), method="bounded")
    return 2 * k + 2 * float(best.fun) + 2 * k * (k + 1) / (n - k - 1)


def bootstrap(points: Points, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> PowerLaw:
    """Power law with percentile intervals from a smoothed bootstrap of the runs' residuals.

    Each resample keeps every run's size and draws its log residual, with replacement, from those of all runs about the
    fitted curve and their seed's offset, and estimates the offsets anew. So one seed a depth suffices, and what the
    curve fails to follow counts as noise. Two corrections keep the intervals from being too narrow: residuals are
    widened by sqrt(n / (n - k)) for the k parameters, three and the offsets, they were fitted with, and a normal kernel
    of Silverman's width is added, because a fit of absolute residuals passes exactly through some runs, whose residuals
    of zero would be drawn again and again.

    Source:
        Efron and Tibshirani 1993, 9.4 and 13.3; Davison and Hinkley 1997, 6.2.3 (widening); De Angelis, Hall and Young
        1993 (smoothing for least absolute residuals); Silverman 1986, equation 3.31 (width).
    """
    layout = TwoWay(points.depth, points.seed)
    fit, offsets = _fit(points, CURVES["power"], np.log(points.y), layout.effects)
    log_fit = np.log(fit.predict(points.x)[0])
    residuals = np.log(points.y) - offsets[0] - log_fit
    n = len(residuals)
    fitted = CURVES["power"].num_parameters + layout.num_effects
    widened = (residuals - residuals.mean()) * np.sqrt(n / max(n - fitted, 1))
    noise = float(np.sqrt((widened**2).mean()))
    rng = np.random.default_rng(seed)
    draws = rng.choice(widened, (num_resamples, n)) + rng.normal(0, 0.9 * noise * n**-0.2, (num_resamples, n))
    resamples, shifts = _fit(points, CURVES["power"], log_fit + draws, layout.effects, unit=fit.unit)

    def interval(values: np.ndarray) -> Interval:
        low, high = np.quantile(values, TAILS)
        return float(low), float(high)

    return PowerLaw(
        e=float(fit.c0[0]),
        a=float((fit.c1 * fit.unit**fit.theta)[0]),
        alpha=float(fit.theta[0]),
        e_interval=interval(resamples.c0),
        a_interval=interval(resamples.c1 * fit.unit**resamples.theta),
        alpha_interval=interval(resamples.theta),
        resamples=resamples,
        noise=noise,
        offsets=_offset_of_seeds(points, offsets + np.concatenate([np.zeros((1, n)), shifts])),
    )


def predict_held_out(
    points: Points, num_resamples: int = NUM_RESAMPLES, seed: int = 0, up_to: int = HELD_OUT_ABOVE
) -> Prediction | None:
    """Fit to the shallower runs, predict the deeper ones.

    Args:
        points: of one arm.
        num_resamples, seed: of the bootstrap.
        up_to: deepest depth of the fit.

    Returns:
        None where no seed of the shallower runs has a deeper one, or fewer than four depths are left to fit.
    """
    shallow = points.where(points.depth <= up_to)
    deep = points.where((points.depth > up_to) & np.isin(points.seed, shallow.seed))
    if len(shallow.depths) < 4 or not len(deep.x):
        return None
    power = bootstrap(shallow, num_resamples, seed)
    added = np.exp([power.offsets[seed] for seed in deep.seed.tolist()]).T
    predicted = fit_curve(shallow, "power").predict(deep.x)[0] * added[0]
    rng = np.random.default_rng((seed, 1))
    noise = rng.normal(0, power.noise, (num_resamples, len(deep.x)))
    spread = power.resamples.predict(deep.x) * added[1:] * np.exp(noise)
    return Prediction(up_to, deep, power, predicted, np.quantile(spread, TAILS, axis=0))
