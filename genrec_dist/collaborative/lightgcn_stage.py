"""LightGCN stage: graph partitions -> collaborative embeddings of items and users.

Writes the propagated item table (Zarr, the artifact itself), `users/` with the propagated user table, curves.jsonl,
rank_counts.npy (users at each rank of their held-out item, evaluation/collaborative.py) and summary.json. Every worker
owns one partition.
"""

from __future__ import annotations

import numpy as np
import torch

from genrec_dist.artifacts.files import write_json
from genrec_dist.collaborative.lightgcn import LightGCN, LocalBatch
from genrec_dist.collaborative.pairs import PairBatches
from genrec_dist.config import Config, LightgcnConfig
from genrec_dist.evaluation.collaborative import COUNTS, LARGEST_RANK, owned_user_ranks, shared_counts
from genrec_dist.evaluation.metrics import count_metrics
from genrec_dist.graph.interactions import Interactions
from genrec_dist.graph.rows import write_sharded
from genrec_dist.graph.stage import TARGETS, Partitions
from genrec_dist.pipeline import Stage, StageContext
from genrec_dist.training.counter import stream_key
from genrec_dist.training.launch import launch
from genrec_dist.training.loop import train
from genrec_dist.training.sharded import ShardedEngine, refuse_deepspeed
from genrec_dist.training.worker import Worker


def lightgcn_stage(config: Config, graph: Stage, partitions: Stage) -> Stage:
    """Stage that trains LightGCN; the partitions say where, and enter no key."""
    refuse_deepspeed(config.runtime)
    settings = {"lightgcn": config.lightgcn.model_dump(mode="json"), "seed": config.seed}
    return Stage(
        "lightgcn",
        1,
        settings,
        {"graph": graph},
        lambda context: launch(train_lightgcn, context, settings),
        placement={"partitions": partitions},
    )


class LightgcnTask:
    """Model, data order and validation.

    Args:
        config: lightgcn section.
        graph: interactions.
        partitions: of the graph.
        targets: held-out items (num_users, 2), validation and test.
        worker: this process.
        seed: of starting values, order and negatives.
        kind: kernel of the neighbour sums.
        overlap: see `Propagation`.
    """

    def __init__(
        self,
        config: LightgcnConfig,
        graph: Interactions,
        partitions: Partitions,
        targets: np.ndarray,
        worker: Worker,
        seed: int,
        kind="auto",
        overlap: bool = False,
    ) -> None:
        self.config, self.partitions, self.targets, self.seed = config, partitions, targets, seed
        self.model = LightGCN(config, partitions, worker, seed, kind, overlap)
        self.pairs = PairBatches(graph, self.model.partition, config, seed, worker.device)
        self.order = self.pairs.order

    def batch(self, indices: torch.Tensor, worker: Worker) -> LocalBatch:
        return self.model.localize(self.pairs.local(indices), stream_key(self.pairs.key(indices), 2))

    def validate(self, worker: Worker) -> dict[str, float]:
        counts = self.rank_counts(self.model.embeddings(), worker, 0, 20, self.config.validation_users)
        return count_metrics(counts[1], [10, 20])

    def rank_counts(self, rows: torch.Tensor, worker: Worker, column: int, largest: int, limit: int = 0) -> np.ndarray:
        """Users of all workers at each rank, among all items and with the user's training items left out.

        Args:
            rows: propagated embeddings of the owned nodes.
            column: of the targets: 0 validation, 1 test.
            largest: last rank told apart.
            limit: first users of the whole graph that have a target; 0: all.

        Shapes:
            returns: (2, largest + 1) int64.
        """
        cosine = self.config.similarity == "cosine"
        ranks = owned_user_ranks(rows, self.partitions, worker, self.targets[:, column], limit, cosine)
        return np.stack([shared_counts(own, largest, worker) for own in ranks])


def train_lightgcn(worker: Worker, context: StageContext, settings: dict) -> None:
    """Worker function: train on one partition, and write the tables together."""
    config = LightgcnConfig.model_validate(settings["lightgcn"])
    runtime, inputs = context.runtime, context.inputs
    graph, partitions = Interactions.load(inputs["graph"]), Partitions(inputs["partitions"])
    targets = np.load(inputs["graph"] / TARGETS, mmap_mode="r", allow_pickle=False)
    task = LightgcnTask(
        config, graph, partitions, targets, worker, settings["seed"], runtime.spmm, runtime.overlap_halo
    )
    engine = ShardedEngine(task.model, config.optim, worker)
    summary = train(task, engine, config.optim, worker, context, seed=settings["seed"])
    rows = task.model.embeddings()
    write_sharded(context.out, rows, partitions.item_ids(), partitions.offsets, worker)
    write_sharded(context.out / "users", rows, partitions.user_ids(), partitions.offsets, worker)
    counts = np.stack([task.rank_counts(rows, worker, column, LARGEST_RANK) for column in (0, 1)])
    if worker.is_main:
        partition = task.model.partition
        exchange = {
            "halo_rows_of_worker_0": len(partition.halo),
            "bytes_received_by_worker_0_a_propagation": task.model.propagation.bytes_per_application * config.dim,
        }
        np.save(context.out / COUNTS, counts, allow_pickle=False)
        write_json(context.out / "summary.json", summary | exchange)
