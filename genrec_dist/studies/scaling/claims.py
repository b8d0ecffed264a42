"""The two claims of PRORec's Figure 6, judged by differences between depths that are paired by seed.

The paper says in words, without numbers, of Amazon Beauty: PRORec goes on improving up to 32 layers; HSTU stands still
at eight and declines beyond. Runs of one seed share the order of their batches, so their difference varies less than
that of two unrelated runs. Fits no curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from genrec_dist.studies.scaling.points import finished, value_of
from genrec_dist.studies.scaling.trials import Trial

Judgement = Literal["confirmed", "contradicted", "undecided"]


@dataclass(frozen=True)
class Claim:
    """A printed claim about depth.

    Args:
        arm: system it speaks of.
        text: the claim.
        sign: 1 if the metric should be higher at `deep` than at `base`, -1 if lower.
    """

    arm: str
    text: str
    sign: int
    base: int = 8
    deep: int = 32


CLAIMS = (
    Claim("prorec", "PRORec goes on improving up to 32 layers", 1),
    Claim("hstu", "HSTU declines beyond 8 layers", -1),
)
METRICS = ("ndcg@20", "recall@20")


@dataclass(frozen=True)
class Difference:
    """A mean over seeds with its 95% t interval; None where a single seed gives no interval.

    Source:
        Student's t over paired differences.
    """

    mean: float
    interval: tuple[float, float] | None
    num_seeds: int


@dataclass(frozen=True)
class ClaimVerdict:
    """What the runs say of a claim, in one metric.

    Args:
        difference: metric at the claim's deep depth less that at its base, by seed.
        slope: gain a doubling of the depth, from the base on, by seed.
    """

    claim: Claim
    metric: str
    judgement: Judgement
    sentence: str
    difference: Difference | None
    slope: Difference | None


def by_seed(trials: Sequence[Trial], arm: str, metric: str) -> dict[int, dict[int, float]]:
    """Values by depth, then seed, of one arm's finished trials."""
    found: dict[int, dict[int, float]] = {}
    for trial in finished(trials):
        value = value_of(trial, metric)
        if trial.arm == arm and value is not None:
            found.setdefault(trial.depth, {})[trial.seed] = value
    return found


def mean_with_interval(values: Sequence[float]) -> Difference:
    """Mean and 95% t interval of numbers that are one a seed."""
    array = np.asarray(values, float)
    mean, n = float(array.mean()), len(array)
    if n < 2:
        return Difference(mean, None, n)
    half = float(stats.t.ppf(0.975, n - 1) * array.std(ddof=1) / np.sqrt(n))
    return Difference(mean, (mean - half, mean + half), n)


def paired(values: dict[int, dict[int, float]], depth: int, base: int) -> Difference | None:
    """Difference between two depths over the seeds that both have; None without one."""
    seeds = sorted(values.get(depth, {}).keys() & values.get(base, {}).keys())
    return mean_with_interval([values[depth][s] - values[base][s] for s in seeds]) if seeds else None


def judge(trials: Sequence[Trial], claim: Claim, metric: str) -> ClaimVerdict:
    """Judge a claim: confirmed or contradicted when the interval of the paired difference lies on one side of zero."""
    values = by_seed(trials, claim.arm, metric)
    difference, slope = paired(values, claim.deep, claim.base), _slope(values, claim)
    name = f"{metric.replace('ndcg', 'NDCG').replace('recall', 'Recall')}, {claim.deep} against {claim.base} layers"
    if difference is None:
        missing = [str(depth) for depth in (claim.base, claim.deep) if not values.get(depth)]
        why = (
            f"no finished run of {claim.arm} at {' or '.join(missing)} layers" if missing else "no seed has both depths"
        )
        return ClaimVerdict(claim, metric, "undecided", f"{name}: {why}.", None, slope)
    shared = values[claim.deep].keys() & values[claim.base].keys()
    base_mean = float(np.mean([values[claim.base][s] for s in shared]))
    seeds = f"{difference.num_seeds} seed{'s' if difference.num_seeds > 1 else ''}"
    said = f"{name}: {difference.mean:+.4f} ({difference.mean / base_mean:+.1%})" if base_mean else name
    if difference.interval is None:
        sentence = f"{said}, one seed, so no interval."
        return ClaimVerdict(claim, metric, "undecided", sentence, difference, slope)
    low, high = difference.interval
    judgement: Judgement = "undecided"
    if low > 0 or high < 0:
        judgement = "confirmed" if (low > 0) == (claim.sign > 0) else "contradicted"
    sentence = f"{said}, 95% interval {low:+.4f} to {high:+.4f}, {seeds}."
    if slope and slope.interval:
        span = f"{slope.interval[0]:+.4f} to {slope.interval[1]:+.4f}"
        sentence += f" A doubling from {claim.base} layers on: {slope.mean:+.4f} ({span})."
    return ClaimVerdict(claim, metric, judgement, sentence.replace("-", "−"), difference, slope)


def judge_all(trials: Sequence[Trial]) -> list[ClaimVerdict]:
    """Every claim whose arm is among the trials, in every metric."""
    arms = {trial.arm for trial in trials}
    return [judge(trials, claim, metric) for claim in CLAIMS if claim.arm in arms for metric in METRICS]


def _slope(values: dict[int, dict[int, float]], claim: Claim) -> Difference | None:
    """Least-squares gain a doubling over the depths from base to deep, one slope a seed that has both ends."""
    seeds = sorted(values.get(claim.deep, {}).keys() & values.get(claim.base, {}).keys())
    slopes = []
    for seed in seeds:
        depths = [depth for depth in values if claim.base <= depth <= claim.deep and seed in values[depth]]
        slopes.append(float(np.polyfit(np.log2(depths), [values[depth][seed] for depth in depths], 1)[0]))
    return mean_with_interval(slopes) if slopes else None
