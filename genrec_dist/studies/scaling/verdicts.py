"""Whether runs support a power law, in words, and how far to trust it. Reads fits; computes nothing new."""

from __future__ import annotations

from dataclasses import dataclass, field

from genrec_dist.studies.scaling.curves import LARGEST_EXPONENT, SMALLEST_EXPONENT, CurveName
from genrec_dist.studies.scaling.fits import Fit
from genrec_dist.studies.scaling.points import COMPUTE, Points

MIN_DEPTHS, MIN_DECADES = 5, 1.0
AT_ZERO = 1.02 * SMALLEST_EXPONENT
"""An exponent of less, over decades of size, is a logarithm or a constant: the grid of the search starts there."""
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
            f"the 95% interval of α, {low:.2f} to {high:.2f}, begins within {SMALLEST_EXPONENT:g} of zero, "
            "from which nothing tells it"
        )
    elif high < 0:
        against.append(f"α is negative ({low:.2f} to {high:.2f}): larger models do worse")
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


def _trust(fit: Fit) -> list[str]:
    """What limits the fit: range, seeds, floor, rival in log N, the extrapolation test."""
    points, power = fit.points, fit.power
    said = [f"{len(points.depths)} sizes over {points.decades:.1f} decades, {len(points.x)} runs"]
    seeds = [int((points.depth == depth).sum()) for depth in points.depths]
    if max(seeds) == 1:
        said.append("one seed a size: the noise is judged by the scatter about the curve alone")
    floor = "E" if points.sign > 0 else "M∞"
    low, high = power.e_interval
    if points.sign > 0 and low <= 0.01 * power.e:
        said.append(f"the runs do not tell {floor} from 0")
    elif points.sign < 0 and high >= 0.99 * points.limit:
        said.append(f"the runs do not bound {floor} below {points.limit:g}")
    if fit.comparable and fit.families["log_linear"].aicc < fit.families["power"].aicc:
        said.append(
            "a straight line in its logarithm describes the runs as well with one parameter less: no floor is seen"
        )
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
