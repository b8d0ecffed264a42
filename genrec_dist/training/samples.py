"""Training samples and evaluation histories gathered from CSR sequences by tensor indexing.

No per-sample Python: a batch is one gather on the device that holds the item array. Padding is a mask; the
index at a masked place is 0 and means nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from genrec_dist.catalog.dataset import Sequences


@dataclass
class HistorySamples:
    """(history, target) pairs given by the target's position in the item array.

    Args:
        items: (num_interactions,) int64 on the device.
        starts: (n,) first position of the history window.
        targets: (n,) position of the target.
    """

    items: torch.Tensor
    starts: torch.Tensor
    targets: torch.Tensor

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def lengths(self) -> np.ndarray:
        """History lengths, (n,) int64."""
        return (self.targets - self.starts).cpu().numpy()

    def gather(self, indices: torch.Tensor, width: int) -> dict[str, torch.Tensor]:
        """One batch.

        Args:
            indices: samples.
            width: columns of the history.

        Shapes:
            indices: (B,) int64.
            returns: history (B, width) int64, oldest first, right-padded; mask (B, width) bool, True at items;
                target (B,) int64.
        """
        start, target = self.starts[indices], self.targets[indices]
        position = start[:, None] + torch.arange(width, device=start.device)
        mask = position < target[:, None]
        history = self.items[position.clamp(max=len(self.items) - 1)] * mask
        return {"history": history, "mask": mask, "target": self.items[target]}


def _samples(sequences: Sequences, starts: np.ndarray, targets: np.ndarray, device: torch.device) -> HistorySamples:
    as_tensor = lambda array: torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)  # noqa: E731
    return HistorySamples(as_tensor(sequences.items), as_tensor(starts), as_tensor(targets))


def prefix_samples(sequences: Sequences, max_history: int, device: torch.device) -> HistorySamples:
    """Every prefix of every user's train part as one sample: history of at most `max_history`, next item."""
    train_end, _, _ = sequences.split_ends()
    counts = np.maximum(train_end - sequences.indptr[:-1] - 1, 0)
    user = np.repeat(np.arange(sequences.num_users), counts)
    offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    targets = sequences.indptr[user] + 1 + offset
    return _samples(sequences, np.maximum(sequences.indptr[user], targets - max_history), targets, device)


def holdout_samples(
    sequences: Sequences, max_history: int, split: str, device: torch.device
) -> tuple[HistorySamples, np.ndarray]:
    """Histories before the validation or test target of each user that has one.

    Args:
        split: 'valid' or 'test'.

    Returns:
        The samples, and the user index of each.
    """
    _, valid, test = sequences.split_ends()
    position = valid if split == "valid" else test
    users = np.flatnonzero(position >= 0)
    targets = position[users]
    starts = np.maximum(sequences.indptr[users], targets - max_history)
    return _samples(sequences, starts, targets, device), users


@dataclass
class RowSamples:
    """Windows of user sequences for models with a loss at every position (causal self-attention).

    A window covers at most `width` inputs; the targets are the inputs shifted by one.
    """

    items: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor
    width: int

    def __len__(self) -> int:
        return len(self.starts)

    def gather(self, indices: torch.Tensor, width: int = 0) -> dict[str, torch.Tensor]:
        """One batch: history, targets (B, width) int64 and mask (B, width) bool, right-padded; 0: the widest."""
        offset = torch.arange(width or self.width, device=self.starts.device)
        position = self.starts[indices][:, None] + offset
        mask = offset < self.counts[indices][:, None]
        last = len(self.items) - 1
        return {
            "history": self.items[position.clamp(max=last)] * mask,
            "targets": self.items[(position + 1).clamp(max=last)] * mask,
            "mask": mask,
        }


def row_samples(sequences: Sequences, width: int, device: torch.device) -> RowSamples:
    """Cut each user's train part into windows of `width` inputs; every next item is a target exactly once."""
    train_end, _, _ = sequences.split_ends()
    pairs = np.maximum(train_end - sequences.indptr[:-1] - 1, 0)
    windows = -(-pairs // width)
    user = np.repeat(np.arange(sequences.num_users), windows)
    index = np.arange(windows.sum()) - np.repeat(np.cumsum(windows) - windows, windows)
    starts = sequences.indptr[user] + index * width
    counts = np.minimum(pairs[user] - index * width, width)
    as_tensor = lambda array: torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)  # noqa: E731
    return RowSamples(as_tensor(sequences.items), as_tensor(starts), as_tensor(counts), width)
