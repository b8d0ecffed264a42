"""Validation loss in bits an item: the negative base-2 logarithm of the probability that a model gives the held-out
item among all items, mean over users.

It compares models with different tokenizers, because each is asked for the same thing: a distribution over the catalog.
Terms of a training loss that are no such probability (label smoothing, distillation) do not enter, nor does a dense
score that evaluation mixes into the ranking. Reads samples, writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from genrec_dist.collaborative.backbones import history_of
from genrec_dist.evaluation.dense import Scorer, batched, target_ranks
from genrec_dist.evaluation.metrics import BITS, rank_metrics
from genrec_dist.training.samples import HistorySamples
from genrec_dist.training.worker import Worker

BATCH_USERS = 1024
"""Users of a teacher-forced pass over codes."""


def mean_bits(nats: np.ndarray) -> dict[str, float]:
    """`bits_per_item` from each user's negative log-probability; empty when there are no users.

    Shapes:
        nats: (num_users,) float64.
    """
    return {BITS: math.fsum(nats) / len(nats) / math.log(2)} if len(nats) else {}


@torch.no_grad()
def code_bits(
    nats: Callable[..., torch.Tensor],
    samples: HistorySamples,
    max_history: int,
    worker: Worker,
    limit: int = 0,
) -> dict[str, float]:
    """`bits_per_item` of a model that writes codes, the same on every worker and for any number of them.

    Args:
        nats: (history, mask, target, and times where batches hold them) -> negative log-probability of each target,
            (B,).
        samples: histories and targets.
        limit: only the first so many users; 0 takes all.
    """
    count = min(limit or len(samples), len(samples))
    found = torch.zeros(count, dtype=torch.float64, device=worker.device)
    for start, end in batched(count, BATCH_USERS, worker):
        worker.alive()
        batch = samples.gather(torch.arange(start, end, device=worker.device), max_history)
        history, mask, *times = history_of(batch)
        found[start:end] = nats(history, mask, batch["target"], *times).double()
    return mean_bits(worker.sum(found).cpu().numpy())


@torch.no_grad()
def dense_validation(
    score: Scorer,
    scale: float,
    samples: HistorySamples,
    max_history: int,
    worker: Worker,
    limit: int = 0,
    batch_size: int = 256,
) -> dict[str, float]:
    """Recall@10, NDCG@10 and `bits_per_item` of a model that scores the whole catalog, in one pass.

    Args:
        score: as of `dense_ranks`.
        scale: scores times this are the logits of the model's softmax.
        samples: histories and targets.
        limit: only the first so many users; 0 takes all.
    """
    count = min(limit or len(samples), len(samples))
    ranks = torch.zeros(count, dtype=torch.int64, device=worker.device)
    nats = torch.zeros(count, dtype=torch.float64, device=worker.device)
    for start, end in batched(count, batch_size, worker):
        worker.alive()
        batch = samples.gather(torch.arange(start, end, device=worker.device), max_history)
        scores = score(batch).float()
        ranks[start:end] = target_ranks(scores, batch["target"])
        nats[start:end] = F.cross_entropy(scores * scale, batch["target"], reduction="none").double()
    bits = mean_bits(worker.sum(nats).cpu().numpy())
    return rank_metrics(worker.sum(ranks).cpu().numpy(), [10]) | bits
