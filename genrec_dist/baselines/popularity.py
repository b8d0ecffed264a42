"""Popularity: every user gets the items most frequent in the train parts. No training."""

from __future__ import annotations

import numpy as np
import torch

from genrec_dist.catalog.dataset import Sequences


def popularity_scores(sequences: Sequences) -> torch.Tensor:
    """Train-part frequency of each item, (num_items,) float32."""
    train_end, _, _ = sequences.split_ends()
    user = np.repeat(np.arange(sequences.num_users), sequences.lengths)
    in_train = np.arange(len(sequences.items)) < train_end[user]
    counts = np.bincount(sequences.items[in_train], minlength=sequences.num_items)
    return torch.from_numpy(counts.astype(np.float32))
