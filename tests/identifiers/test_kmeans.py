"""k-means: objective, empty clusters, balance, determinism, and scikit-learn from the same start."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.cluster import KMeans

from genrec_dist.identifiers.kmeans import KMeansOptions, capacities, deferred_acceptance, kmeans
from genrec_dist.identifiers.points import LocalPoints, squared_distances
from genrec_dist.identifiers.rows import ArrayRows
from genrec_dist.identifiers.starts import plus_plus_start


def cloud(n: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)


def loss(points: np.ndarray, labels: np.ndarray) -> float:
    """Sum of squared distances to the means of the clusters."""
    points = points.astype(np.float64)
    return sum(((points[labels == c] - points[labels == c].mean(0)) ** 2).sum() for c in np.unique(labels))


def options(**how) -> KMeansOptions:
    return KMeansOptions(**how)


def test_distances_and_assignment_against_loops():
    points, centroids = cloud(50, 4), cloud(7, 4, 1)
    slow = np.array([[((p - c) ** 2).sum() for c in centroids] for p in points])
    np.testing.assert_allclose(squared_distances(points, centroids), slow, atol=1e-4)
    local = LocalPoints(ArrayRows(points))
    moments = local.assign(centroids)
    labels = slow.argmin(1)
    assert local.labels().tolist() == labels.tolist()
    assert moments.counts.tolist() == np.bincount(labels, minlength=7).tolist()
    assert moments.objective == pytest.approx(slow.min(1).sum(), rel=1e-5)
    for cluster in range(7):
        np.testing.assert_allclose(moments.sums[cluster], points[labels == cluster].sum(0, np.float64), atol=1e-6)
        assert moments.errors[cluster] == pytest.approx(slow.min(1)[labels == cluster].sum(), abs=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_objective_never_rises(seed):
    result = kmeans(cloud(300, 5, seed), 12, seed=seed, options=options(iterations=40, tolerance=0.0))
    drops = np.diff(result.objective)
    assert len(drops) > 3
    assert (drops <= 1e-6 * result.objective[0]).all()
    assert result.objective[-1] < 0.95 * result.objective[0]


@pytest.mark.parametrize("balanced", [False, True])
def test_deterministic_for_a_seed(balanced):
    points = cloud(200, 4)
    first, second = (kmeans(points, 9, seed=3, options=options(balanced=balanced)) for _ in range(2))
    assert (first.labels == second.labels).all()
    assert (first.centroids == second.centroids).all()
    assert first.objective == second.objective
    assert (first.labels != kmeans(points, 9, seed=4, options=options(balanced=balanced)).labels).any()


@pytest.mark.parametrize("seed", range(4))
def test_against_scikit_learn_from_the_same_start(seed):
    points, k = cloud(400, 3, seed), 8
    start = plus_plus_start(points, k, np.random.default_rng([seed, 0]))
    ours = kmeans(points, k, seed=seed, options=options(iterations=200, tolerance=0.0))
    theirs = KMeans(k, init=start, n_init=1, max_iter=200, tol=0.0, algorithm="lloyd").fit(points)
    assert loss(points, ours.labels) == pytest.approx(theirs.inertia_, rel=1e-3)


def test_more_starts_are_never_worse():
    points = cloud(200, 2)
    one, ten = (kmeans(points, 10, seed=1, options=options(num_starts=n)).objective[-1] for n in (1, 10))
    assert ten < one


def test_separated_clusters_are_found():
    truth = np.repeat(np.arange(5), 30)
    points = (100 * np.eye(5)[truth] + cloud(150, 5)).astype(np.float32)
    for balanced in (False, True):
        labels = kmeans(points, 5, seed=0, options=options(balanced=balanced)).labels
        assert len({(a, b) for a, b in zip(truth.tolist(), labels.tolist())}) == 5


POINTS = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 40), st.integers(1, 3)), elements=st.integers(-3, 3).map(float)
)


@settings(max_examples=60, deadline=None)
@given(points=POINTS, k=st.integers(1, 12), seed=st.integers(0, 5), balanced=st.booleans())
def test_no_cluster_is_empty_and_balanced_sizes_differ_by_one(points, k, seed, balanced):
    labels = kmeans(points, k, seed=seed, options=options(balanced=balanced)).labels
    sizes = np.bincount(labels, minlength=k)
    assert len(sizes) == k
    if len(points) >= k:
        assert sizes.min() >= 1
    if balanced:
        assert sizes.max() - sizes.min() <= 1


@settings(max_examples=60, deadline=None)
@given(points=POINTS, k=st.integers(1, 8), seed=st.integers(0, 5))
def test_deferred_acceptance_gives_the_room_there_is(points, k, seed):
    cost = squared_distances(points, cloud(k, points.shape[1], seed))
    capacity = capacities(np.bincount(cost.argmin(1), minlength=k), len(points))
    assert capacity.sum() == len(points)
    assert set(capacity) <= {len(points) // k, -(-len(points) // k)}
    labels = deferred_acceptance(cost, capacity)
    assert np.bincount(labels, minlength=k).tolist() == capacity.tolist()


def test_deferred_acceptance_of_two_rows_by_hand():
    """Both prefer the first column; the row that loses less by moving goes."""
    cost = np.array([[0.0, 25.0], [1.0, 16.0]], np.float32)
    assert deferred_acceptance(cost, np.array([1, 1])).tolist() == [0, 1]
    assert deferred_acceptance(cost[::-1], np.array([1, 1])).tolist() == [1, 0]


def test_one_cluster_and_as_many_clusters_as_points():
    points = cloud(12, 2)
    for balanced in (False, True):
        assert set(kmeans(points, 1, options(balanced=balanced)).labels) == {0}
        every = kmeans(points, 12, seed=2, options=options(balanced=balanced))
        assert sorted(every.labels.tolist()) == list(range(12))
        assert every.objective[-1] == pytest.approx(0.0, abs=1e-4)


def test_identical_points_fill_all_clusters():
    points = np.ones((10, 3), np.float32)
    assert set(kmeans(points, 4).labels) == set(range(4))
    assert np.bincount(kmeans(points, 4, options(balanced=True)).labels).tolist() in ([3, 3, 2, 2],)
