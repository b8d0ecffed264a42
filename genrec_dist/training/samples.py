"""Training samples and evaluation histories gathered from CSR sequences.

No per-sample Python, and no array with an entry for each sample: see spans.py. The item array stays int32, on the host
perhaps a memory map; only batches are int64. Where a batch is gathered:

- on the host, from the array or map, by numpy; for a GPU it is pinned and copied without waiting (int32 on the way);
- on the GPU, when what it needs takes at most a sixteenth of its memory: 4 bytes an interaction and 24 a user, 3.6 GB
  of 80 for 571 million interactions of 54 million users. All samples of the same sequences share one copy.

Padding is a mask; the index at a masked place is 0 and means nothing.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import numpy as np
import torch

from genrec_dist.catalog.dataset import Sequences
from genrec_dist.training.spans import HoldoutSpans, Lengths, PrefixSpans, Spans, WindowSpans, shared_tensor

Indices = np.ndarray | torch.Tensor
S = TypeVar("S", bound=Spans)

RESIDENT_SHARE = 16
"""A GPU gathers by itself when the sequences take at most 1 / RESIDENT_SHARE of its memory."""


def fits_device(sequences: Sequences, device: torch.device, times: bool = False) -> bool:
    """True where the device should hold the sequences and gather batches by itself; never on a CPU."""
    if device.type != "cuda":
        return False
    needed = (12 if times else 4) * len(sequences.items) + 3 * 8 * len(sequences.indptr)
    return needed <= torch.cuda.get_device_properties(device).total_memory // RESIDENT_SHARE


def send(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A batch's array as a tensor: no copy on a CPU; pinned and copied without waiting to a GPU."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Gatherer(Generic[S]):
    """Samples of some sequences, gathered on the host or on a device.

    Args:
        items: item array, (num_interactions,) int32.
        spans: places of each sample.
        device: where batches are wanted.
        resident: gather on the device from a copy of the item array.
        times: of the items, (num_interactions,) int64; None: batches hold none.
    """

    def __init__(
        self, items: np.ndarray, spans: S, device: torch.device, resident: bool, times: np.ndarray | None = None
    ) -> None:
        self.items, self.spans, self.device, self.resident = items, spans, device, resident
        self._items = shared_tensor(items, device) if resident else None
        self._times: Any = shared_tensor(times, device) if resident and times is not None else times
        self._spans = spans.to(device) if resident else spans

    def __len__(self) -> int:
        return len(self.spans)

    @property
    def lengths(self) -> Lengths:
        """History lengths: `lengths[samples]`, numpy arrays both."""
        return Lengths(self.spans.lengths)

    @property
    def prefetch_depth(self) -> int:
        """Batches worth making ahead: 2 where the host gathers for a GPU."""
        return 2 if self.device.type == "cuda" and not self.resident else 0

    def tokens_of(self, indices: Indices) -> int:
        """Items of the histories of a batch; what the targets add is the caller's to count."""
        return int(self.spans.lengths(_host(indices)).sum())

    def _where(self, indices: Indices) -> tuple[Any, Any, Any]:
        """Item array, first and last + 1 place of each sample, where the batch is gathered."""
        if self._items is not None:
            tensor = send(indices, self.device) if isinstance(indices, np.ndarray) else indices
            return self._items, *self._spans.places(tensor)
        return self.items, *self.spans.places(_host(indices))

    def _widen(self, items: Any) -> torch.Tensor:
        """int32 items of a batch -> int64 on the device."""
        if isinstance(items, torch.Tensor):
            return items.long()
        return send(items, self.device).long()

    def _moments(self, start: Any, width: int) -> dict[str, torch.Tensor]:
        """Times of the places of a batch and of the one behind each, (B, width + 1) int64; padding holds anything."""
        if self._times is None:
            return {}
        place = start[:, None] + _arange(width + 1, start)
        return {"times": self._finish(self._times[place.clip(max=len(self.items) - 1)])}

    def _finish(self, values: Any) -> torch.Tensor:
        return values if isinstance(values, torch.Tensor) else send(values, self.device)


def _host(indices: Indices) -> np.ndarray:
    return indices.cpu().numpy() if isinstance(indices, torch.Tensor) else indices


def _arange(stop: int, like: Any) -> Any:
    if isinstance(like, torch.Tensor):
        return torch.arange(stop, device=like.device)
    return np.arange(stop)


class HistorySamples(Gatherer[PrefixSpans | HoldoutSpans]):
    """(history, target) pairs: the target is the item behind the history."""

    def gather(self, indices: Indices, width: int | None = None) -> dict[str, torch.Tensor]:
        """One batch, padded.

        Args:
            indices: samples.
            width: columns of the history. None: the longest history of the batch, or `max_history` if `indices` are on
                a device that gathers, where the longest would have to be waited for.

        Shapes:
            indices: (B,) int64, on the host or on the device.
            returns: history (B, width) int64, oldest first, right-padded; mask (B, width) bool, True at items;
                target (B,) int64; where they are wanted, times (B, width + 1) int64 of the history and of the target.
        """
        items, start, stop = self._where(indices)
        width = self._width(indices, start, stop) if width is None else width
        place = start[:, None] + _arange(width, start)
        mask = place < stop[:, None]
        history = items[place.clip(max=len(items) - 1)] * mask
        batch = {"history": self._widen(history), "mask": self._finish(mask), "target": self._widen(items[stop])}
        return batch | self._moments(start, width)

    def _width(self, indices: Indices, start: Any, stop: Any) -> int:
        if isinstance(start, np.ndarray):
            return int((stop - start).max(initial=1))
        if isinstance(indices, np.ndarray):
            return int(self.spans.lengths(indices).max(initial=1))
        return self.spans.max_history

    def targets(self, indices: np.ndarray) -> np.ndarray:
        """Target items, (B,) int32, on the host."""
        _, stop = self.spans.places(indices)
        return np.asarray(self.items[stop])


class RowSamples(Gatherer[WindowSpans]):
    """Windows of user sequences for models with a loss at every position (causal self-attention).

    A window covers at most `width` inputs; the targets are the inputs shifted by one.
    """

    @property
    def width(self) -> int:
        """Inputs of a window at most."""
        return self.spans.width

    def gather(self, indices: Indices, width: int = 0) -> dict[str, torch.Tensor]:
        """One batch: history, targets (B, width) int64 and mask (B, width) bool, right-padded; 0: the widest.

        Where they are wanted, times (B, width + 1) int64 of the history and of the last target.
        """
        items, start, stop = self._where(indices)
        width = width or self.width
        place = start[:, None] + _arange(width, start)
        mask = place < stop[:, None]
        last = len(items) - 1
        return {
            "history": self._widen(items[place.clip(max=last)] * mask),
            "targets": self._widen(items[(place + 1).clip(max=last)] * mask),
            "mask": self._finish(mask),
        } | self._moments(start, width)

    def targets(self, indices: np.ndarray) -> np.ndarray:
        """Target items of some windows, one window after the other, int32, on the host."""
        start, stop = self.spans.places(indices)
        counts = stop - start
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.asarray(self.items[np.repeat(start, counts) + within + 1])


def prefix_samples(
    sequences: Sequences,
    max_history: int,
    device: torch.device,
    resident: bool | None = None,
    times: bool = False,
) -> HistorySamples:
    """Every prefix of every user's train part as one sample: history of at most `max_history`, next item.

    Args:
        resident: gather on the device; None: where it fits.
        times: batches hold the items' times.
    """
    resident = fits_device(sequences, device, times) if resident is None else resident
    stamps = sequences.timestamps if times else None
    return HistorySamples(sequences.items, PrefixSpans.of(sequences, max_history), device, resident, stamps)


def holdout_samples(
    sequences: Sequences,
    max_history: int,
    split: str,
    device: torch.device,
    resident: bool | None = None,
    users: np.ndarray | None = None,
    times: bool = False,
) -> tuple[HistorySamples, np.ndarray]:
    """Histories before the validation or test target of each user that has one.

    Args:
        split: 'valid' or 'test'.
        resident: gather on the device; None: where it fits.
        users: some of those users, (n,) int64; None: all.
        times: batches hold the items' times.

    Returns:
        The samples, and the user index of each.
    """
    users = np.flatnonzero(sequences.lengths >= 3) if users is None else users
    spans = HoldoutSpans(users, sequences.indptr, 2 if split == "valid" else 1, max_history)
    resident = fits_device(sequences, device, times) if resident is None else resident
    stamps = sequences.timestamps if times else None
    return HistorySamples(sequences.items, spans, device, resident, stamps), users


def row_samples(
    sequences: Sequences, width: int, device: torch.device, resident: bool | None = None, times: bool = False
) -> RowSamples:
    """Cut each user's train part into windows of `width` inputs; every next item is a target exactly once.

    Args:
        times: batches hold the items' times.
    """
    resident = fits_device(sequences, device, times) if resident is None else resident
    stamps = sequences.timestamps if times else None
    return RowSamples(sequences.items, WindowSpans.of(sequences, width), device, resident, stamps)
