"""All-ranking evaluation of collaborative embeddings that are sharded by owner.

Each worker ranks the held-out items of the users that it owns against every item, whose rows the owners send round in
blocks. Only counts of users at each rank are added up. Ranks are taken over all items, and with the user's training
items left out, as the collaborative-filtering literature does.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from genrec_dist.artifacts.files import write_json
from genrec_dist.config import Config
from genrec_dist.errors import ConfigError
from genrec_dist.evaluation.bootstrap import count_intervals
from genrec_dist.evaluation.metrics import count_metrics, rank_counts
from genrec_dist.graph.exchange import fetch_rows, request_rows
from genrec_dist.graph.layout import Partition, places_of_rows
from genrec_dist.graph.stage import Partitions
from genrec_dist.pipeline import Stage, StageContext
from genrec_dist.training.worker import Worker, exact_products

ITEM_BLOCK = 8192
USER_BLOCK = 2048
LARGEST_RANK = 1000
"""Ranks that a training's counts tell apart, whatever cutoffs are asked for later."""
COUNTS = "rank_counts.npy"


@torch.no_grad()
def owned_user_ranks(
    rows: torch.Tensor,
    partitions: Partitions,
    worker: Worker,
    targets: np.ndarray,
    limit: int = 0,
    cosine: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Rank of each owned user's held-out item, over all items and with the training items left out.

    All workers have to call this together. Equal scores are ordered by item index.

    Args:
        rows: propagated embeddings of the owned nodes.
        partitions: of the graph.
        worker: this process.
        targets: held-out item of each user of the whole graph, -1 without.
        limit: only the first so many users of the whole graph that have a target; 0: all.
        cosine: score by cosine instead of the dot product.

    Shapes:
        rows: (rows owned, dim). targets: (num_users,) integers.
        returns: two (owned users that have a target,) int64, 1 = best.
    """
    partition = partitions.of_worker(worker.rank, worker.world_size)
    if cosine:
        rows = F.normalize(rows, dim=-1)
    users = np.asarray(partition.users)
    wanted = np.asarray(targets[users])
    chosen = np.flatnonzero(wanted >= 0)
    if limit:
        place = np.cumsum(np.asarray(targets) >= 0) - 1
        chosen = chosen[place[users[chosen]] < limit]
    to_device = lambda array: torch.from_numpy(array).to(worker.device)  # noqa: E731
    held_out = wanted[chosen].astype(np.int64)
    distinct, place = np.unique(np.asarray(partitions.item_ids()[held_out]), return_inverse=True)
    targets_there = fetch_rows(rows, request_rows(distinct, partitions.offsets, worker), worker)
    user_rows, target = rows[to_device(chosen)], to_device(held_out)
    with exact_products():
        own = torch.linalg.vecdot(user_rows, targets_there[to_device(place)])
        seen_row, seen_id = _seen(partition, chosen)
        better = torch.zeros(2, len(chosen), dtype=torch.int64, device=worker.device)
        for first, items, block in _item_blocks(rows, partitions, worker):
            worker.alive()
            begin, end = np.searchsorted(seen_id, [first, first + len(items)])
            order = np.argsort(seen_row[begin:end], kind="stable")
            mask_row, mask_column = seen_row[begin:end][order], seen_id[begin:end][order] - first
            item = to_device(items.copy())
            for start in range(0, len(chosen), USER_BLOCK):
                part = slice(start, min(start + USER_BLOCK, len(chosen)))
                score, mine, wanted_here = user_rows[part] @ block.T, own[part, None], target[part, None]
                beats = (score > mine) | ((score == mine) & (item < wanted_here))
                beats &= item != wanted_here
                better[0, part] += beats.sum(1)
                low, high = np.searchsorted(mask_row, [part.start, part.stop])
                beats[to_device(mask_row[low:high] - start), to_device(mask_column[low:high])] = False
                better[1, part] += beats.sum(1)
    plain, masked = (better + 1).cpu().numpy()
    return plain, masked


def _seen(partition: Partition, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Training items of some owned users: place among `chosen`, and the item's new id; by item."""
    counts = partition.degrees[chosen]
    columns = np.asarray(partition.indices)[places_of_rows(np.asarray(partition.indptr)[chosen], counts)].astype(
        np.int64
    )
    own = columns < partition.num_owned
    ids = np.where(own, columns + partition.offsets[partition.part], 0)
    ids[~own] = np.asarray(partition.halo)[columns[~own] - partition.num_owned]
    order = np.argsort(ids, kind="stable")
    return np.repeat(np.arange(len(chosen)), counts)[order], ids[order]


def _item_blocks(rows: torch.Tensor, partitions: Partitions, worker: Worker):
    """Every item once, on every worker: first new id, item indices and embeddings of a block."""
    for part in range(partitions.num_parts):
        partition = partitions[part]
        num_users, items = len(partition.users), np.asarray(partition.items)
        first = int(partitions.offsets[part]) + num_users
        for start in range(0, len(items), ITEM_BLOCK):
            block_items = items[start : start + ITEM_BLOCK]
            if part == worker.rank:
                block = rows[num_users + start : num_users + start + len(block_items)].contiguous()
            else:
                block = rows.new_empty(len(block_items), rows.shape[1])
            if worker.world_size > 1:
                dist.broadcast(block, part)
            yield first + start, block_items, block


def shared_counts(ranks: np.ndarray, largest: int, worker: Worker) -> np.ndarray:
    """`rank_counts` over the users of all workers."""
    counts = torch.from_numpy(rank_counts(ranks, largest)).to(worker.device)
    return worker.sum(counts).cpu().numpy()


def rank_count_stage(config: Config, trained: Stage) -> Stage:
    """Evaluation of a model whose training stage leaves counts of users by rank."""
    settings = {
        "method": trained.name,
        "order": config.catalog.order,
        "seed": config.seed,
        "cutoffs": config.evaluation.cutoffs,
        "bootstrap_samples": config.evaluation.bootstrap_samples,
    }
    if max(config.evaluation.cutoffs) > LARGEST_RANK:
        raise ConfigError(
            "cutoff beyond the ranks that are counted",
            where="evaluation.cutoffs",
            got=max(config.evaluation.cutoffs),
            expected=f"at most {LARGEST_RANK} for method {trained.name}",
        )
    return Stage("evaluation", 2, settings, {"model": trained}, lambda c: evaluate_counts(c, settings), "evaluation")


def evaluate_counts(context: StageContext, settings: dict) -> None:
    """metrics.json from `rank_counts.npy`: (validation or test, all items or training items left out, rank)."""
    valid, test = np.load(context.inputs["model"] / COUNTS, allow_pickle=False)
    cutoffs = settings["cutoffs"]
    write_json(
        context.out / "metrics.json",
        {
            "method": settings["method"],
            "order": settings["order"],
            "users": int(test[0].sum()),
            "test": count_metrics(test[0], cutoffs),
            "valid": count_metrics(valid[0], cutoffs),
            "masked_seen": count_metrics(test[1], cutoffs),
            "masked_seen_valid": count_metrics(valid[1], cutoffs),
            "intervals": count_intervals(test[0], cutoffs, settings["bootstrap_samples"], settings["seed"]),
        },
    )
