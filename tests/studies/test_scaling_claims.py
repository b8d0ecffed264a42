"""The claims of PRORec's Figure 6 judged on made-up sweeps, in words and by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from made_trials import sweep, trial
from scipy import stats

from genrec_dist.studies.scaling.claims import CLAIMS, LEAD, judge, judge_all, judge_lead

NDCG = "ndcg@20"


def flat(value: float):
    return lambda depth: value


@pytest.mark.parametrize(
    ("arm", "change", "noise", "judgement"),
    [
        ("prorec", 0.004, 0.001, "confirmed"),
        ("prorec", -0.004, 0.001, "contradicted"),
        ("prorec", 0.0, 0.02, "undecided"),
        ("hstu", -0.004, 0.001, "confirmed"),
        ("hstu", 0.004, 0.001, "contradicted"),
    ],
)
def test_claims_of_figure_6(arm, change, noise, judgement):
    trials = sweep(arm, ndcg=lambda depth: 0.05 + change * np.log2(depth / 8) / 2, noise=noise)
    verdicts = judge_all(trials)
    assert {v.claim.arm for v in verdicts} == {arm}
    assert [v.judgement for v in verdicts] == [judgement, judgement]
    if change:
        assert verdicts[0].slope.mean == pytest.approx(change / 2, rel=0.1)


@pytest.mark.parametrize(
    ("lead", "judgement"),
    [
        (lambda depth: 0.005, "confirmed"),
        (lambda depth: 0.005 - 0.004 * np.log2(depth) / 2, "contradicted"),
        (lambda depth: 0.0002, "undecided"),
    ],
)
def test_the_lead_of_figure_6(lead, judgement):
    trials = sweep("hstu", ndcg=flat(0.05), noise=0.005, seed=5)
    trials += sweep("prorec", ndcg=lambda depth: 0.05 + lead(depth), noise=0.005, seed=6)
    found = [verdict for verdict in judge_all(trials) if verdict.claim is LEAD]
    assert [verdict.judgement for verdict in found] == [judgement, judgement]
    assert found[0].metric == NDCG
    if judgement == "confirmed":
        assert "ahead at 8 of 8 depths" in found[0].sentence
        assert found[0].difference.interval[0] > 0


def test_the_interval_of_a_lead_by_hand():
    values = {
        ("prorec", 1): (0.06, 0.064),
        ("hstu", 1): (0.05, 0.05),
        ("prorec", 8): (0.07, 0.08),
        ("hstu", 8): (0.05, 0.05),
    }
    trials = [
        trial(arm, depth, seed, 8.0, value) for (arm, depth), pair in values.items() for seed, value in enumerate(pair)
    ]
    found = judge_lead(trials, LEAD, NDCG)
    seeds, left = 0.014**2 / 4, 0.006**2 / 4  # mean squares of leads .010, .014 and .020, .030
    half = stats.t.ppf(0.975, (seeds + left) ** 2 / (seeds**2 + left**2)) * np.sqrt((seeds + left) / 2 / 2)
    assert found.judgement == ("confirmed" if half < 0.012 else "undecided")
    assert found.difference.mean == pytest.approx(0.012)
    assert found.difference.interval == pytest.approx((0.012 - half, 0.012 + half))
    assert "between +24.0% (at 1) and +50.0% (at 8)" in found.sentence
    one = judge_lead([t for t in trials if t.seed == 0], LEAD, NDCG)
    assert (one.judgement, one.difference.interval) == ("undecided", None)
    waiting = dataclasses.replace(trials[0], depth=32, state="pending", metrics={})
    part = judge_lead([*trials, waiting], LEAD, NDCG)
    assert part.judgement == "undecided"
    assert "without a pair at 32" in part.sentence
    none = judge_lead([t for t in trials if (t.arm, t.depth) in (("prorec", 1), ("hstu", 8))], LEAD, NDCG)
    assert "no depth and seed has both" in none.sentence


def test_claims_without_the_runs_they_need_are_undecided():
    claim = CLAIMS[0]
    assert "no finished run of prorec at 32 layers" in judge(sweep(depths=(1, 8)), claim, NDCG).sentence
    one = judge(sweep(seeds=1), claim, NDCG)
    assert one.judgement == "undecided"
    assert "one seed" in one.sentence
    assert one.difference.interval is None
