"""Tables with one row a node, sharded by owner: starting values, and writing them as embedding artifacts.

Row r of a worker's shard is its r-th owned node: its users first, then its items.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from genrec_dist.artifacts.embeddings import EmbeddingWriter
from genrec_dist.graph.exchange import fetch_rows, request_rows
from genrec_dist.graph.layout import Partition
from genrec_dist.training.counter import normals
from genrec_dist.training.worker import Worker

BLOCK_ROWS = 1 << 16


def owned_nodes(partition: Partition) -> np.ndarray:
    """Node ids of the owned rows (user u is u, item i is num_users + i), (n,) int64."""
    return np.concatenate([partition.users, partition.num_users + np.asarray(partition.items)])


def normal_rows(nodes: np.ndarray, dim: int, std: float, key: int) -> torch.Tensor:
    """Normal starting values that depend on a node alone, not on who owns it.

    Shapes:
        nodes: (n,) int64. returns: (n, dim) float32.
    """
    out = np.empty((len(nodes), dim), np.float32)
    for first in range(0, len(nodes), BLOCK_ROWS):
        part = nodes[first : first + BLOCK_ROWS]
        out[first : first + BLOCK_ROWS] = std * normals(part[:, None] * dim + np.arange(dim), key)
    return torch.from_numpy(out)


@torch.no_grad()
def write_sharded(
    folder: Path,
    table: torch.Tensor,
    new_ids: np.ndarray,
    offsets: np.ndarray,
    worker: Worker,
    *,
    first_row: int = 0,
    rows_per_shard: int = 0,
) -> None:
    """Write a sharded table as one embedding array, in the order of `new_ids`.

    The shards of the array are dealt out to the workers; who writes one asks the owners for its rows. No worker holds
    more than its part of the table and one shard. All workers have to call this together.

    Args:
        folder: artifact folder; `folder/embeddings.zarr` is made.
        table: this worker's rows.
        new_ids: new id of every row of the array.
        offsets: first new id of every worker.
        worker: this process.
        first_row: owned row that the table begins with: 0, or the number of own users for a table of items.
        rows_per_shard: of the array; 0 chooses.

    Shapes:
        table: (rows owned, dim) float. new_ids: (rows of the array,) int64.
    """
    dim = table.shape[1]
    if worker.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        EmbeddingWriter(folder, len(new_ids), dim, rows_per_shard)
    worker.barrier()
    writer = EmbeddingWriter(folder, len(new_ids), dim, rows_per_shard)
    for first in range(0, writer.num_shards, worker.world_size):
        shard = first + worker.rank
        start, end = writer.rows(shard) if shard < writer.num_shards else (0, 0)
        ids = np.asarray(new_ids[start:end])
        order = np.argsort(ids)
        plan = request_rows(ids[order], offsets, worker)
        rows = fetch_rows(table, replace(plan, send_rows=plan.send_rows - first_row), worker)
        if shard < writer.num_shards:
            values = np.empty((end - start, dim), np.float32)
            values[order] = rows.cpu().numpy()
            writer.write(shard, values)
    worker.barrier()
