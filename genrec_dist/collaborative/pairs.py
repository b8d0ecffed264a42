"""Batches of training pairs for LightGCN: the global batch is a function of the step; a worker takes its users' pairs.

A sample is the place of a pair in the graph's order by user. Negatives are functions of (seed, batch, sample), so no
batch depends on how the graph is partitioned. Everything is drawn and looked up on the worker's device: a large batch
on a GPU would wait for the host otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from genrec_dist.config import LightgcnConfig
from genrec_dist.graph.interactions import Interactions
from genrec_dist.graph.layout import Partition, places_of_rows
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
        odds: (b, num_negatives) float64 (sampled_softmax), see losses.sampled_softmax.
    """

    users: torch.Tensor
    positives: torch.Tensor
    negatives: torch.Tensor
    size: int
    odds: torch.Tensor | None = None


class PairBatches:
    """Batches of a worker.

    Args:
        graph: the whole graph, mapped into memory. Of all users the row pointers and owners are held (12 bytes each),
            of all items the distribution of negatives by popularity (8 bytes each), of the pairs this worker's.
        partition: what this worker owns.
        config: lightgcn section.
        seed: of order and negatives.
        device: where batches are made.
    """

    def __init__(
        self, graph: Interactions, partition: Partition, config: LightgcnConfig, seed: int, device: torch.device
    ) -> None:
        self.config, self.seed = config, seed
        self.num_items = graph.num_items
        self.order = BatchOrder(graph.num_pairs, config.optim.batch_size, seed, device=device)
        users = np.asarray(partition.users)
        own_row = np.full(graph.num_users, -1, np.int32)
        own_row[users] = np.arange(len(users))
        starts, counts = graph.user_indptr[users], graph.user_indptr[users + 1] - graph.user_indptr[users]
        start = np.concatenate([[0], np.cumsum(counts)])
        items = np.asarray(graph.user_items[places_of_rows(starts, counts)])
        to_device = lambda array: torch.from_numpy(np.array(array)).to(device)  # noqa: E731
        self._indptr, self._own_row, self._start = map(to_device, (graph.user_indptr, own_row, start))
        self._items = to_device(items)
        self._keys = to_device(np.repeat(np.arange(len(users)), counts) * self.num_items + items)
        self.distribution: torch.Tensor | None = None
        if config.negatives == "popularity":
            self.distribution = to_device(item_distribution(np.diff(graph.item_indptr), config.popularity_exponent))

    def key(self, samples: torch.Tensor) -> int:
        """What the random numbers of a global batch are drawn by."""
        first, last = samples[[0, -1]].tolist()
        return stream_key(self.seed, first, last, len(samples))

    def local(self, samples: torch.Tensor) -> PairBatch:
        """This worker's pairs of a global batch, in its order.

        Shapes:
            samples: (n,) int64 on the device.
        """
        key = self.key(samples)
        user = torch.searchsorted(self._indptr, samples, right=True) - 1
        row = self._own_row[user].long()
        mine = row >= 0
        user, row, own = user[mine], row[mine], samples[mine]
        positives = self._items[self._start[row] + (own - self._indptr[user])].long()
        if self.config.loss == "sampled_softmax":
            counters = torch.arange(self.config.num_negatives, device=samples.device)
            negatives = self.draw(counters, stream_key(key, 0))
            odds = (1 - self.chances(positives))[:, None] / self.chances(negatives)[None]
            return PairBatch(row, positives, negatives, len(samples), odds)
        negatives = self._negatives(row, own, stream_key(key, 1))
        return PairBatch(row, positives, negatives, len(samples))

    def _negatives(self, row: torch.Tensor, samples: torch.Tensor, key: int) -> torch.Tensor:
        """For each pair, items that its user has no training interaction with."""
        each = self.config.num_negatives
        counters = (samples[:, None] * each + torch.arange(each, device=samples.device)).ravel()
        rows = row.repeat_interleave(each)
        drawn = self.draw(counters, stream_key(key, 0))
        todo = torch.arange(len(drawn), device=drawn.device)
        for attempt in range(1, TRIES):
            todo = todo[self.is_positive(rows[todo], drawn[todo])]
            if not len(todo):
                break
            drawn[todo] = self.draw(counters[todo], stream_key(key, attempt))
        return drawn.view(-1, each)

    def is_positive(self, rows: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """True where the user of an own row has a training interaction with the item."""
        keys = rows * self.num_items + items
        if not len(self._keys):
            return torch.zeros_like(keys, dtype=torch.bool)
        place = torch.searchsorted(self._keys, keys).clamp(max=len(self._keys) - 1)
        return self._keys[place] == keys

    def draw(self, counters: torch.Tensor, key: int) -> torch.Tensor:
        """Items by the negative distribution, one for each counter."""
        chance = uniforms(counters, key)
        if self.distribution is None:
            return (chance * self.num_items).long().clamp(max=self.num_items - 1)
        return torch.searchsorted(self.distribution, chance, right=True).clamp(max=self.num_items - 1)

    def chances(self, items: torch.Tensor) -> torch.Tensor:
        """Chance of each item to be drawn, float64."""
        if self.distribution is None:
            return torch.full(items.shape, 1 / self.num_items, dtype=torch.float64, device=items.device)
        below = torch.where(items > 0, self.distribution[(items - 1).clamp(min=0)], 0.0)
        return self.distribution[items] - below


def item_distribution(degrees: np.ndarray, exponent: float) -> np.ndarray:
    """Cumulative chance of each item to be drawn as a negative, by its degree to a power.

    Shapes:
        degrees: (num_items,) integers. returns: (num_items,) float64, the last 1.
    """
    total = np.cumsum((degrees / max(int(degrees.max(initial=1)), 1)) ** exponent)
    return total / total[-1]
