"""Fits of planted sweeps: intervals that cover, families recognised, runs predicted, verdicts and claims in words."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from made_trials import DEPTHS, LAYER, power, sweep, trial

from genrec_dist.errors import DataError
from genrec_dist.studies.scaling.curves import DELTA, SMALLEST_EXPONENT, huber
from genrec_dist.studies.scaling.fits import aicc, bootstrap, fit_all, fit_curve, predict_held_out
from genrec_dist.studies.scaling.points import COMPUTE, LOSS, LOWEST_LOSS, points_of
from genrec_dist.studies.scaling.trials import Trial
from genrec_dist.studies.scaling.verdicts import judge_power_law

NDCG = "ndcg@20"


def flat(value: float):
    return lambda depth: value


def points(trials, quantity=LOSS, size="layers"):
    return points_of(trials, trials[0].arm, size, quantity)


def verdict_of(trials, quantity=LOSS, size="layers"):
    chosen = points(trials, quantity, size)
    return judge_power_law(chosen, fit_all(chosen, 100))


def covered(
    num_draws: int, quantity: str, planted, noise: float, seeds: int = 3, seed_effect: float = 0.0, resamples: int = 400
) -> np.ndarray:
    """Share of draws whose 95% intervals of alpha and of the floor hold the planted values."""
    e, a, alpha = planted
    held = []
    for draw in range(num_draws):
        curves = {"bits" if quantity == LOSS else "ndcg": power(e, a, alpha)}
        made = sweep(noise=noise, seeds=seeds, seed=draw, seed_effect=seed_effect, **curves)
        law = bootstrap(points(made, quantity), resamples)
        held.append([low <= value <= high for (low, high), value in ((law.alpha_interval, alpha), (law.e_interval, e))])
    return np.mean(held, axis=0)


def test_planted_parameters_are_recovered():
    law = bootstrap(points(sweep(noise=0.001)), 200)
    assert law.alpha == pytest.approx(0.5, abs=0.03)
    assert law.e == pytest.approx(8.0, abs=0.05)
    assert law.a == pytest.approx(2.0 * LAYER**0.5, rel=0.35)
    assert law.noise == pytest.approx(0.001, rel=0.4)
    assert law.alpha_interval[0] < law.alpha < law.alpha_interval[1]


def test_planted_parameters_of_a_metric_are_recovered():
    law = bootstrap(points(sweep(noise=0.002), NDCG), 200)
    assert law.alpha == pytest.approx(0.6, abs=0.05)
    assert law.e == pytest.approx(0.06, rel=0.01)


def test_intervals_cover_in_a_few_draws():
    assert (covered(16, LOSS, (8.0, 2.0, 0.5), 0.004, resamples=150) >= 13 / 16).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantity", "planted", "noise", "seeds", "seed_effect"),
    [
        (LOSS, (8.0, 2.0, 0.5), 0.004, 3, 0.0),
        (LOSS, (8.0, 2.0, 0.3), 0.004, 3, 0.0),
        (LOSS, (8.0, 2.0, 0.5), 0.004, 1, 0.0),
        (LOSS, (8.0, 2.0, 0.5), 0.004, 2, 0.01),
        (NDCG, (0.06, -0.02, 0.6), 0.01, 3, 0.0),
        (NDCG, (0.06, -0.02, 0.6), 0.01, 2, 0.03),
    ],
)
def test_intervals_cover_the_truth_in_200_draws(quantity, planted, noise, seeds, seed_effect):
    shares = covered(200, quantity, planted, noise, seeds, seed_effect)
    print(f"coverage of alpha and floor: {shares}")
    assert (shares >= 0.90).all()
    assert (shares <= 0.98).all()


@pytest.mark.slow
@pytest.mark.parametrize("seed_effect", [0.0, 0.02])
@pytest.mark.parametrize(
    ("bits", "fewest", "most"),
    [
        (power(8.0, 2.0, 0.5), 95, 100),
        (lambda depth: 9.0, 0, 5),
        (lambda depth: 8 + 2 * np.exp(-depth / 3), 0, 5),
    ],
    ids=["power law", "constant", "plateau"],
)
def test_verdicts_are_right_in_100_draws(bits, fewest, most, seed_effect):
    supported = sum(
        verdict_of(sweep(bits=bits, seed=1000 + draw, seed_effect=seed_effect)).supported for draw in range(100)
    )
    print(f"supported in {supported} of 100")
    assert fewest <= supported <= most


def test_what_a_seed_adds_at_every_depth_hides_nothing():
    """The same noise with and without large effects of the seeds: same exponent, noise, criteria, prediction."""
    plain, shifted = (fit_all(points(sweep(seeds=2, seed_effect=effect)), 200) for effect in (0.0, 0.05))
    assert shifted.power.alpha == pytest.approx(plain.power.alpha, abs=1e-6)
    assert shifted.power.alpha_interval == pytest.approx(plain.power.alpha_interval, abs=1e-3)
    assert shifted.power.noise == pytest.approx(plain.power.noise)
    assert shifted.prediction.inside.tolist() == plain.prediction.inside.tolist()
    for name, family in plain.families.items():
        assert shifted.families[name].aicc == pytest.approx(family.aicc, abs=1e-3)
        assert shifted.families[name].left_out_error == pytest.approx(family.left_out_error, rel=0.1)
    found, given = shifted.power.offsets, shifted.points.y / plain.points.y
    for seed, offsets in found.items():
        assert len(offsets) == 201
        own = plain.power.offsets[seed][0]
        assert offsets[0] - own == pytest.approx(np.log(given[shifted.points.seed == seed][0]))


def on_a_curve_of_compute(factor: float | None, offset: float, noise: float, draw: int) -> list[Trial]:
    """Two seeds on L = 8 + 40 C^-0.3; seed 1 spends `factor` times as much, or each run what is drawn for it."""
    rng, made = np.random.default_rng(draw), []
    for run in sweep(seeds=2):
        times = rng.uniform(0.5, 2) if factor is None else factor**run.seed
        compute = run.train_flops / 1e14 * times
        bits = (8 + 40 * compute**-0.3) * np.exp(offset * (run.seed - 0.5) + rng.normal(0, noise))
        made.append(dataclasses.replace(run, train_flops=compute, bits_per_item=bits))
    return made


@pytest.mark.parametrize("offset", [0.0, 0.02])
@pytest.mark.parametrize("factor", [1.0, 2.0, 3.0, None])
def test_compute_that_differs_between_seeds_leaves_no_trace_in_offsets(factor, offset):
    fit = fit_all(points(on_a_curve_of_compute(factor, offset, 1e-3, 0), size=COMPUTE), 200)
    assert fit.power.alpha == pytest.approx(0.3, abs=0.02)
    assert fit.power.noise < 2e-3
    found = [fit.power.offsets[seed][0] for seed in (0, 1)]
    assert found == pytest.approx([-offset / 2, offset / 2], abs=1e-3)
    assert fit.best.curve.name == "power"
    assert judge_power_law(fit.points, fit).supported


@pytest.mark.slow
@pytest.mark.parametrize("factor", [2.0, None])
def test_intervals_over_compute_cover_the_truth_in_200_draws(factor):
    laws = [
        bootstrap(points(on_a_curve_of_compute(factor, 0.01, 4e-3, draw), size=COMPUTE), 400) for draw in range(200)
    ]
    shares = [np.mean([low <= true <= high for low, high in held]) for held, true in (
        ([law.alpha_interval for law in laws], 0.3), ([law.e_interval for law in laws], 8.0)
    )]  # fmt: skip
    print(f"coverage of alpha and floor: {shares}")
    assert min(shares) >= 0.90
    assert max(shares) <= 0.98


def test_a_run_of_a_seed_that_has_no_other_changes_little():
    made = sweep(seeds=2, seed_effect=0.03, noise=0.002)
    alone = dataclasses.replace(made[-1], name="alone", depth=48, seed=7, num_parameters={"layers": 48 * 200_000})
    few, more = (bootstrap(points(trials), 200) for trials in (made, [*made, alone]))
    assert more.noise < 3 * few.noise
    assert more.offsets[7][0] == 0
    assert more.offsets[0][0] == pytest.approx(few.offsets[0][0])


def test_a_deeper_run_of_a_seed_that_has_no_shallower_one_is_not_predicted():
    made = [t for t in sweep(seeds=2) if t.seed == 0 or t.depth == 32]
    assert predict_held_out(points(made), 50).held_out.seed.tolist() == [0, 0]
    assert predict_held_out(points([t for t in made if t.seed == 1 or t.depth < 24]), 50) is None


def test_compute_that_does_not_rise_with_depth_supports_nothing():
    made = sweep(noise=0.001)
    assert verdict_of(made, size=COMPUTE).supported
    longer = [dataclasses.replace(t, train_flops=t.train_flops * (60 if t.depth < 8 else 1)) for t in made]
    verdict = verdict_of(longer, size=COMPUTE)
    assert not verdict.supported
    assert "compute does not rise with depth" in verdict.sentence
    threefold = [dataclasses.replace(t, train_flops=t.train_flops * (1, 3, 9)[t.seed]) for t in made]
    assert "does not rise" not in verdict_of(threefold, size=COMPUTE).sentence
    worse = verdict_of(sweep(bits=lambda depth: 8 * depth**0.05), size=COMPUTE)
    assert "more compute does worse" in worse.sentence


def test_lowest_losses_of_different_parts_of_the_training_are_said():
    made = sweep(noise=0.001)
    early = [dataclasses.replace(t, curve=t.curve[: 1 if t.depth < 4 else None]) for t in made]
    for trials, said in ((made, False), (early, True)):
        chosen = points(trials, LOWEST_LOSS)
        assert chosen.epoch.min() == (1 if said else 8)
        found = judge_power_law(chosen, fit_all(chosen, 50)).trust
        assert any("epochs 1 to 8" in each for each in found) == said


def test_every_seed_is_a_point():
    chosen = points(sweep())
    assert len(chosen.x) == 3 * len(DEPTHS)
    assert len(np.unique(chosen.y)) == len(chosen.y)


def test_a_power_law_is_supported_and_predicts_deeper_runs():
    fit = fit_all(points(sweep()), 300)
    assert fit.best.curve.name == "power"
    assert fit.prediction.fitted_to == 16
    assert fit.prediction.held_out.depths == [24, 32]
    assert fit.prediction.inside.sum() >= 5
    assert abs(fit.prediction.error) < 0.01
    verdict = judge_power_law(fit.points, fit)
    assert verdict.supported
    assert "α = 0.5" in verdict.sentence
    assert any("of 6 runs of 24 and 32 layers" in said for said in verdict.trust)


def test_prediction_uses_no_deeper_run():
    trials = sweep()
    spoilt = [dataclasses.replace(t, bits_per_item=1.0) if t.depth > 16 else t for t in trials]
    one, other = predict_held_out(points(trials), 50), predict_held_out(points(spoilt), 50)
    np.testing.assert_array_equal(one.predicted, other.predicted)
    assert not other.inside.any()
    assert other.error > 1


def test_a_plateau_is_recognised():
    fit = fit_all(points(sweep(bits=lambda depth: 8 + 2 * np.exp(-depth / 3))), 150)
    assert fit.best.curve.name == "saturating"
    verdict = judge_power_law(fit.points, fit)
    assert not verdict.supported
    assert "saturates" in verdict.sentence


def test_a_constant_is_recognised():
    recognised = 0
    for seed in range(4):
        verdict = verdict_of(sweep(bits=flat(9.0), noise=0.01, seed=seed))
        assert not verdict.supported
        recognised += "crosses zero" in verdict.sentence and "a constant" in verdict.sentence
    assert recognised >= 3


def test_a_metric_that_turns_back_is_recognised():
    verdict = verdict_of(sweep(ndcg=lambda depth: 0.05 - 0.002 * (np.log2(depth) - 3) ** 2), NDCG)
    assert not verdict.supported
    assert "turns back" in verdict.sentence


def test_a_loss_that_grows_with_size_is_no_power_law():
    verdict = verdict_of(sweep(bits=lambda depth: 8 * depth**0.05))
    assert not verdict.supported
    assert "larger models do worse" in verdict.sentence


def test_four_sizes_or_less_than_a_decade_support_nothing():
    few = verdict_of(sweep(depths=(1, 4, 12, 32)))
    assert not few.supported
    assert "4 sizes, fewer than 5" in few.sentence
    short = verdict_of(sweep(depths=(4, 8, 12, 16, 24, 32)))
    assert not short.supported
    assert "0.90 decades of parameters" in short.sentence


def test_one_seed_and_no_deeper_run_are_said():
    verdict = verdict_of(sweep(seeds=1, noise=0.001, depths=(1, 2, 4, 8, 12, 16)))
    assert any("one seed" in said for said in verdict.trust)
    assert any("not tested on deeper runs" in said for said in verdict.trust)


def test_too_little_for_a_fit_is_said():
    two = points(sweep(depths=(1, 32)))
    assert fit_all(two) is None
    assert "2 sizes" in judge_power_law(two, None).sentence
    zero = points(sweep(ndcg=flat(0.0)), NDCG)
    assert fit_all(zero) is None
    assert "scored 0" in judge_power_law(zero, None).sentence


def test_left_out_error_by_hand():
    chosen = points(sweep(depths=(1, 2, 4, 8)))
    fit = fit_all(chosen, 50)
    errors: dict[str, list[float]] = {"log_linear": [], "power": []}
    for depth in chosen.depths:
        out, others = chosen.where(chosen.depth == depth), chosen.where(chosen.depth != depth)
        logs = np.log(others.y)
        added = np.exp([logs[others.seed == seed].mean() - logs.mean() for seed in out.seed])
        for name, found in errors.items():
            found += list(fit_curve(others, name).predict(out.x)[0] * added / out.y - 1)
    for name, found in errors.items():
        assert fit.families[name].left_out_error == pytest.approx(np.sqrt(np.mean(np.square(found))), rel=0.02)


def test_aicc_is_that_of_a_normalised_density():
    """Against numerical integration of the density, with its scale found on a grid."""
    residuals = np.random.default_rng(0).normal(0, 0.004, 24)
    grid = np.linspace(-0.2, 0.2, 400_001)
    lowest = np.inf
    for scale in np.geomspace(1e-3, 1e-2, 80):
        mass = np.exp(-huber(grid) / DELTA / scale).sum() * (grid[1] - grid[0])
        lowest = min(lowest, 24 * np.log(mass) + huber(residuals).sum() / DELTA / scale)
    k = 3 + 1
    assert aicc(residuals, 3) == pytest.approx(2 * k + 2 * lowest + 2 * k * (k + 1) / (24 - k - 1), abs=2e-2)
    assert aicc(residuals[:5], 3) == np.inf


def test_lowest_loss_is_taken_with_the_compute_up_to_it():
    made = trial("prorec", 4, 0, 8.0, 0.05)
    curve = [dataclasses.replace(p, bits_per_item=b) for p, b in zip(made.curve, (9, 7, None, 7.5), strict=False)]
    made = dataclasses.replace(made, curve=tuple(curve))
    for size, expected in (("layers", made.num_parameters["layers"]), (COMPUTE, curve[1].flops)):
        found = points([made], LOWEST_LOSS, size)
        assert (found.x.tolist(), found.y.tolist(), found.sign) == ([expected], [7.0], 1)
    assert points([made], LOSS, COMPUTE).x.tolist() == [made.train_flops]
    assert not len(points([dataclasses.replace(made, curve=())], LOWEST_LOSS).x)


def test_an_interval_that_ends_where_the_search_does_is_not_told_from_zero():
    fit = fit_all(points(sweep(noise=0.001)), 50)
    assert judge_power_law(fit.points, fit).supported
    for interval in ((SMALLEST_EXPONENT, 1.0), (-1.0, -SMALLEST_EXPONENT)):
        at_zero = dataclasses.replace(fit.power, alpha_interval=interval)
        verdict = judge_power_law(fit.points, dataclasses.replace(fit, power=at_zero))
        assert not verdict.supported
        assert "from which nothing tells it" in verdict.sentence


def test_contradicting_or_impossible_trials_are_refused():
    with pytest.raises(DataError, match="two finished trials"):
        points([trial("prorec", 1, 0, 9.0, 0.05)] * 2)
    with pytest.raises(DataError, match="logarithmic"):
        points([trial("prorec", 1, 0, -1.0, 0.05)])
    with pytest.raises(DataError, match="logarithmic"):
        points([trial("prorec", 1, 0, float("nan"), 0.05)])


def test_unfinished_trials_are_no_points():
    trials = [*sweep(depths=(1, 2)), Trial("prorec-l4-s0", "prorec", 4, 0, "failed", "out of memory")]
    assert points(trials).depths == [1, 2]


def test_too_few_runs_to_compare_families_are_said_and_nothing_else():
    verdict = verdict_of(sweep(seeds=1, noise=0.0001, depths=(1, 2, 4, 8, 16)))
    assert not verdict.supported
    assert verdict.against == ["5 runs are too few to tell a power law from other curves"]
    assert not any("straight line" in said for said in verdict.trust)
    few = fit_all(points(sweep(seeds=1, depths=(1, 2, 4))), 50)
    assert few.best is None
