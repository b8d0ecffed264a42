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

from genrec_dist.evaluation.metrics import rank_counts
from genrec_dist.graph.exchange import fetch_rows, request_rows
from genrec_dist.graph.stage import Partitions
from genrec_dist.training.worker import Worker

ITEM_BLOCK = 8192
USER_BLOCK = 2048


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
        limit: only users of the whole graph below it; 0: all.
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
    chosen = np.flatnonzero((wanted >= 0) & ((users < limit) if limit else True))
    target = wanted[chosen].astype(np.int64)
    target_id = np.asarray(partitions.item_ids()[target])
    distinct, place = np.unique(target_id, return_inverse=True)
    targets_there = fetch_rows(rows, request_rows(distinct, partitions.offsets, worker), worker)
    user_rows = rows[torch.from_numpy(chosen).to(worker.device)]
    own = (user_rows * targets_there[torch.from_numpy(place).to(worker.device)]).sum(1)
    seen_row, seen_id = _seen(partition, chosen)
    better = torch.zeros(2, len(chosen), dtype=torch.int64, device=worker.device)
    for first, items, block in _item_blocks(rows, partitions, worker):
        inside = (seen_id >= first) & (seen_id < first + len(items))
        item = torch.from_numpy(items.copy()).to(worker.device)
        for start in range(0, len(chosen), USER_BLOCK):
            end = min(start + USER_BLOCK, len(chosen))
            score, mine = user_rows[start:end] @ block.T, own[start:end, None]
            wanted_here = torch.from_numpy(target[start:end]).to(worker.device)[:, None]
            beats = (score > mine) | ((score == mine) & (item < wanted_here))
            beats &= item != wanted_here
            better[0, start:end] += beats.sum(1)
            here = inside & (seen_row >= start) & (seen_row < end)
            pair = (torch.from_numpy(a[here] - b).to(worker.device) for a, b in ((seen_row, start), (seen_id, first)))
            beats[tuple(pair)] = False
            better[1, start:end] += beats.sum(1)
    plain, masked = (better + 1).cpu().numpy()
    return plain, masked


def _seen(partition, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Training items of some owned users: place among `chosen`, and the item's new id."""
    counts = partition.degrees[chosen]
    start = np.asarray(partition.indptr)[chosen]
    place = np.arange(counts.sum()) + np.repeat(start - (np.cumsum(counts) - counts), counts)
    columns = np.asarray(partition.indices)[place].astype(np.int64)
    first = int(partition.offsets[partition.part])
    own = columns < partition.num_owned
    ids = np.where(own, columns + first, 0)
    ids[~own] = np.asarray(partition.halo)[columns[~own] - partition.num_owned]
    return np.repeat(np.arange(len(chosen)), counts), ids


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
