"""Batches of next-item tasks: the global batch is shared out, counts and negatives are global.

Everything here is a function of the global batch alone, so gradients do not depend on the number of workers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from genrec_dist.catalog.dataset import Sequences
from genrec_dist.training.loop import local_part
from genrec_dist.training.order import BatchOrder
from genrec_dist.training.samples import HistorySamples, RowSamples, prefix_samples, row_samples
from genrec_dist.training.worker import Worker


@dataclass
class PrefixBatches:
    """Every prefix of a user as one sample.

    Args:
        samples: on the worker's device.
        order: global batches.
        max_history: widest history.
    """

    samples: HistorySamples
    order: BatchOrder
    max_history: int

    def __post_init__(self) -> None:
        self._lengths = self.samples.lengths
        self._targets = self.samples.items[self.samples.targets].cpu().numpy()

    @classmethod
    def build(
        cls, sequences: Sequences, max_history: int, batch_size: int, seed: int, buckets: int, device: torch.device
    ) -> PrefixBatches:
        """Prefix samples of the train part in the order of `seed`."""
        samples = prefix_samples(sequences, max_history, device)
        return cls(samples, BatchOrder(len(samples), batch_size, seed, samples.lengths, buckets), max_history)

    def local(self, indices: np.ndarray, worker: Worker) -> dict:
        """This worker's rows, cut to their longest history, and the global count over the workers."""
        mine = local_part(indices, worker)
        width = int(self._lengths[mine].max(initial=1))
        batch = self.samples.gather(torch.from_numpy(mine).to(worker.device), width)
        return batch | {"count": len(indices) / worker.world_size}

    def target_items(self, indices: np.ndarray) -> np.ndarray:
        """Target items of a global batch."""
        return self._targets[indices]


@dataclass
class RowBatches:
    """Windows of user sequences, a loss at every position."""

    samples: RowSamples
    order: BatchOrder

    def __post_init__(self) -> None:
        self._counts = self.samples.counts.cpu().numpy()
        self._starts = self.samples.starts.cpu().numpy()
        self._items = self.samples.items.cpu().numpy()

    @classmethod
    def build(
        cls, sequences: Sequences, width: int, batch_size: int, seed: int, device: torch.device, buckets: int = 0
    ) -> RowBatches:
        """Windows of the train part in the order of `seed`; with buckets, of like length and cut to it."""
        samples = row_samples(sequences, width, device)
        return cls(samples, BatchOrder(len(samples), batch_size, seed, samples.counts.cpu().numpy(), buckets))

    def local(self, indices: np.ndarray, worker: Worker) -> dict:
        """This worker's rows and the global count of targets over the workers."""
        mine = local_part(indices, worker)
        width = int(self._counts[mine].max(initial=1)) if self.order.buckets else self.samples.width
        rows = self.samples.gather(torch.from_numpy(mine).to(worker.device), width)
        return rows | {"count": float(self._counts[indices].sum()) / worker.world_size}

    def target_items(self, indices: np.ndarray) -> np.ndarray:
        """Target items of a global batch."""
        parts = [self._items[s + 1 : s + 1 + c] for s, c in zip(self._starts[indices], self._counts[indices])]
        return np.concatenate(parts)


def alignment_batch(target_items: np.ndarray, worker: Worker) -> dict:
    """Distinct items of the global batch, and the anchors among them that this worker takes."""
    distinct = np.unique(target_items)
    anchors = np.arange(worker.rank, len(distinct), worker.world_size)
    return {
        "align_items": torch.from_numpy(distinct.astype(np.int64)).to(worker.device),
        "align_anchors": torch.from_numpy(anchors).to(worker.device),
        "align_count": len(distinct) / worker.world_size,
    }


def uniform_negatives(num_items: int, count: int, seed: int, indices: np.ndarray, device: torch.device) -> torch.Tensor:
    """Uniform item draws that every worker makes alike: seeded by the run and the global batch."""
    rng = np.random.default_rng([seed, int(indices[0]), int(indices[-1]), len(indices)])
    return torch.from_numpy(rng.integers(num_items, size=count)).to(device)
