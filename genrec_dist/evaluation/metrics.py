"""Ranks of the held-out items -> Recall@k and NDCG@k.

Reads one rank a user, writes nothing. Only the number of users at each rank enters the sums, so the result is the
same to the last bit however the users were spread over workers. It does not produce ranks or mask anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from genrec_dist.errors import DataError

BITS = "bits_per_item"
"""Name of the validation loss of evaluation/likelihood.py among a validation's metrics."""


def rank_counts(ranks: np.ndarray, largest: int) -> np.ndarray:
    """Number of users at each rank from 1 to `largest`; entry 0 counts the misses and everything beyond.

    Args:
        ranks: position of each user's held-out item, 1-based; 0 = not in the list.
        largest: last rank told apart.

    Shapes:
        ranks: (num_users,) integers.
        returns: (largest + 1,) int64.

    Raises:
        DataError: not a vector of integers, or a negative rank.
    """
    ranks = np.asarray(ranks)
    if ranks.ndim != 1 or not np.issubdtype(ranks.dtype, np.integer):
        raise DataError(
            "ranks are not a vector of integers", got=f"shape {ranks.shape}, {ranks.dtype}", expected="(num_users,) int"
        )
    if ranks.size and ranks.min() < 0:
        raise DataError("negative rank", got=int(ranks.min()), expected="1-based ranks, 0 for a miss")
    return np.bincount(np.where(ranks > largest, 0, ranks), minlength=largest + 1)


def rank_metrics(ranks: np.ndarray, cutoffs: Sequence[int]) -> dict[str, float]:
    """Recall@k and NDCG@k of leave-one-out ranks.

    One item is relevant to a user: Recall@k is the share of users whose item stands at rank <= k, and NDCG@k is the
    mean of 1 / log2(rank + 1) over all users, 0 beyond rank k (the ideal DCG is 1).

    Args:
        ranks: position of each user's held-out item, 1-based; 0 = not in the list.
        cutoffs: the values of k.

    Shapes:
        ranks: (num_users,) integers.

    Returns:
        `recall@k` and `ndcg@k` for every cutoff; empty when there are no users.

    Raises:
        DataError: not a vector of integers, or a negative rank.
    """
    return count_metrics(rank_counts(ranks, max(cutoffs)), cutoffs)


def count_metrics(counts: np.ndarray, cutoffs: Sequence[int]) -> dict[str, float]:
    """Recall@k and NDCG@k from `rank_counts`, which of several workers may be added up.

    Shapes:
        counts: (at least max(cutoffs) + 1,) int64.
    """
    num_users = int(counts.sum())
    if num_users == 0:
        return {}
    metrics = {}
    for k in cutoffs:
        metrics[f"recall@{k}"] = int(counts[1 : k + 1].sum()) / num_users
        metrics[f"ndcg@{k}"] = math.fsum(counts[1 : k + 1] * gains(k)) / num_users
    return metrics


def gains(largest: int) -> np.ndarray:
    """Discounted gain 1 / log2(rank + 1) of ranks 1 to `largest`, (largest,) float64."""
    return 1.0 / np.log2(np.arange(2, largest + 2, dtype=np.float64))
