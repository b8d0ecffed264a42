"""Full-catalog ranks from dense scores, batch by batch, the same for any number of workers.

Batches are cut once and shared out whole, so no result depends on how many workers there are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from genrec_dist.collaborative.backbones import history_of
from genrec_dist.training.samples import HistorySamples
from genrec_dist.training.worker import Worker

Scorer = Callable[[dict[str, torch.Tensor]], torch.Tensor]
"""Batch of samples -> scores of all items, (B, num_items)."""


HELD = 1 << 25
"""Numbers that a batch of scores holds at most: 128 MiB."""
MOST_USERS = {"cuda": 4096, "cpu": 256}


def users_at_once(numbers: int, device: torch.device) -> int:
    """Rows of a batch: on a GPU many, because starting kernels costs the same for few.

    Args:
        numbers: that scoring one user holds, at least one an item of the catalog.
    """
    return max(1, min(MOST_USERS[device.type], HELD // max(numbers, 1)))


def by_history(score: Callable[..., torch.Tensor]) -> Scorer:
    """A scorer that reads history and mask, and the history's own times where the batch holds times."""
    return lambda batch: score(*history_of(batch))


def target_ranks(scores_BN: torch.Tensor, target_B: torch.Tensor) -> torch.Tensor:
    """Rank of each target, 1 = best; equal scores are ordered by item index.

    Shapes:
        scores_BN: (B, num_items). target_B: (B,) int64. Returns (B,) int64.
    """
    own = scores_BN.gather(1, target_B[:, None])
    index = torch.arange(scores_BN.shape[1], device=scores_BN.device)
    better = (scores_BN > own) | ((scores_BN == own) & (index < target_B[:, None]))
    return better.sum(1) + 1


def mask_seen(scores_BN: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Scores with the items of the history at -inf (the target never is)."""
    padded = torch.where(batch["mask"], batch["history"], batch["target"][:, None])
    own = scores_BN.gather(1, batch["target"][:, None])
    return scores_BN.scatter(1, padded, float("-inf")).scatter(1, batch["target"][:, None], own)


def batched(count: int, batch_size: int, worker: Worker, first: int = 0) -> list[tuple[int, int]]:
    """This worker's share of the fixed batches of first, ..., count - 1, as (start, end)."""
    starts = range(first, count, batch_size)
    return [(s, min(s + batch_size, count)) for s in starts][worker.rank :: worker.world_size]


@torch.no_grad()
def dense_ranks(
    score: Scorer,
    samples: HistorySamples,
    max_history: int,
    worker: Worker,
    batch_size: int = 256,
    limit: int = 0,
    seen_masked: bool = False,
) -> np.ndarray:
    """Ranks of all targets over the whole catalog, on every worker.

    Args:
        score: the model; a batch holds what `samples` gather.
        samples: histories and targets.
        limit: only the first so many samples; 0 takes all.
        seen_masked: leave the items of the history out of the ranking.

    Returns:
        (samples,) int64, 1 = best.
    """
    count = min(limit or len(samples), len(samples))
    ranks = torch.zeros(count, dtype=torch.int64, device=worker.device)
    for start, end in batched(count, batch_size, worker):
        worker.alive()
        batch = samples.gather(torch.arange(start, end, device=worker.device), max_history)
        scores = score(batch).float()
        if seen_masked:
            scores = mask_seen(scores, batch)
        ranks[start:end] = target_ranks(scores, batch["target"])
    return worker.sum(ranks).cpu().numpy()
