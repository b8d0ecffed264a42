"""All fits, verdicts and claims of a sweep, computed once for the page and for report.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from genrec_dist.studies.scaling.claims import ClaimVerdict, judge_all
from genrec_dist.studies.scaling.fits import NUM_RESAMPLES, Fit, fit_all
from genrec_dist.studies.scaling.points import QUANTITIES, SIZES, Points, arms_of, finished, points_of
from genrec_dist.studies.scaling.trials import Trial
from genrec_dist.studies.scaling.verdicts import Verdict, judge_power_law

MAIN_SIZE = "non_embedding"
"""The counting convention of figures and verdicts; the others are shown beside it."""


@dataclass(frozen=True)
class Case:
    """One arm's quantity over one size: points, fit and verdict."""

    points: Points
    fit: Fit | None
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        """For report.json: parameters, intervals, criteria, extrapolation and verdict."""
        record: dict[str, Any] = {
            "arm": self.points.arm,
            "over": self.points.size,
            "quantity": self.points.quantity,
            "num_runs": len(self.points.x),
            "depths": self.points.depths,
            "power_law_supported": self.verdict.supported,
            "verdict": self.verdict.sentence,
            "against": self.verdict.against,
            "trust": self.verdict.trust,
        }
        if self.fit is None:
            return record
        power, prediction = self.fit.power, self.fit.prediction
        floor = "E" if self.points.sign > 0 else "M_inf"
        record["power_law"] = {
            floor: power.e,
            f"{floor}_interval": power.e_interval,
            "A": power.a,
            "A_interval": power.a_interval,
            "alpha": power.alpha,
            "alpha_interval": power.alpha_interval,
            "noise_of_log": power.noise,
        }
        record["families"] = {
            name: {
                "aicc": family.aicc if family.aicc < float("inf") else None,
                "left_out_depth_relative_error": family.left_out_error,
                "summed_huber": float(family.solution.objective[0]),
            }
            for name, family in self.fit.families.items()
        }
        if prediction:
            record["extrapolation"] = {
                "fitted_to_depth": prediction.fitted_to,
                "alpha": prediction.power.alpha,
                "depths": prediction.held_out.depths,
                "inside_interval": int(prediction.inside.sum()),
                "num_runs": len(prediction.inside),
                "mean_relative_error": prediction.error,
            }
        return record


@dataclass(frozen=True)
class ScalingStudy:
    """A sweep with everything that was computed from it."""

    trials: Sequence[Trial]
    cases: dict[tuple[str, str, str], Case] = field(default_factory=dict)
    claims: Sequence[ClaimVerdict] = ()

    @property
    def arms(self) -> list[str]:
        """Systems in the order in which they first appear."""
        return arms_of(self.trials)

    @property
    def finished(self) -> list[Trial]:
        """Trials with numbers."""
        return finished(self.trials)

    def case(self, arm: str, size: str, quantity: str) -> Case | None:
        """None where no finished run has both numbers."""
        return self.cases.get((arm, size, quantity))

    def quantities(self) -> list[str]:
        """Those that at least one run has, the loss first."""
        return [quantity for quantity in QUANTITIES if any(key[2] == quantity for key in self.cases)]


def study_of(trials: Sequence[Trial], num_resamples: int = NUM_RESAMPLES) -> ScalingStudy:
    """Fit and judge everything.

    Raises:
        DataError: trials contradict each other (see points.py).
    """
    cases = {}
    for arm in arms_of(trials):
        for quantity in QUANTITIES:
            for size in SIZES:
                points = points_of(trials, arm, size, quantity)
                if len(points.x):
                    fit = fit_all(points, num_resamples)
                    cases[arm, size, quantity] = Case(points, fit, judge_power_law(points, fit))
    return ScalingStudy(list(trials), cases, judge_all(trials))
