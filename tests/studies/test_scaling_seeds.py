"""Means and differences over a few seeds, with the noise pooled over depths."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from genrec_dist.studies.scaling.seeds import TwoWay, difference, gain_per_doubling, mean_at_large, mean_of

DEPTHS = (1, 2, 4, 8, 16, 32)


def seed_effects(draw, seeds=(0, 1), seed_effect=0.01):
    """What `layout` adds for each seed."""
    rng = np.random.default_rng(draw)
    return {seed: seed_effect * rng.standard_normal() for seed in seeds}


def layout(noise=0.001, seeds=(0, 1), seed_effect=0.01, gain=0.0, draw=0):
    """Values by depth and seed: a gain a doubling, an effect of the seed, noise."""
    rng = np.random.default_rng(draw)
    effects = {seed: seed_effect * rng.standard_normal() for seed in seeds}
    return {
        d: {s: 0.05 + gain * np.log2(d) + effects[s] + noise * rng.standard_normal() for s in seeds} for d in DEPTHS
    }


def test_with_two_depths_a_difference_is_a_paired_t_test():
    values = {8: {0: 0.050, 1: 0.052, 2: 0.051}, 32: {0: 0.055, 1: 0.054, 2: 0.057, 3: 0.9}}
    found = difference(values, 32, 8)
    reference = stats.ttest_rel([0.055, 0.054, 0.057], [0.050, 0.052, 0.051]).confidence_interval()
    assert found.num_seeds == 3
    assert found.interval == pytest.approx((reference.low, reference.high))


def test_with_one_depth_a_mean_has_its_own_t_interval():
    values = {8: {0: 0.050, 1: 0.052, 2: 0.057}}
    own = list(values[8].values())
    reference = stats.t.interval(0.95, 2, np.mean(own), stats.sem(own))
    for mean in (mean_of(values, 8), mean_at_large(values, 8)):
        assert mean.interval == pytest.approx(reference)


def test_pooled_noise_by_hand():
    values = {1: {0: 1.0, 1: 1.2}, 2: {0: 1.1, 1: 1.5}, 4: {0: 1.3, 1: 1.4}}
    differences = [0.2, 0.4, 0.1]  # of the seeds, at each depth
    left = np.sqrt(sum((d - np.mean(differences)) ** 2 / 2 for d in differences) / 2)  # without the seeds' effect
    mean = mean_of(values, 2)
    assert mean.mean == pytest.approx(1.3)
    assert mean.interval[1] - mean.mean == pytest.approx(stats.t.ppf(0.975, 2) * left / np.sqrt(2))
    seeds = 3 * np.mean(differences) ** 2 / 2  # mean square between seeds, 1 degree of freedom
    parts = seeds / 3, left**2 * 2 / 3
    freedom = sum(parts) ** 2 / (parts[0] ** 2 + parts[1] ** 2 / 2)
    large = mean_at_large(values, 2)
    assert large.interval[1] - large.mean == pytest.approx(stats.t.ppf(0.975, freedom) * np.sqrt(sum(parts) / 2))
    change = difference(values, 4, 1)
    assert change.mean == pytest.approx(0.25)
    assert change.interval[1] - change.mean == pytest.approx(stats.t.ppf(0.975, 2) * left)


def test_what_a_seed_adds_at_every_depth_does_not_widen_a_difference():
    wide, narrow = layout(seed_effect=0.1), layout(seed_effect=0.0)
    assert difference(wide, 32, 8).interval == pytest.approx(difference(narrow, 32, 8).interval)
    assert np.ptp(mean_of(wide, 8).interval) == pytest.approx(np.ptp(mean_of(narrow, 8).interval))
    assert np.ptp(mean_at_large(wide, 8).interval) > 10 * np.ptp(mean_at_large(narrow, 8).interval)


def test_intervals_hold_the_truth_as_often_as_they_say():
    gain, hits = 0.002, np.zeros(5)
    for draw in range(400):
        values = layout(gain=gain, draw=draw)
        del values[16][1]  # an empty cell
        found = difference(values, 32, 8), gain_per_doubling(values, 8, 32)
        hits[:2] += [f.interval[0] <= true <= f.interval[1] for f, true in zip(found, (2 * gain, gain), strict=True)]
        values, effects = layout(gain=gain, draw=draw), seed_effects(draw)
        for place, (found, true) in enumerate(
            [
                (mean_of(values, 8), np.mean(list(effects.values()))),
                (mean_at_large(layout(gain=gain, draw=draw, seed_effect=0.0), 8), 0.0),
                (mean_at_large(layout(gain=gain, draw=draw, seed_effect=0.001), 8), 0.0),
            ]
        ):
            hits[2 + place] += found.interval[0] <= 0.05 + 3 * gain + true <= found.interval[1]
    assert (np.abs(hits / 400 - 0.95) < 0.035).all(), hits / 400


def test_a_mean_for_seeds_at_large_holds_the_truth_whatever_the_seeds_add():
    for seed_effect, seeds in ((0.003, (0, 1)), (0.003, (0, 1, 2)), (0.01, (0, 1, 2, 3))):
        found = [mean_at_large(layout(draw=d, seed_effect=seed_effect, seeds=seeds), 8).interval for d in range(400)]
        share = np.mean([low <= 0.05 <= high for low, high in found])
        assert 0.88 <= share <= 0.985, (seed_effect, seeds, share)


def test_what_a_seed_adds_is_found_about_zero_and_only_where_runs_tell_it():
    effects = {0: 0.01, 1: -0.02, 2: 0.004}
    cells = [(d, s) for d in (1, 2, 4) for s in effects if (d, s) != (4, 2)]
    depth, seed = np.array(cells).T
    y = np.log2(depth) + [effects[s] for s in seed]
    found = TwoWay(depth, seed).effects @ y
    assert found.mean() == pytest.approx(0, abs=1e-12)
    assert found[0] - found[1] == pytest.approx(0.03)
    alone = TwoWay(np.append(depth, 8), np.append(seed, 7))  # a run that nothing is compared with changes nothing
    assert alone.num_effects == 2
    assert alone.effects @ np.append(y, 99.0) == pytest.approx(np.append(found, 0.0))
    blocks = TwoWay(np.array([1, 1, 2, 2]), np.array([0, 1, 2, 3]))
    assert (blocks.num_effects, blocks.freedom) == (2, 0)
    assert blocks.effects @ np.array([1.0, 3.0, 7.0, 5.0]) == pytest.approx([-1, 1, 1, -1])
    apart = TwoWay(np.array([1, 2, 4, 8]), np.array([0, 0, 1, 1]))
    assert apart.num_effects == 0
    assert apart.effects == pytest.approx(np.zeros((4, 4)))


def test_gain_of_full_layouts_is_the_mean_slope_of_the_seeds():
    values = layout(gain=0.003, seeds=(0, 1, 2))
    inner = [8, 16, 32]
    slopes = [np.polyfit(np.log2(inner), [values[d][s] for d in inner], 1)[0] for s in range(3)]
    assert gain_per_doubling(values, 8, 32).mean == pytest.approx(np.mean(slopes))


def test_what_cannot_be_told_is_none():
    values = {8: {0: 0.05}, 32: {1: 0.06}}
    assert difference(values, 32, 8) is None
    assert gain_per_doubling(values, 8, 32) is None
    assert difference(values, 64, 8) is None
    assert difference(values, 8, 8) is None
    single = {8: {0: 0.05}, 32: {0: 0.06}}
    assert difference(single, 32, 8).mean == pytest.approx(0.01)
    assert difference(single, 32, 8).interval is None
    assert mean_of(single, 8).interval is None
    assert mean_at_large(single, 8).interval is None
