"""Bootstrap intervals of Recall@k and NDCG@k over users.

Drawing n users with replacement and counting them by rank is one multinomial draw over the distinct ranks, so a
sample costs as many numbers as there are ranks within the largest cutoff, not as many as there are users.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from genrec_dist.evaluation.metrics import gains, rank_counts

SAMPLES_AT_ONCE = 1024


def bootstrap_intervals(ranks: np.ndarray, cutoffs: Sequence[int], samples: int, seed: int) -> dict[str, list[float]]:
    """95% percentile intervals of the metrics under resampling of the users.

    Args:
        ranks: position of each user's held-out item, 1-based; 0 = not in the list.
        cutoffs: the values of k.
        samples: bootstrap samples; 0 gives no intervals.
        seed: of the draws; the same seed gives the same intervals for users in any order.

    Shapes:
        ranks: (num_users,) integers.

    Returns:
        [low, high] by `recall@k` and `ndcg@k`; empty without users or samples.

    Raises:
        DataError: not a vector of integers, or a negative rank.

    Source:
        B. Efron, R. Tibshirani, An Introduction to the Bootstrap (1993), section 13.3 (percentile interval).
    """
    return count_intervals(rank_counts(ranks, max(cutoffs)), cutoffs, samples, seed)


def count_intervals(counts: np.ndarray, cutoffs: Sequence[int], samples: int, seed: int) -> dict[str, list[float]]:
    """`bootstrap_intervals` from the number of users at each rank (see `rank_counts`).

    Shapes:
        counts: (at least max(cutoffs) + 1,) int64; ranks beyond the largest cutoff count as misses.
    """
    largest = max(cutoffs)
    counts = np.concatenate([[counts[0] + counts[largest + 1 :].sum()], counts[1 : largest + 1]])
    num_users = int(counts.sum())
    if num_users == 0 or samples == 0:
        return {}
    names, weights = _metric_weights(cutoffs, largest)
    occupied = np.flatnonzero(counts)
    generator = np.random.default_rng(seed)
    values = np.empty((samples, len(names)))
    for start in range(0, samples, SAMPLES_AT_ONCE):
        size = min(SAMPLES_AT_ONCE, samples - start)
        drawn = generator.multinomial(num_users, counts[occupied] / num_users, size=size)
        values[start : start + size] = drawn @ weights[occupied] / num_users
    low, high = np.quantile(values, [0.025, 0.975], axis=0)
    return {name: [float(low[i]), float(high[i])] for i, name in enumerate(names)}


def _metric_weights(cutoffs: Sequence[int], largest: int) -> tuple[list[str], np.ndarray]:
    """What a user at each rank adds to each metric, (largest + 1, num_metrics) float64; row 0 is the miss."""
    names, columns = [], []
    for k in cutoffs:
        inside = np.arange(largest + 1) <= k
        inside[0] = False
        names += [f"recall@{k}", f"ndcg@{k}"]
        columns += [inside.astype(np.float64), inside * np.concatenate([[0.0], gains(largest)])]
    return names, np.stack(columns, axis=1)
