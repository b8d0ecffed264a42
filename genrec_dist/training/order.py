"""Sample order as a pure function of (seed, epoch, global sample index).

A keyed Feistel permutation with cycle walking needs no memory and no state, so a checkpoint stores one
integer (the step) and any world size can go on from it with no sample lost or repeated.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from genrec_dist.training.counter import Array, mix

_ROUNDS = 6


def permute(indices: Array, size: int, seed: int, epoch: int) -> Array:
    """Images of `indices` under the permutation of 0..size-1 that belongs to (seed, epoch).

    Args:
        indices: positions in the epoch, a numpy array or a torch tensor.
        size: number of samples.
        seed: seed of the run.
        epoch: number of the epoch.

    Shapes:
        indices: (n,) int64 in [0, size). Returns (n,) int64.

    Source: Feistel network with cycle walking (Black and Rogaway, 2002).
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    key = int(mix(np.array([seed], np.int64), epoch + 1)[0])
    out = _network(indices, half, mask, key)
    outside = out >= size
    while bool(outside.any()):
        out[outside] = _network(out[outside], half, mask, key)
        outside = out >= size
    return out


def _network(values: Array, half: int, mask: int, key: int) -> Array:
    left, right = values >> half, values & mask
    for r in range(_ROUNDS):
        left, right = right, left ^ (mix(right, key + r) & mask)
    return (left << half) | right


class Lengths(Protocol):
    """Cost of samples: an array, or what works it out for those asked for."""

    def __getitem__(self, samples: np.ndarray, /) -> np.ndarray: ...


class BatchOrder:
    """Global batches of every step.

    Without buckets the samples of many batches are permuted at once and handed out as slices: a permutation is some
    hundred array operations, whatever the number of samples.

    Args:
        num_samples: samples in an epoch.
        batch_size: global batch; the last batch of an epoch may be smaller.
        seed: seed of the run.
        lengths: cost of each sample; with `buckets` > 0 the batches of a window of `buckets` batches are
            formed from samples of like length, and the window's batches are shuffled.
        buckets: batches in a window; 0 keeps the plain shuffle.
        device: batches are tensors that are made there; by default numpy arrays. Not with buckets.
        permuted: samples permuted at once without buckets, rounded down to whole batches, one at least; None: 2^20 on
            a device, 2^14 in numpy, which fit a processor's cache.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        lengths: Lengths | None = None,
        buckets: int = 0,
        device: torch.device | None = None,
        permuted: int | None = None,
    ) -> None:
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.device = device
        self.lengths, self.buckets = lengths, buckets if lengths is not None else 0
        permuted = permuted or (1 << 14 if device is None else 1 << 20)
        self._span = self.buckets or max(1, permuted // batch_size)  # batches of a window
        self._window: tuple[int, int, Any] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def batch(self, step: int) -> Any:
        """Sample indices of a global step, (batch,) int64; a view that must not be written to."""
        epoch, index = divmod(step, self.steps_per_epoch)
        window, chosen = divmod(index, self._span)
        samples = self._samples(epoch, window)
        if self.buckets:
            num_batches = -(-len(samples) // self.batch_size)
            chosen = permute(np.array([chosen]), num_batches, self.seed + 1, epoch * 1_000_003 + window)[0]
            # The short batch stays last: it is the one at the sorted end of the window.
        return samples[chosen * self.batch_size : (chosen + 1) * self.batch_size]

    def _samples(self, epoch: int, window: int) -> Any:
        """Samples of a window in the order of its batches."""
        kept = self._window  # read once: another thread may ask for another window
        if kept is None or kept[:2] != (epoch, window):
            start = window * self._span * self.batch_size
            stop = min(start + self._span * self.batch_size, self.num_samples)
            if self.device is not None and not self.buckets:
                places: Any = torch.arange(start, stop, device=self.device)
            else:
                places = np.arange(start, stop)
            samples = permute(places, self.num_samples, self.seed, epoch)
            if self.buckets:
                assert self.lengths is not None
                samples = samples[np.argsort(self.lengths[samples], kind="stable")]
            kept = self._window = (epoch, window, samples)
        return kept[2]
