"""Which places of the item array a sample covers, worked out from its number.

A user's samples are numbered one after the other, so the number and the cumulative counts of the users say everything:
a sample costs no memory of its own, and all of them O(users). Numpy arrays and torch tensors give equal results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary, finalize

import numpy as np
import torch

from genrec_dist.catalog.dataset import Sequences
from genrec_dist.training.counter import Array

Self = TypeVar("Self", bound="Spans")


def user_of(cumulative: Any, samples: Array) -> Array:
    """User that each sample belongs to.

    Shapes:
        cumulative: (num_users + 1,) int64, samples before each user. samples: (n,) int64. Returns (n,) int64.
    """
    if isinstance(samples, torch.Tensor):
        return torch.searchsorted(cumulative, samples, right=True) - 1
    order = np.argsort(samples)  # neighbours share most of their searches' way, and its cache lines
    user = np.empty(len(samples), np.int64)
    user[order] = np.searchsorted(cumulative, samples[order], side="right") - 1
    return user


def prefix_counts(lengths: np.ndarray) -> np.ndarray:
    """Prefix samples of users with sequences of these lengths: one less than the train part has items."""
    return np.maximum(np.where(lengths >= 3, lengths - 3, lengths - 1), 0)


def prefix_lengths(cumulative: Any, max_history: int, samples: Array) -> Array:
    """History length of each prefix sample, (n,) int64."""
    return (samples - cumulative[user_of(cumulative, samples)] + 1).clip(max=max_history)


def cumulate(counts: np.ndarray) -> np.ndarray:
    """Counts -> (n + 1,) int64, the sum before each place."""
    out = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=out[1:])
    return out


class Lengths:
    """Lengths of samples, worked out for those that are asked for: `lengths[samples]`."""

    def __init__(self, of: Callable[[np.ndarray], np.ndarray]) -> None:
        self.of = of

    def __getitem__(self, samples: np.ndarray) -> np.ndarray:
        return self.of(samples)


class Spans(Protocol):
    """Sample number -> half-open range of places."""

    def __len__(self) -> int: ...

    def places(self, samples: Array) -> tuple[Array, Array]:
        """First place and the one behind the last, (n,) int64 each."""

    def lengths(self, samples: Array) -> Array:
        """Places of each sample, (n,) int64."""

    def to(self: Self, device: torch.device) -> Self:
        """The same with tensors on a device."""


@dataclass(frozen=True)
class _Arrays:
    """Dataclass whose numpy arrays (annotated Any, for they may be tensors) can move to a device; numbers stay."""

    def to(self, device: torch.device) -> Any:
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return replace(self, **{k: shared_tensor(v, device) for k, v in values if isinstance(v, np.ndarray)})


_PIECE = 1 << 24
_shared: WeakValueDictionary[tuple[int, torch.device], torch.Tensor] = WeakValueDictionary()


def shared_tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A device's copy of a host array, one for all who ask for it while any of them keeps it.

    Copied piece by piece: a mapped array is never whole in the memory of the process.
    """
    key = (id(array), device)
    tensor = _shared.get(key)
    if tensor is None:
        tensor = torch.empty(len(array), dtype=torch.from_numpy(np.zeros(0, array.dtype)).dtype, device=device)
        for first in range(0, len(array), _PIECE):
            piece = np.array(array[first : first + _PIECE])
            tensor[first : first + len(piece)] = torch.from_numpy(piece)
        _shared[key] = tensor
        finalize(array, _shared.pop, key, None)  # its id may be another array's from then on
    return tensor


@dataclass(frozen=True)
class PrefixSpans(_Arrays):
    """Histories of every prefix of every user's train part; the target is the place behind.

    Args:
        size: number of samples.
        indptr: of the sequences.
        cumulative: samples before each user.
        max_history: longest history.

    Shapes:
        indptr, cumulative: (num_users + 1,) int64.
    """

    size: int
    indptr: Any
    cumulative: Any
    max_history: int

    @classmethod
    def of(cls, sequences: Sequences, max_history: int) -> PrefixSpans:
        cumulative = cumulate(prefix_counts(sequences.lengths))
        return cls(int(cumulative[-1]), sequences.indptr, cumulative, max_history)

    def __len__(self) -> int:
        return self.size

    def places(self, samples: Array) -> tuple[Array, Array]:
        user = user_of(self.cumulative, samples)
        before = samples - self.cumulative[user] + 1
        stop = self.indptr[user] + before
        return stop - before.clip(max=self.max_history), stop

    def lengths(self, samples: Array) -> Array:
        return prefix_lengths(self.cumulative, self.max_history, samples)


@dataclass(frozen=True)
class HoldoutSpans(_Arrays):
    """Histories before the validation or test target of some users; the target is the place behind.

    Args:
        users: who has a held-out target.
        indptr: of the sequences.
        back: the target's distance from the end of the sequence: 1 test, 2 validation.
        max_history: longest history.

    Shapes:
        users: (n,) int64. indptr: (num_users + 1,) int64.
    """

    users: Any
    indptr: Any
    back: int
    max_history: int

    def __len__(self) -> int:
        return len(self.users)

    def places(self, samples: Array) -> tuple[Array, Array]:
        user = self.users[samples]
        stop = self.indptr[user + 1] - self.back
        return stop - (stop - self.indptr[user]).clip(max=self.max_history), stop

    def lengths(self, samples: Array) -> Array:
        start, stop = self.places(samples)
        return stop - start


@dataclass(frozen=True)
class WindowSpans(_Arrays):
    """Inputs of windows of every user's train part; the targets are the same places moved by one.

    Args:
        size: number of windows.
        indptr: of the sequences.
        cumulative: windows before each user.
        width: inputs of a window at most.

    Shapes:
        indptr, cumulative: (num_users + 1,) int64.
    """

    size: int
    indptr: Any
    cumulative: Any
    width: int

    @classmethod
    def of(cls, sequences: Sequences, width: int) -> WindowSpans:
        cumulative = cumulate(-(-prefix_counts(sequences.lengths) // width))
        return cls(int(cumulative[-1]), sequences.indptr, cumulative, width)

    def __len__(self) -> int:
        return self.size

    def places(self, samples: Array) -> tuple[Array, Array]:
        user = user_of(self.cumulative, samples)
        first, end = self.indptr[user], self.indptr[user + 1]
        length = end - first
        last_input = end - 1 - 2 * (length >= 3)  # the last item of the train part is a target only
        start = first + (samples - self.cumulative[user]) * self.width
        return start, start + (last_input - start).clip(max=self.width)

    def lengths(self, samples: Array) -> Array:
        start, stop = self.places(samples)
        return stop - start
