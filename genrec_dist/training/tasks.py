"""Batches of next-item tasks: the global batch is shared out, counts and negatives are global.

Everything here is a function of the global batch alone, so gradients do not depend on the number of workers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from genrec_dist.catalog.dataset import Sequences
from genrec_dist.training.order import BatchOrder
from genrec_dist.training.samples import HistorySamples, Indices, RowSamples, prefix_samples, row_samples, send
from genrec_dist.training.schedule import local_part
from genrec_dist.training.spans import Lengths
from genrec_dist.training.worker import Worker

WIDTH_STEP = 4
"""Columns of batches on a GPU: few shapes, so few captured graphs and compiled kernels."""


def _rounded(width: int, most: int, device: torch.device) -> int:
    """Columns of a batch: on a GPU a multiple of `WIDTH_STEP`."""
    return min(-(-width // WIDTH_STEP) * WIDTH_STEP, most) if device.type == "cuda" else width


@dataclass
class PrefixBatches:
    """Every prefix of a user as one sample.

    Args:
        samples: gathered on the host or on the worker's device.
        order: global batches.
        depths: code length of each item, where a batch says the longest of its targets.
    """

    samples: HistorySamples
    order: BatchOrder
    depths: np.ndarray | None = None

    @classmethod
    def build(
        cls,
        sequences: Sequences,
        max_history: int,
        batch_size: int,
        seed: int,
        buckets: int,
        device: torch.device,
        depths: np.ndarray | None = None,
        times: bool = False,
    ) -> PrefixBatches:
        """Prefix samples of the train part in the order of `seed`; buckets go by `depths` first, if there are any."""
        samples = prefix_samples(sequences, max_history, device, times=times)
        lengths = samples.lengths
        if depths is not None:
            lengths = Lengths(lambda s: depths[samples.targets(s)] * (max_history + 1) + samples.lengths[s])
        return cls(samples, BatchOrder(len(samples), batch_size, seed, lengths, buckets), depths)

    def _shared(self, indices: Any, worker: Worker) -> dict:
        """What a global batch says to all workers."""
        shared: dict[str, Any] = {"count": len(indices) / worker.world_size}
        if self.depths is not None:
            shared["levels"] = int(self.depths[self.target_items(indices)].max())
        return shared

    def local(self, indices: Any, worker: Worker) -> dict:
        """This worker's rows, cut to their longest history, and the global count over the workers."""
        mine = local_part(indices, worker)
        width = None
        if self.samples.device.type == "cuda" and isinstance(mine, np.ndarray):
            longest = int(self.samples.spans.lengths(mine).max(initial=1))
            width = _rounded(longest, self.samples.spans.max_history, self.samples.device)
        return self.samples.gather(mine, width) | self._shared(indices, worker)

    def local_parts(self, indices: np.ndarray, worker: Worker, parts: int) -> list[dict]:
        """`local` in parts of like length, each cut to its own longest history; so cut that padding is least.

        The sum of the parts' losses is the loss of the whole: `count` is that of the global batch. A processor is
        faster by about the padding that is left out; a GPU is not, where small kernels leave it idle. There are always
        so many parts, if need be empty ones: all workers call the same modules.
        """
        mine = local_part(indices, worker)
        lengths = self.samples.lengths[mine]
        order = np.argsort(lengths, kind="stable")
        shared = self._shared(indices, worker)
        pieces = np.split(mine[order], least_padding(lengths[order], parts))
        return [self.samples.gather(part) | shared for part in pieces]

    def target_items(self, indices: np.ndarray) -> np.ndarray:
        """Target items of a global batch."""
        return self.samples.targets(indices)

    @property
    def most_targets(self) -> int:
        """Targets of a global batch at most."""
        return self.order.batch_size

    def tokens_of(self, indices: Indices) -> int:
        """Items of the histories of a global batch."""
        return self.samples.tokens_of(indices)

    @property
    def prefetch_depth(self) -> int:
        """Batches worth making ahead."""
        return self.samples.prefetch_depth


def least_padding(lengths: np.ndarray, parts: int) -> list[int]:
    """Where to cut sorted rows into parts so that the parts, each as wide as its longest row, have fewest places.

    Args:
        lengths: ascending.
        parts: number of parts; some are empty where there are fewer distinct lengths.

    Shapes:
        lengths: (n,) int64. Returns the first row of all parts but the first, ascending.
    """
    values, counts = np.unique(lengths, return_counts=True)
    ends, wide = np.append(0, np.cumsum(counts)), np.append(0, values)
    places = np.where(np.tri(len(ends), k=-1, dtype=bool), np.inf, (ends[None] - ends[:, None]) * wide[None])
    cost, choices = np.append(0.0, np.full(len(values), np.inf)), []
    for _ in range(parts):  # cost[j]: fewest places of the first j distinct lengths in the parts so far
        tried = cost[:, None] + places
        choices.append(tried.argmin(0))
        cost = tried.min(0)
    starts, stop = [], len(values)
    for chosen in reversed(choices):
        stop = int(chosen[stop])
        starts.append(int(ends[stop]))
    return starts[-2::-1]


@dataclass
class RowBatches:
    """Windows of user sequences, a loss at every position."""

    samples: RowSamples
    order: BatchOrder

    @classmethod
    def build(
        cls,
        sequences: Sequences,
        width: int,
        batch_size: int,
        seed: int,
        device: torch.device,
        buckets: int = 0,
        times: bool = False,
    ) -> RowBatches:
        """Windows of the train part in the order of `seed`; with buckets, of like length and cut to it."""
        samples = row_samples(sequences, width, device, times=times)
        return cls(samples, BatchOrder(len(samples), batch_size, seed, samples.lengths, buckets))

    def local(self, indices: np.ndarray, worker: Worker) -> dict:
        """This worker's rows and the global count of targets over the workers."""
        mine = local_part(indices, worker)
        width = self.samples.width
        if self.order.buckets:
            width = _rounded(int(self.samples.lengths[mine].max(initial=1)), width, self.samples.device)
        return self.samples.gather(mine, width) | {"count": float(self.tokens_of(indices)) / worker.world_size}

    def target_items(self, indices: np.ndarray) -> np.ndarray:
        """Target items of a global batch."""
        return self.samples.targets(indices)

    @property
    def most_targets(self) -> int:
        """Targets of a global batch at most."""
        return self.order.batch_size * self.samples.width

    @property
    def prefetch_depth(self) -> int:
        """Batches worth making ahead."""
        return self.samples.prefetch_depth

    def tokens_of(self, indices: Indices) -> int:
        """Inputs of a global batch, as many as targets."""
        return self.samples.tokens_of(indices)


def alignment_batch(target_items: np.ndarray, worker: Worker, padded: int = 0) -> dict:
    """Distinct items of the global batch, and the anchors among them that this worker takes.

    Args:
        padded: places for distinct items, so that all batches have the same shapes; `align_size` of them are taken.
            0: as many as there are.
    """
    distinct = np.unique(target_items)
    size = len(distinct)
    places = padded + 1 if padded else size  # the last place is padding, for workers without an anchor of their own
    anchors = np.arange(worker.rank, -(-places // worker.world_size) * worker.world_size, worker.world_size)
    items = np.zeros(places, np.int64)
    items[:size] = distinct
    batch = {
        "align_items": send(items, worker.device),
        "align_anchors": send(anchors[anchors < size] if not padded else anchors.clip(max=places - 1), worker.device),
        "align_count": size / worker.world_size,
    }
    return batch | ({"align_size": torch.full((), size, device=worker.device)} if padded else {})


def steady(batch: dict, worker: Worker) -> dict:
    """On a GPU the counts of a batch as tensors, so that one captured step serves all batches of a shape."""
    if worker.device.type != "cuda":
        return batch
    numbers = {name: value for name, value in batch.items() if isinstance(value, (int, float))}
    return batch | {name: torch.full((), float(value), device=worker.device) for name, value in numbers.items()}


def uniform_negatives(num_items: int, count: int, seed: int, indices: np.ndarray, device: torch.device) -> torch.Tensor:
    """Uniform item draws that every worker makes alike: seeded by the run and the global batch."""
    rng = np.random.default_rng([seed, int(indices[0]), int(indices[-1]), len(indices)])
    return torch.from_numpy(rng.integers(num_items, size=count)).to(device)
