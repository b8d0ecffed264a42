"""Metrics against hand-worked cases and independent implementations; bootstrap against naive resampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from genrec_dist.errors import DataError
from genrec_dist.evaluation.bootstrap import bootstrap_intervals
from genrec_dist.evaluation.metrics import rank_metrics

CUTOFFS = [1, 5, 10, 20]


def some_ranks(num_users: int, seed: int = 0) -> np.ndarray:
    ranks = np.random.default_rng(seed).geometric(0.05, num_users)
    return np.where(ranks > 50, 0, ranks).astype(np.int32)


def test_hand_worked_case():
    metrics = rank_metrics(np.array([1, 3, 0, 7]), [1, 3, 10])
    assert metrics["recall@1"] == 1 / 4
    assert metrics["recall@3"] == 2 / 4
    assert metrics["recall@10"] == 3 / 4
    assert metrics["ndcg@1"] == 1 / 4
    assert metrics["ndcg@3"] == (1 + 1 / 2) / 4
    assert metrics["ndcg@10"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 4, abs=1e-15)


def test_against_brute_force_per_user():
    ranks = some_ranks(3000)
    metrics = rank_metrics(ranks, CUTOFFS)
    for k in CUTOFFS:
        hits = [1.0 if 1 <= r <= k else 0.0 for r in ranks.tolist()]
        gains = [1 / math.log2(r + 1) if 1 <= r <= k else 0.0 for r in ranks.tolist()]
        assert metrics[f"recall@{k}"] == sum(hits) / len(ranks)
        assert metrics[f"ndcg@{k}"] == pytest.approx(sum(gains) / len(ranks), rel=1e-12)


def test_ndcg_against_sklearn():
    num_users, num_items = 40, 30
    generator = np.random.default_rng(1)
    scores = generator.normal(size=(num_users, num_items))
    target = generator.integers(num_items, size=num_users)
    relevance = np.eye(num_items)[target]
    ranks = 1 + (scores > scores[np.arange(num_users), target, None]).sum(axis=1)
    metrics = rank_metrics(ranks, CUTOFFS)
    for k in CUTOFFS:
        assert metrics[f"ndcg@{k}"] == pytest.approx(ndcg_score(relevance, scores, k=k), rel=1e-12)


def test_same_bits_for_users_in_any_order():
    ranks = some_ranks(5000)
    shuffled = np.random.default_rng(2).permutation(ranks)
    assert rank_metrics(ranks, CUTOFFS) == rank_metrics(shuffled, CUTOFFS)
    assert bootstrap_intervals(ranks, CUTOFFS, 50, 3) == bootstrap_intervals(shuffled, CUTOFFS, 50, 3)


def test_a_rank_beyond_the_largest_cutoff_is_a_miss():
    assert rank_metrics(np.array([11, 500, 2]), [10]) == rank_metrics(np.array([0, 0, 2]), [10])


def test_no_users_no_metrics():
    none = np.empty(0, dtype=np.int32)
    assert rank_metrics(none, CUTOFFS) == {}
    assert bootstrap_intervals(none, CUTOFFS, 100, 0) == {}


@pytest.mark.parametrize("ranks", [np.array([1.0, 2.0]), np.array([[1, 2]]), np.array([3, -1])])
def test_what_is_not_a_rank_is_refused(ranks):
    with pytest.raises(DataError):
        rank_metrics(ranks, CUTOFFS)


def test_bootstrap_agrees_with_naive_resampling():
    ranks = some_ranks(400)
    intervals = bootstrap_intervals(ranks, CUTOFFS, samples=20_000, seed=5)
    generator = np.random.default_rng(6)
    naive = [rank_metrics(generator.choice(ranks, len(ranks)), CUTOFFS) for _ in range(3000)]
    for name, (low, high) in intervals.items():
        values = np.array([m[name] for m in naive])
        spread = values.std()
        assert low == pytest.approx(np.quantile(values, 0.025), abs=0.25 * spread)
        assert high == pytest.approx(np.quantile(values, 0.975), abs=0.25 * spread)


def test_bootstrap_is_seeded_and_brackets_the_metric():
    ranks = some_ranks(2000)
    first = bootstrap_intervals(ranks, CUTOFFS, 500, 7)
    assert first == bootstrap_intervals(ranks, CUTOFFS, 500, 7)
    assert first != bootstrap_intervals(ranks, CUTOFFS, 500, 8)
    for name, value in rank_metrics(ranks, CUTOFFS).items():
        low, high = first[name]
        assert low < value < high


def test_bootstrap_of_users_who_all_agree_has_no_width():
    intervals = bootstrap_intervals(np.full(50, 2), [1, 5], 100, 0)
    assert intervals["recall@1"] == [0.0, 0.0]
    assert intervals["recall@5"] == [1.0, 1.0]
    assert intervals["ndcg@5"] == pytest.approx([1 / math.log2(3)] * 2)


def test_bootstrap_can_be_switched_off():
    assert bootstrap_intervals(some_ranks(10), CUTOFFS, 0, 0) == {}
