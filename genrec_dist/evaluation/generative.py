"""Ranks from generated lists: beam search over fixed batches, the same for any number of workers."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

from genrec_dist.collaborative.backbones import history_of
from genrec_dist.config import RuntimeConfig
from genrec_dist.evaluation.dense import Scorer, batched, mask_seen, target_ranks
from genrec_dist.evaluation.replay import Batch, BatchRunner
from genrec_dist.generator.beam import CodeGenerator, DenseGenerator, beam_search, exact_log_probabilities
from genrec_dist.generator.search_tables import SearchTables
from genrec_dist.training.samples import HistorySamples
from genrec_dist.training.worker import Worker

BATCH_USERS = RuntimeConfig().eval_batch_size
"""Users of a batch where nothing else is said."""
BEAMS = 1 << 15
"""Beams of a batch on a GPU: with fewer, starting kernels takes most of the time."""


def users_of_search(width: int, device: str) -> int:
    """Users of a batch of a validation, by its beam width and the type of the device."""
    return max(BATCH_USERS, BEAMS // width if device == "cuda" else 0)


def rank_in_list(items_BW: torch.Tensor, target_B: torch.Tensor) -> torch.Tensor:
    """Place of the target in each list, 1 = first, 0 = not in it; (B,) int64."""
    hit = items_BW == target_B[:, None]
    return torch.where(hit.any(1), hit.int().argmax(1) + 1, 0)


def drop_seen(items_BW: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Lists without the items of the history, order kept, -1 at the end."""
    history = batch["history"].masked_fill(~batch["mask"], -1)
    seen = (items_BW[:, :, None] == history[:, None, :]).any(2) & (items_BW != batch["target"][:, None])
    order = seen.int().argsort(dim=1, stable=True)
    return items_BW.masked_fill(seen, -1).gather(1, order)


def list_ranks(
    model: CodeGenerator,
    samples: HistorySamples,
    worker: Worker,
    *,
    width: int,
    mix_weight: float = 0.0,
    limit: int = 0,
    batch_size: int = 0,
) -> np.ndarray:
    """Rank of each target in its beam list, on every worker; (samples,) int64, 0 = not in it.

    Args:
        batch_size: users at once; 0: what the device likes.
    """
    count = min(limit or len(samples), len(samples))
    batch_size = batch_size or users_of_search(width, worker.device.type)
    ranks = torch.zeros(count, dtype=torch.int64, device=worker.device)
    tables = SearchTables(model)

    def rank(batch: Batch) -> Batch:
        history, mask, *times = history_of(batch)
        items, _, _ = beam_search(model, history, mask, width, mix_weight, tables, None, *times)
        return {"rank": rank_in_list(items, batch["target"])}

    runner = BatchRunner(rank, worker.device)
    for start, end in batched(count, batch_size, worker):
        worker.alive()
        batch = samples.gather(torch.arange(start, end, device=worker.device), model.max_history)
        ranks[start:end] = runner(batch)["rank"]
    return worker.sum(ranks).cpu().numpy()


class GenerativeRanker:
    """Ranks of one batch under every protocol that is reported.

    Args:
        model: generator in eval mode, whose weights stay as they are while the ranker is used.
        width: beam width.
        mix_weight: weight of the distillation token's dense logit.
        tables: made of the model; None makes them.
    """

    def __init__(self, model: CodeGenerator, width: int, mix_weight: float, tables: SearchTables | None = None) -> None:
        self.model, self.width = model, width
        self.mix_weight = mix_weight if model.dense_token != "none" else 0.0
        self.max_history, self.times = model.max_history, model.reads_times
        self.tables = SearchTables(model) if tables is None else tables

    def __call__(self, batch: Batch, exact: bool = False) -> Batch:
        """Ranks by name.

        Args:
            batch: history, mask, target.
            exact: also score the whole catalog, which waits for the device.
        """
        (history, mask, *times), target = history_of(batch), batch["target"]
        items, _, log_p = beam_search(self.model, history, mask, self.width, self.mix_weight, self.tables, None, *times)
        out = {"rank": rank_in_list(items, target), "rank_masked": rank_in_list(drop_seen(items, batch), target)}
        if self.mix_weight:
            order = log_p.argsort(dim=1, descending=True, stable=True)
            out["rank_without_mix"] = rank_in_list(items.gather(1, order), target)
        if exact:
            scores, mixed = self._exact_scores(history, mask, *times)
            if self.mix_weight and not mixed:  # the token behind the codes has no score for the whole catalog
                items = items.gather(1, log_p.argsort(dim=1, descending=True, stable=True))
            top = scores.topk(min(10, scores.shape[1]), 1).indices
            out["rank_exact"] = target_ranks(scores, target)
            out["rank_checked"] = rank_in_list(items, target)
            out["same_top10"] = (items[:, :10, None] == top[:, None, :]).any(2).sum(1)
        return out

    def _exact_scores(
        self, history: torch.Tensor, mask: torch.Tensor, times: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, bool]:
        """Whole-catalog scores, and whether the dense score is mixed in (a token at the start only)."""
        model = self.model
        scores = exact_log_probabilities(model, history, mask, self.tables, times)
        if self.mix_weight and model.dense_token == "start":
            scorer = cast(DenseGenerator, model)
            hidden, _, _ = scorer.begin(history, mask, times)
            return scores + self.mix_weight * scorer.dense_logits(scorer.distilled(hidden[:, 0])), True
        return scores, False


class DenseRanker:
    """Ranks of one batch from dense scores of the whole catalog.

    Args:
        score: batch -> (B, num_items).
        max_history: widest history.
        times: the scores need the items' times.
    """

    def __init__(self, score: Scorer, max_history: int, times: bool = False) -> None:
        self.score, self.max_history, self.times = score, max_history, times

    def __call__(self, batch: Batch, exact: bool = False) -> Batch:
        scores = self.score(batch).float()
        return {
            "rank": target_ranks(scores, batch["target"]),
            "rank_masked": target_ranks(mask_seen(scores, batch), batch["target"]),
        }
