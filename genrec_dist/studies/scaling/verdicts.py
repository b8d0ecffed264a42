"""Whether runs support a power law, in words, and how far to trust it. Reads fits; computes nothing new."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.stats import spearmanr

from genrec_dist.studies.scaling.curves import LARGEST_EXPONENT, SMALLEST_EXPONENT, CurveName
from genrec_dist.studies.scaling.fits import Fit
from genrec_dist.studies.scaling.points import COMPUTE, Points

MIN_DEPTHS, MIN_DECADES = 5, 1.0
AT_ZERO = 1.02 * SMALLEST_EXPONENT
"""An exponent of less, over decades of size, is a logarithm or a constant: the grid of the search starts there."""
MIN_ORDER = 0.9
"""Rank correlation of depth and compute from which on a curve over compute is one of size."""
SAME_PART = 4.0
"""Lowest losses at epochs further apart than by this factor are of different parts of the training."""
TOLD_APART = 2.0
"""Difference in AICc under which two families describe the runs equally well."""
RIVALS: dict[CurveName, str] = {
    "constant": "a constant",
    "saturating": "a curve that saturates",
    "peaked": "a curve that turns back inside the range",
}
"""Families that speak against a power law where they describe the runs better."""


@dataclass(frozen=True)
class Verdict:
    """The word on one arm, size and quantity.

    Args:
        supported: a power law is.
        sentence: the verdict.
        against: reasons against a power law, each sufficient.
        trust: how far to trust what is supported, or what the fit says nevertheless.
    """

    supported: bool
    sentence: str
    against: list[str] = field(default_factory=list)
    trust: list[str] = field(default_factory=list)


def judge_power_law(points: Points, fit: Fit | None) -> Verdict:
    """Whether a power law is supported: enough sizes and range, an exponent apart from zero, no better rival.

    Args:
        points: what was to be fitted.
        fit: None where there was too little to fit.
    """
    against = []
    if len(points.depths) < MIN_DEPTHS:
        against.append(f"{len(points.depths)} sizes, fewer than {MIN_DEPTHS}")
    if points.decades < MIN_DECADES:
        what = "compute" if points.size == COMPUTE else "parameters"
        against.append(f"{points.decades:.2f} decades of {what}, under {MIN_DECADES:g}")
    order = _order(points)
    if order < MIN_ORDER:
        against.append(
            f"compute does not rise with depth (rank correlation {order:.2f}): what differs along it is when a run's "
            "number was taken"
        )
    if fit is None:
        if (points.y <= 0).any():
            against.append("a run scored 0, and fits are of logarithms")
        elif not against:
            against.append("too few sizes to fit")
        return Verdict(False, f"No power law supported: {'; '.join(against)}.", against)
    low, high = fit.power.alpha_interval
    if low <= 0 <= high:
        against.append(f"the 95% interval of α, {low:.2f} to {high:.2f}, crosses zero")
    elif 0 < low < AT_ZERO or -AT_ZERO < high < 0:
        against.append(
            f"the 95% interval of α, {low:.2f} to {high:.2f}, comes within {SMALLEST_EXPONENT:g} of zero, "
            "from which nothing tells it"
        )
    elif high < 0:
        more = "more compute does" if points.size == COMPUTE else "larger models do"
        against.append(f"α is negative ({low:.2f} to {high:.2f}): {more} worse")
    if abs(fit.power.alpha) > 0.98 * LARGEST_EXPONENT:
        against.append(f"α runs to its bound of {LARGEST_EXPONENT:g}: a step from the smallest size, not a power law")
    power = fit.families["power"].aicc
    better = [name for name in RIVALS if fit.families[name].aicc < power]
    if not fit.comparable:
        against.append(f"{len(points.x)} runs are too few to tell a power law from other curves")
    elif better:
        best = min(better, key=lambda name: fit.families[name].aicc)
        gap = power - fit.families[best].aicc
        against.append(f"{RIVALS[best]} describes the runs better (AICc lower by {gap:.1f})")
    trust = _trust(fit)
    if against:
        return Verdict(False, f"No power law supported: {'; '.join(against)}.", against, trust)
    letter = "C" if points.size == COMPUTE else "N"
    sentence = f"A power law in {letter} is supported, α = {fit.power.alpha:.2f} (95% {low:.2f} to {high:.2f})."
    return Verdict(True, sentence, [], trust)


def _order(points: Points) -> float:
    """Rank correlation of depth and a depth's mean compute; 1 where x is no compute or there is one depth."""
    if points.size != COMPUTE or len(points.depths) < 2:
        return 1.0
    return float(
        spearmanr(points.depths, [np.log(points.x[points.depth == d]).mean() for d in points.depths]).statistic
    )


def _trust(fit: Fit) -> list[str]:
    """What limits the fit: range, seeds, part of the training, floor, rivals, the extrapolation test."""
    points, power = fit.points, fit.power
    said = [f"{len(points.depths)} sizes over {points.decades:.1f} decades, {len(points.x)} runs"]
    seeds = [int((points.depth == depth).sum()) for depth in points.depths]
    if max(seeds) == 1:
        said.append("one seed a size: the noise is judged by the scatter about the curve alone")
    if np.nanmax(points.epoch, initial=-np.inf) > SAME_PART * np.nanmin(points.epoch, initial=np.inf):
        said.append(
            f"the loss was lowest at epochs {points.epoch.min():g} to {points.epoch.max():g}: sizes are compared at "
            "different parts of their training"
        )
    floor = "E" if points.sign > 0 else "M∞"
    low, high = power.e_interval
    if points.sign > 0 and low <= 0.01 * power.e:
        said.append(f"the runs do not tell {floor} from 0")
    elif points.sign < 0 and high >= 0.99 * points.limit:
        said.append(f"the runs do not bound {floor} below {points.limit:g}")
    if fit.comparable:
        aicc = {name: family.aicc - fit.families["power"].aicc for name, family in fit.families.items()}
        if aicc["log_linear"] < 0:
            said.append(
                "a straight line in its logarithm describes the runs as well with one parameter less: no floor is seen"
            )
        said += [f"{RIVALS[name]} describes the runs as well" for name in RIVALS if 0 <= aicc[name] < TOLD_APART]
    prediction = fit.prediction
    if prediction is None:
        said.append("not tested on deeper runs: nothing says that it holds beyond the largest size")
        return said
    inside, total = int(prediction.inside.sum()), len(prediction.inside)
    depths = " and ".join(map(str, prediction.held_out.depths))
    said.append(
        f"fitted up to {prediction.fitted_to} layers, it has {inside} of {total} runs of {depths} layers in its 95% "
        f"prediction intervals, {abs(prediction.error):.1%} too {'high' if prediction.error > 0 else 'low'} on average"
    )
    return said
