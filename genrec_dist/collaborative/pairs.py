"""Batches of training pairs for LightGCN: the global batch is a function of the step; a worker takes its users' pairs.

A sample is the place of a pair in the graph's order by user. Negatives are functions of (seed, batch, sample), so no
batch depends on how the graph is partitioned.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from genrec_dist.config import LightgcnConfig
from genrec_dist.graph.interactions import Interactions
from genrec_dist.graph.layout import Partition
from genrec_dist.training.counter import stream_key, uniforms
from genrec_dist.training.order import BatchOrder

TRIES = 8
"""Draws for a negative that is not an item of the user; after them it stays what it is."""


@dataclass(frozen=True)
class PairBatch:
    """One worker's part of a batch.

    Args:
        size: pairs of the whole batch.

    Shapes:
        users: (b,) int64 own rows. positives: (b,) int64 item indices. negatives: (b, num_negatives) int64 item
            indices (bpr), or (num_negatives,), the same on every worker (sampled_softmax).
        odds: (b, num_negatives) float32 (sampled_softmax), see losses.sampled_softmax.
    """

    users: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray
    size: int
    odds: np.ndarray | None = None


class PairBatches:
    """Batches of a worker.

    Args:
        graph: the whole graph, mapped into memory; only its row pointers and this worker's rows are read.
        partition: what this worker owns.
        config: lightgcn section.
        seed: of order and negatives.
    """

    def __init__(self, graph: Interactions, partition: Partition, config: LightgcnConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.num_items = graph.num_items
        self.order = BatchOrder(graph.num_pairs, config.optim.batch_size, seed)
        self._indptr = graph.user_indptr
        users = np.asarray(partition.users)
        self._own_row = np.full(graph.num_users, -1, np.int32)
        self._own_row[users] = np.arange(len(users))
        starts, counts = graph.user_indptr[users], graph.user_indptr[users + 1] - graph.user_indptr[users]
        self._start = np.concatenate([[0], np.cumsum(counts)])
        place = np.arange(self._start[-1]) + np.repeat(starts - self._start[:-1], counts)
        self._items = np.asarray(graph.user_items[place])
        self._keys = np.repeat(np.arange(len(users)), counts) * self.num_items + self._items
        self.distribution = item_distribution(np.diff(graph.item_indptr), config)

    def key(self, samples: np.ndarray) -> int:
        """What the random numbers of a global batch are drawn by."""
        return stream_key(self.seed, int(samples[0]), int(samples[-1]), len(samples))

    def local(self, samples: np.ndarray) -> PairBatch:
        """This worker's pairs of a global batch, in its order."""
        key = self.key(samples)
        user = np.searchsorted(self._indptr, samples, side="right") - 1
        row = self._own_row[user].astype(np.int64)
        mine = row >= 0
        user, row, own = user[mine], row[mine], samples[mine]
        positives = self._items[self._start[row] + (own - self._indptr[user])].astype(np.int64)
        if self.config.loss == "sampled_softmax":
            negatives = self._draw(np.arange(self.config.num_negatives), stream_key(key, 0))
            odds = (1 - self.chances(positives))[:, None] / self.chances(negatives)[None]
            return PairBatch(row, positives, negatives, len(samples), odds.astype(np.float32))
        negatives = self._negatives(row, own, stream_key(key, 1))
        return PairBatch(row, positives, negatives, len(samples))

    def _negatives(self, row: np.ndarray, samples: np.ndarray, key: int) -> np.ndarray:
        """For each pair, items that its user has no training interaction with."""
        each = self.config.num_negatives
        counters = samples[:, None] * each + np.arange(each)
        rows = np.broadcast_to(row[:, None], counters.shape)
        drawn = self._draw(counters, stream_key(key, 0))
        for attempt in range(1, TRIES):
            bad = self.is_positive(rows, drawn)
            if not bad.any():
                break
            drawn[bad] = self._draw(counters[bad], stream_key(key, attempt))
        return drawn

    def is_positive(self, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """True where the user of an own row has a training interaction with the item."""
        keys = rows * self.num_items + items
        place = np.minimum(np.searchsorted(self._keys, keys), max(len(self._keys) - 1, 0))
        return self._keys[place] == keys if len(self._keys) else np.zeros(keys.shape, bool)

    def _draw(self, counters: np.ndarray, key: int) -> np.ndarray:
        """Items by the negative distribution."""
        chance = uniforms(counters, key)
        if self.distribution is None:
            return np.minimum((chance * self.num_items).astype(np.int64), self.num_items - 1)
        return np.minimum(np.searchsorted(self.distribution, chance, side="right"), self.num_items - 1)

    def chances(self, items: np.ndarray) -> np.ndarray:
        """Chance of each item to be drawn."""
        if self.distribution is None:
            return np.full(items.shape, 1 / self.num_items)
        below = np.where(items > 0, self.distribution[np.maximum(items - 1, 0)], 0.0)
        return self.distribution[items] - below


def item_distribution(degrees: np.ndarray, config: LightgcnConfig) -> np.ndarray | None:
    """Cumulative chance of each item to be drawn as a negative; None for uniform draws.

    Shapes:
        degrees: (num_items,) integers. returns: (num_items,) float64, the last 1.
    """
    if config.negatives == "uniform":
        return None
    weights = degrees.astype(np.float64) ** config.popularity_exponent
    total = np.cumsum(weights)
    return total / total[-1]
