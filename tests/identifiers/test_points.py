"""Passes over rows: exact sums, and the same answers whoever holds which rows."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import mixture

from genrec_dist.identifiers import kmeans as kmeans_module
from genrec_dist.identifiers import points as points_module
from genrec_dist.identifiers.device_points import DevicePoints
from genrec_dist.identifiers.kmeans import KMeansOptions, kmeans
from genrec_dist.identifiers.points import Grid, LocalPoints, chunk_rows, least
from genrec_dist.identifiers.pooled import PooledPoints, merge, ranges
from genrec_dist.identifiers.rows import ArrayRows, RangeRows, unit
from genrec_dist.identifiers.starts import parallel_start, plus_plus_start


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """256 rows a chunk, so that a few thousand rows are many chunks."""
    monkeypatch.setattr(points_module, "CHUNK_BYTES", 1)


cloud = partial(mixture, dim=6)


class HereTeam:
    """Workers in this process."""

    def __init__(self, rows: np.ndarray, workers: int) -> None:
        self.bounds = ranges(len(rows), rows.shape[1], workers)
        parts = [RangeRows(ArrayRows(rows), start, stop) for start, stop in self.bounds]
        self.points = [LocalPoints(p, 1, len(rows), start) for p, (start, _) in zip(parts, self.bounds, strict=True)]
        for one in self.points:
            one.set_largest(max(p.largest for p in self.points))

    def ask(self, method: str, arguments: Sequence[tuple | None]) -> list:
        return [
            None if given is None else getattr(one, method)(*given)
            for one, given in zip(self.points, arguments, strict=True)
        ]


def pooled(rows: np.ndarray, workers: int) -> PooledPoints:
    team = HereTeam(rows, workers)
    return PooledPoints(team, team.bounds, rows.shape[1])


@settings(max_examples=80, deadline=None)
@given(costs=st.lists(st.integers(0, 4), min_size=1, max_size=30), count=st.integers(1, 12), cuts=st.integers(1, 5))
def test_the_least_of_parts_are_the_least_of_the_whole(costs, count, cuts):
    rows, cost = np.arange(len(costs)), np.array(costs, np.float32)
    plain = least(rows, cost, count, apart=False)
    assert plain.tolist() == sorted(range(len(costs)), key=lambda row: (costs[row], row))[:count]
    whole = least(rows, cost, count, apart=True)
    first_of_each = [costs.index(c) for c in sorted(set(costs))]
    assert whole.tolist()[: len(first_of_each)] == first_of_each[:count]
    assert len(set(whole.tolist())) == len(whole) == min(count, len(costs))
    for apart, wanted in ((True, whole), (False, plain)):
        parts = [part[least(part, cost[part], count, apart)] for part in np.array_split(rows, cuts)]
        assert merge([(part, cost[part]) for part in parts], count, apart).tolist() == wanted.tolist()


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60), seed=st.integers(0, 9))
def test_sums_of_grid_values_are_exact_in_any_order(values, seed):
    array = np.array(values, np.float32)
    rounded = Grid(len(array), float(np.abs(array).max())).round(array)
    exact = sum((Fraction(float(v)) for v in rounded), Fraction(0))
    order = np.random.default_rng(seed).permutation(len(array))
    assert Fraction(float(np.sum(rounded))) == exact
    assert Fraction(float(np.cumsum(rounded[order])[-1])) == exact
    assert np.abs(rounded - array).max() <= 2.0**-24 * max(float(np.abs(array).max()), 1e-30)


def test_chunks_follow_from_the_width_alone(monkeypatch):
    monkeypatch.setattr(points_module, "CHUNK_BYTES", 8 << 20)
    assert [chunk_rows(dim) for dim in (1, 64, 128, 4096, 1 << 20)] == [1 << 21, 32768, 16384, 512, 256]


def test_ranges_are_whole_chunks_and_cover_all_rows():
    for workers in (1, 2, 4, 9):
        found = ranges(1000, 6, workers)
        assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
        assert found[-1][1] == 1000
        assert all(start % 256 == 0 or start == 1000 for start, _ in found)
    assert len({stop - start for start, stop in ranges(1024, 6, 4)}) == 1


def test_moments_kept_up_to_date_are_those_of_a_first_pass():
    rows, rng = cloud(1500), np.random.default_rng(3)
    kept = LocalPoints(ArrayRows(rows))
    for turn in range(5):
        centroids = rows[rng.choice(1500, 9, replace=False)]
        found, fresh = kept.assign(centroids), LocalPoints(ArrayRows(rows)).assign(centroids)
        assert found.counts.tolist() == fresh.counts.tolist(), turn
        assert np.array_equal(found.sums, fresh.sums)
        assert np.array_equal(found.errors, fresh.errors)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads):
    rows = cloud(3000)
    one, many = (kmeans(LocalPoints(ArrayRows(rows), n), 12, seed=1) for n in (1, threads))
    assert one.objective == many.objective
    assert np.array_equal(one.centroids, many.centroids)
    assert np.array_equal(one.labels, many.labels)


WAYS = {
    "plain": KMeansOptions(iterations=6),
    "parallel": KMeansOptions(iterations=4, start="parallel", num_starts=2),
    "plus_plus": KMeansOptions(iterations=4, start="plus_plus"),
    "cosine": KMeansOptions(iterations=6, metric="cosine"),
    "balanced": KMeansOptions(iterations=4, balanced=True),
}


@pytest.mark.parametrize("workers", [1, 2, 4, 7])
@pytest.mark.parametrize("way", list(WAYS))
def test_any_number_of_workers_gives_the_same_bits(way, workers):
    rows = unit(cloud(1700)) if way == "cosine" else cloud(1700)
    one = kmeans(LocalPoints(ArrayRows(rows)), 16, WAYS[way], seed=2)
    many = kmeans(pooled(rows, workers), 16, WAYS[way], seed=2)
    assert np.array_equal(one.labels, many.labels)
    assert np.array_equal(one.centroids, many.centroids)
    assert one.objective == many.objective
    assert one.imbalance == many.imbalance
    assert np.bincount(one.labels, minlength=16).min() > 0


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_empty_clusters_are_refilled_alike(workers):
    rows = np.repeat(cloud(40), 20, 0)  # 40 distinct rows
    start = np.concatenate([rows[:30], np.full((34, 6), 99, np.float32)])
    one = kmeans(LocalPoints(ArrayRows(rows)), 64, KMeansOptions(iterations=6, tolerance=0.0), centroids=start)
    many = kmeans(pooled(rows, workers), 64, KMeansOptions(iterations=6, tolerance=0.0), centroids=start)
    assert one.splits[0] > 20
    assert one.splits == many.splits
    assert np.array_equal(one.labels, many.labels)
    assert one.sizes.min() >= 1
    assert one.objective[-1] == pytest.approx(0.0, abs=0.01)


def test_a_refilled_cluster_takes_the_farthest_row_of_the_cluster_that_errs_most():
    rows = np.array([[0.0], [1.0], [2.0], [50.0], [53.0]], np.float32)
    points = LocalPoints(ArrayRows(rows))
    moments = points.assign(np.array([[1.0], [51.0], [1000.0]], np.float32))
    assert moments.counts.tolist() == [3, 2, 0]
    moments, filled = kmeans_module.fill_empty(points, moments)
    assert filled.tolist() == [2]
    assert points.labels().tolist() == [0, 0, 0, 1, 2]
    assert moments.counts.tolist() == [3, 1, 1]
    assert moments.sums[:, 0].tolist() == [3.0, 50.0, 53.0]
    assert moments.errors.tolist() == [2.0, 1.0, 0.0]


def test_cosine_is_euclidean_of_unit_rows_with_unit_centroids():
    rows = cloud(900) * np.random.default_rng(0).uniform(0.1, 10, (900, 1)).astype(np.float32)
    found = kmeans(rows, 8, KMeansOptions(metric="cosine"), seed=1)
    np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1, atol=1e-6)
    similarity = unit(rows).astype(np.float64) @ found.centroids.T.astype(np.float64)
    assert (similarity.argmax(1) == found.labels).mean() > 0.999
    assert found.objective[-1] == pytest.approx((2 - 2 * similarity.max(1)).sum(), rel=1e-4)


def test_balanced_sizes_differ_by_one():
    rows = cloud(2003)
    free = kmeans(rows, 16, seed=1)
    found = kmeans(rows, 16, KMeansOptions(balanced=True), seed=1)
    assert set(found.sizes) == {2003 // 16, 2003 // 16 + 1}
    assert np.bincount(found.labels).tolist() == found.sizes.tolist()
    assert free.sizes.max() > 1.3 * 2003 / 16
    assert free.objective[-1] < found.objective[-1] < 4 * free.objective[-1]


def test_prices_come_close_to_the_best_balanced_assignment():
    """Against the exact solution of the assignment problem, from the same centroids."""
    from scipy.optimize import linear_sum_assignment

    rows = cloud(600)
    centroids = kmeans(rows, 8, KMeansOptions(balanced=True), seed=1).centroids
    cost = points_module.squared_distances(rows, centroids)
    best = cost.repeat(75, axis=1)
    best = best[linear_sum_assignment(best)].sum()
    points = LocalPoints(ArrayRows(rows))
    moments = kmeans_module._assign_balanced(points, centroids, last=True)
    assert moments.counts.tolist() == [75] * 8
    assert moments.objective <= 1.005 * best


def test_balanced_objective_falls_and_sizes_stay_nearly_equal():
    rows = np.random.default_rng(0).standard_normal((3000, 6), np.float32)
    found = kmeans(rows, 16, KMeansOptions(iterations=10, balanced=True, tolerance=0.0), seed=1)
    assert max(found.imbalance[1:]) < 1.3
    assert found.imbalance[-1] == pytest.approx(188 * 16 / 3000)
    assert all(after < 1.02 * before for before, after in pairwise(found.objective))
    assert found.objective[-1] < 0.9 * found.objective[0]


def test_parallel_start_is_about_as_good_as_plus_plus():
    rows = cloud(4000)
    points = LocalPoints(ArrayRows(rows))

    def error(start: np.ndarray) -> float:
        return points.assign(start).objective

    plus_plus = np.mean([error(plus_plus_start(points, 20, np.random.default_rng(s))) for s in range(5)])
    parallel = np.mean([error(parallel_start(points, 20, (s,))) for s in range(5)])
    random = np.mean([error(rows[np.random.default_rng(s).choice(4000, 20, replace=False)]) for s in range(5)])
    assert parallel < 1.1 * plus_plus
    assert parallel < 0.9 * random


def test_plus_plus_of_one_chunk_is_that_of_many(monkeypatch):
    """The short way through one chunk draws the same rows as the way through the chunks' owners."""
    rows = cloud(250)
    one = plus_plus_start(LocalPoints(ArrayRows(rows)), 12, np.random.default_rng(5))
    monkeypatch.setattr("genrec_dist.identifiers.starts.chunk_rows", lambda dim: 10)
    many = plus_plus_start(LocalPoints(ArrayRows(rows)), 12, np.random.default_rng(5))
    assert np.array_equal(one, many)


def test_parallel_start_with_exactly_as_many_distinct_rows_on_several_workers():
    rows = np.repeat(cloud(16), 64, 0)
    one, many = (parallel_start(points, 16, (0,)) for points in (LocalPoints(ArrayRows(rows)), pooled(rows, 2)))
    assert np.array_equal(one, many)
    assert many.shape == (16, 6)


def test_parallel_start_of_few_distinct_rows_is_filled_up():
    rows = np.repeat(cloud(5), 300, 0)
    start = parallel_start(LocalPoints(ArrayRows(rows)), 9, (0,))
    assert start.shape == (9, 6)
    assert len(np.unique(start, axis=0)) == 5


# Torch's passes, on the device at hand


def on_device(rows: np.ndarray, resident: int = 1 << 30, **range_of) -> DevicePoints:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return DevicePoints(ArrayRows(rows), device, resident, **range_of)


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("resident", [0, 1 << 30])
def test_torchs_passes_agree_with_numpys(monkeypatch, way, resident):
    """Integers, so that all arithmetic is exact and ties are ties for both."""
    monkeypatch.setattr("genrec_dist.identifiers.device_points.BLOCK_BYTES", 20_000)
    rows = np.round(8 * cloud(1500))
    rows = unit(rows) if way == "cosine" else rows
    host = kmeans(LocalPoints(ArrayRows(rows)), 16, WAYS[way], seed=2)
    device = kmeans(on_device(rows, resident), 16, WAYS[way], seed=2)
    assert (host.labels == device.labels).mean() > 0.995
    assert device.objective[0] == pytest.approx(host.objective[0], rel=1e-5)
    assert device.objective[-1] == pytest.approx(host.objective[-1], rel=2e-3)
    assert device.sizes.tolist() == np.bincount(device.labels, minlength=16).tolist()


def test_torchs_sums_are_those_of_a_first_pass_and_of_numpy():
    rows, rng = np.round(8 * cloud(1500)), np.random.default_rng(3)
    kept = on_device(rows)
    for turn in range(4):
        centroids = np.round(rows[rng.choice(1500, 9, replace=False)])
        found, host = kept.assign(centroids), LocalPoints(ArrayRows(rows)).assign(centroids)
        assert found.counts.tolist() == host.counts.tolist(), turn
        assert np.array_equal(found.sums, host.sums)
        assert np.array_equal(found.errors, host.errors)
