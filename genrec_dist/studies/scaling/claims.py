"""The claims of PRORec's Figure 6, judged by differences between depths, and between two systems, of the same seeds.

The paper says of Amazon Beauty: PRORec goes on improving up to 32 layers; HSTU stands still at eight and declines
beyond; PRORec outperforms HSTU everywhere, by up to 21.42% in NDCG@20. The first two are in words, without numbers.
Runs of one system and seed share the order of their batches, so their difference varies less than that of two unrelated
runs. Fits no curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from genrec_dist.studies.scaling.points import finished, value_of
from genrec_dist.studies.scaling.seeds import TAIL, Estimate, difference, gain_per_doubling, mean_at_large
from genrec_dist.studies.scaling.trials import Trial

Judgement = Literal["confirmed", "contradicted", "undecided"]


@dataclass(frozen=True)
class Claim:
    """A printed claim.

    Args:
        arm: system it speaks of.
        text: the claim.
    """

    arm: str
    text: str


@dataclass(frozen=True)
class DepthClaim(Claim):
    """A claim about depth.

    Args:
        sign: 1 if the metric should be higher at `deep` than at `base`, -1 if lower.
    """

    sign: int
    base: int = 8
    deep: int = 32


@dataclass(frozen=True)
class LeadClaim(Claim):
    """A claim that a system is above another at every depth.

    Args:
        other: the one below.
    """

    other: str


CLAIMS = (
    DepthClaim("prorec", "PRORec goes on improving up to 32 layers", 1),
    DepthClaim("hstu", "HSTU declines beyond 8 layers", -1),
)
LEAD = LeadClaim("prorec", "PRORec outperforms HSTU at every depth (the paper: by up to 21.42% in NDCG@20)", "hstu")
METRICS = ("ndcg@20", "recall@20")


@dataclass(frozen=True)
class ClaimVerdict:
    """What the runs say of a claim, in one metric.

    Args:
        difference: metric at the claim's deep depth less that at its base; or the smallest lead at a depth.
        slope: gain a doubling of the depth, from the base on; of a claim about depth.
    """

    claim: Claim
    metric: str
    judgement: Judgement
    sentence: str
    difference: Estimate | None
    slope: Estimate | None = None


def by_seed(trials: Sequence[Trial], arm: str, metric: str) -> dict[int, dict[int, float]]:
    """Values by depth, then seed, of one arm's finished trials."""
    found: dict[int, dict[int, float]] = {}
    for trial in finished(trials):
        value = value_of(trial, metric)
        if trial.arm == arm and value is not None:
            found.setdefault(trial.depth, {})[trial.seed] = value
    return found


def judge(trials: Sequence[Trial], claim: DepthClaim, metric: str) -> ClaimVerdict:
    """Judge a claim: confirmed or contradicted when the interval of the difference lies on one side of zero."""
    values = by_seed(trials, claim.arm, metric)
    change = difference(values, claim.deep, claim.base)
    slope = gain_per_doubling(values, claim.base, claim.deep)
    name = f"{_label(metric)}, {claim.deep} against {claim.base} layers"
    if change is None:
        missing = [str(depth) for depth in (claim.base, claim.deep) if not values.get(depth)]
        why = (
            f"no finished run of {claim.arm} at {' or '.join(missing)} layers" if missing else "no seed has both depths"
        )
        return ClaimVerdict(claim, metric, "undecided", f"{name}: {why}.", None, slope)
    shared = values[claim.deep].keys() & values[claim.base].keys()
    base_mean = float(np.mean([values[claim.base][s] for s in shared]))
    seeds = f"{change.num_seeds} seed{'s' if change.num_seeds > 1 else ''}"
    said = f"{name}: {change.mean:+.4f} ({change.mean / base_mean:+.1%})" if base_mean else name
    if change.interval is None:
        sentence = f"{said}, one seed, so no interval."
        return ClaimVerdict(claim, metric, "undecided", sentence, change, slope)
    low, high = change.interval
    judgement: Judgement = "undecided"
    if low > 0 or high < 0:
        judgement = "confirmed" if (low > 0) == (claim.sign > 0) else "contradicted"
    sentence = f"{said}, 95% interval {low:+.4f} to {high:+.4f}, {seeds}."
    if slope and slope.interval:
        span = f"{slope.interval[0]:+.4f} to {slope.interval[1]:+.4f}"
        sentence += f" A doubling from {claim.base} layers on: {slope.mean:+.4f} ({span})."
    return ClaimVerdict(claim, metric, judgement, sentence.replace("-", "−"), change, slope)


def judge_lead(trials: Sequence[Trial], claim: LeadClaim, metric: str) -> ClaimVerdict:
    """Judge a lead: confirmed when the interval at every depth is above zero, contradicted when one is below.

    Differences are paired by depth and seed. Their intervals are for seeds at large: what a seed adds to the lead at
    every depth counts. One depth below is enough to contradict, so that side's level is shared out over the depths
    (Bonferroni). A sweep that lacks a pair at a depth cannot confirm.
    """
    ours, others = by_seed(trials, claim.arm, metric), by_seed(trials, claim.other, metric)
    asked = sorted({trial.depth for trial in trials if trial.arm in (claim.arm, claim.other)})
    leads: dict[int, dict[int, float]] = {}
    relative = {}
    for depth in asked:
        shared = sorted(ours.get(depth, {}).keys() & others.get(depth, {}).keys())
        if shared:
            leads[depth] = {seed: ours[depth][seed] - others[depth][seed] for seed in shared}
            base = float(np.mean([others[depth][seed] for seed in shared]))
            relative[depth] = float(np.mean(list(leads[depth].values()))) / base if base else float("nan")
    if not leads:
        return ClaimVerdict(claim, metric, "undecided", f"{_label(metric)}: no depth and seed has both.", None)
    found = {depth: mean_at_large(leads, depth) for depth in leads}
    ahead = [depth for depth, each in found.items() if each.mean > 0]
    most, least = max(relative, key=relative.__getitem__), min(relative, key=relative.__getitem__)
    said = (
        f"{_label(metric)}: ahead at {len(ahead)} of {len(leads)} depths, between {relative[least]:+.1%} (at {least}) "
        f"and {relative[most]:+.1%} (at {most})"
    )
    lacking = [str(depth) for depth in asked if depth not in leads]
    if lacking:
        said += f"; without a pair at {', '.join(lacking)}"
    smallest = min(found, key=lambda depth: found[depth].mean)
    lead = found[smallest]
    if lead.interval is None:
        sentence = f"{said}; one seed, so no interval."
        return ClaimVerdict(claim, metric, "undecided", sentence.replace("-", "−"), lead)
    shared_out = [mean_at_large(leads, depth, TAIL / len(leads)).interval for depth in leads]
    judgement: Judgement = "undecided"
    if not lacking and all(each.interval and each.interval[0] > 0 for each in found.values()):
        judgement = "confirmed"
    elif any(interval and interval[1] < 0 for interval in shared_out):
        judgement = "contradicted"
    low, high = lead.interval
    sentence = f"{said}; least at {smallest} layers: {lead.mean:+.4f}, 95% interval {low:+.4f} to {high:+.4f}."
    return ClaimVerdict(claim, metric, judgement, sentence.replace("-", "−"), lead)


def judge_all(trials: Sequence[Trial]) -> list[ClaimVerdict]:
    """Every claim whose arms are among the trials, in every metric."""
    arms = {trial.arm for trial in trials}
    found = [judge(trials, claim, metric) for claim in CLAIMS if claim.arm in arms for metric in METRICS]
    if {LEAD.arm, LEAD.other} <= arms:
        found += [judge_lead(trials, LEAD, metric) for metric in METRICS]
    return found


def _label(metric: str) -> str:
    return metric.replace("ndcg", "NDCG").replace("recall", "Recall")
