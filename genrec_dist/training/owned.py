"""Prefix batches where each worker holds the sequences of the users that it owns, and no others.

The global batch is the one of `PrefixBatches`, sample for sample, so losses and metrics are those of a run in one
process. What a worker needs of the others' samples are the target items of the batch, gathered as numbers.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from genrec_dist.catalog.dataset import Catalog, Sequences
from genrec_dist.graph.exchange import gather_ids
from genrec_dist.graph.layout import places_of_rows
from genrec_dist.training.order import BatchOrder
from genrec_dist.training.samples import HistorySamples, holdout_samples, prefix_samples
from genrec_dist.training.spans import Lengths, cumulate, prefix_counts, prefix_lengths, user_of
from genrec_dist.training.worker import Worker


class OwnedSequences:
    """Sequences of some users of a catalog, and the lengths of all.

    Reads sequences.parquet a row group at a time.

    Args:
        catalog: finished catalog.
        users: whose to keep.

    Shapes:
        users: (n,) int64.
    """

    def __init__(self, catalog: Catalog, users: np.ndarray) -> None:
        self.users = np.sort(users)
        items, stamps, lengths, first = [], [], [], 0
        for group in catalog.iterate_sequences():
            mine = self.users[np.searchsorted(self.users, first) : np.searchsorted(self.users, first + group.num_users)]
            counts = group.lengths[mine - first]
            place = places_of_rows(group.indptr[mine - first], counts)
            items.append(group.items[place])
            stamps.append(group.timestamps[place])
            lengths.append(group.lengths)
            first += group.num_users
        self.lengths = np.concatenate(lengths)
        indptr = np.concatenate([[0], np.cumsum(self.lengths[self.users])]).astype(np.int64)
        self.sequences = Sequences(indptr, np.concatenate(items), np.concatenate(stamps), catalog.num_items)

    def holdouts(self, split: str, max_history: int, limit: int, device: torch.device) -> HistorySamples:
        """Validation or test histories of the own users among the first `limit` users that have one; 0: all."""
        own = np.flatnonzero(self.sequences.lengths >= 3)
        if limit:
            place = np.cumsum(self.lengths >= 3) - 1  # of each user among those with held-out items
            own = own[place[self.users[own]] < limit]
        return holdout_samples(self.sequences, max_history, split, device, users=own)[0]


class OwnedPrefixBatches:
    """Every prefix of a user as one sample; this worker gathers those of its own users.

    Args:
        owned: sequences of the own users.
        max_history: widest history.
        batch_size: of the global batch.
        seed: of the order.
        buckets: see `BatchOrder`.
        device: where samples are gathered.
    """

    def __init__(
        self, owned: OwnedSequences, max_history: int, batch_size: int, seed: int, buckets: int, device: torch.device
    ) -> None:
        self.max_history = max_history
        counts = prefix_counts(owned.lengths)
        self._indptr = cumulate(counts)
        self._own_row = np.full(len(counts), -1, np.int32)
        self._own_row[owned.users] = np.arange(len(owned.users))
        self._own_start = cumulate(counts[owned.users])
        self.samples = prefix_samples(owned.sequences, max_history, device)
        lengths = Lengths(partial(prefix_lengths, self._indptr, max_history))
        self.order = BatchOrder(int(self._indptr[-1]), batch_size, seed, lengths, buckets)

    def _mine(self, indices: np.ndarray) -> np.ndarray:
        """Own samples of a global batch, by their place among the own samples."""
        user = user_of(self._indptr, indices)
        row = self._own_row[user]
        mine = row >= 0
        return self._own_start[row[mine]] + (indices[mine] - self._indptr[user[mine]])

    def local(self, indices: np.ndarray, worker: Worker) -> dict:
        """Rows of the own users, cut to their longest history, and the global count over the workers."""
        return self.samples.gather(self._mine(indices)) | {"count": len(indices) / worker.world_size}

    def target_items(self, indices: np.ndarray, worker: Worker) -> np.ndarray:
        """Target items of the global batch, by worker. All workers have to call this together."""
        return gather_ids(self.samples.targets(self._mine(indices)), worker)
