"""Fusion stage (PRORec Stage I): semantic embeddings + sequences -> integrated embeddings.

Writes the integrated table (Zarr, the artifact itself), `collaborative/` and `adapted/` tables, model.safetensors,
curves.jsonl, summary.json and similarity.json (equations 9 and 10, Table 4). Over graph partitions the item table is in
`collaborative/` alone, and dense.safetensors holds the other layers. Mode `semantic` writes the text's table alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from genrec_dist.artifacts.embeddings import write_embeddings
from genrec_dist.artifacts.files import write_json
from genrec_dist.artifacts.reader import EmbeddingStore, read_embeddings
from genrec_dist.catalog.dataset import Catalog, Sequences
from genrec_dist.collaborative.fusion import FusionModel, integrate
from genrec_dist.collaborative.sharded_fusion import ShardedFusionTask, check_shardable
from genrec_dist.collaborative.similarity import concat_pca, modality_similarity, reduce_by_pca
from genrec_dist.config import Config, FusionConfig
from genrec_dist.evaluation.dense import by_history, dense_ranks, users_at_once
from genrec_dist.evaluation.metrics import rank_metrics
from genrec_dist.graph.rows import write_sharded
from genrec_dist.graph.stage import Partitions, graph_stage, partition_stage
from genrec_dist.pipeline import Stage, StageContext
from genrec_dist.training.engine import make_engine
from genrec_dist.training.launch import launch
from genrec_dist.training.loop import train
from genrec_dist.training.owned import OwnedSequences
from genrec_dist.training.samples import holdout_samples
from genrec_dist.training.sharded import ShardedEngine, refuse_deepspeed
from genrec_dist.training.tasks import PrefixBatches, RowBatches, alignment_batch, steady, uniform_negatives
from genrec_dist.training.worker import Worker

DENSE = "dense.safetensors"
"""What a Stage I over partitions has besides its tables."""
COMPARED_ITEMS = 50_000
"""Items whose rows are read for similarity.json where no worker has the whole tables."""


def fusion_stage(config: Config, catalog: Stage, semantic: Stage) -> Stage:
    """Stage that trains Stage I and writes the integrated embeddings; sharded where the runtime asks for it."""
    settings = {
        "fusion": config.fusion.model_dump(mode="json"),
        "order": config.catalog.order,
        "seed": config.seed,
        "validation_users": config.evaluation.validation_users,
    }
    inputs = {"catalog": catalog, "semantic": semantic}
    if config.fusion.mode == "semantic":
        table = config.fusion.model_dump(mode="json", include={"mode", "dim", "semantic_pca"})
        return Stage("fusion", 3, table, {"semantic": semantic}, lambda context: build_semantic(context, table))
    if not config.runtime.shard_tables:
        return Stage("fusion", 3, settings, inputs, lambda context: build_fusion(context, settings))
    check_shardable(config.fusion)
    if config.runtime.engine == "deepspeed":
        refuse_deepspeed(config.runtime)
    partitions = partition_stage(config, graph_stage(config, catalog))
    return Stage(
        "fusion",
        3,
        settings,
        inputs,
        lambda context: build_sharded_fusion(context, settings),
        placement={"partitions": partitions},
    )


class FusionTask:
    """Model, data order and validation of Stage I."""

    def __init__(
        self, config: FusionConfig, sequences: Sequences, semantic: torch.Tensor, worker: Worker, seed: int, users: int
    ) -> None:
        torch.manual_seed(seed)
        self.config, self.seed, self.users = config, seed, users
        span = sequences.span if config.time_bumps else (0, 1)
        self.model = FusionModel(config, semantic, seed, span=span).to(worker.device)
        optim, device = config.optim, worker.device
        self.batches: PrefixBatches | RowBatches
        if config.backbone == "sasrec" and config.loss == "full_softmax":
            self.batches = RowBatches.build(
                sequences, config.max_history, optim.batch_size, seed, device, times=bool(config.time_bumps)
            )
        else:
            self.batches = PrefixBatches.build(
                sequences,
                config.max_history,
                optim.batch_size,
                seed,
                optim.length_buckets,
                device,
                times=bool(config.time_bumps),
            )
        self.order = self.batches.order
        self.valid, _ = holdout_samples(sequences, config.max_history, "valid", device, times=bool(config.time_bumps))

    def batch(self, indices: np.ndarray, worker: Worker) -> dict:
        batch = self.batches.local(indices, worker)
        if self.config.align_weight:
            most = self.batches.most_targets if worker.device.type == "cuda" else 0
            batch |= alignment_batch(self.batches.target_items(indices), worker, most)
        if self.config.loss == "sampled_softmax":
            batch["negatives"] = uniform_negatives(
                self.model.num_items, self.config.num_negatives, self.seed, indices, worker.device
            )
        return steady(batch, worker)

    @torch.no_grad()
    def validate(self, worker: Worker) -> dict[str, float]:
        score, width = by_history(self.model.score_catalog), self.config.max_history
        numbers = self.model.num_items * (width if self.config.backbone == "din" else 1)
        rows = users_at_once(numbers, worker.device)
        ranks = dense_ranks(score, self.valid, width, worker, rows, self.users)
        return rank_metrics(ranks, [10])


def build_semantic(context: StageContext, settings: dict) -> None:
    """Write the text's own table, rows at length 1, as the integrated one."""
    table = read_embeddings(context.inputs["semantic"])
    if settings["semantic_pca"]:
        table = reduce_by_pca(table, settings["dim"])
    unit = F.normalize(torch.from_numpy(table), dim=-1).numpy()
    write_embeddings(context.out, np.ascontiguousarray(unit, np.float32))


def build_fusion(context: StageContext, settings: dict) -> None:
    """Train and write all tables."""
    launch(train_fusion, context, settings)
    config = FusionConfig.model_validate(settings["fusion"])
    semantic = read_embeddings(context.inputs["semantic"])
    model = load_fusion(config, semantic, context.out)
    with torch.no_grad():
        collaborative, adapted, _ = (table.detach() for table in model.items())
    naive = concat_pca(semantic, collaborative.numpy())
    if config.mode == "concat_pca":
        integrated = naive
    elif config.mode == "collaborative":
        integrated = F.normalize(collaborative, dim=-1).numpy()
    else:
        integrated = integrate(collaborative, adapted, config.integrated).numpy()
    write_embeddings(context.out, np.ascontiguousarray(integrated, np.float32))
    for name, table in (("collaborative", collaborative), ("adapted", adapted)):
        (context.out / name).mkdir(exist_ok=True)
        write_embeddings(context.out / name, table.numpy())
    _write_similarity(context, config, semantic, collaborative.numpy(), integrated, naive)


def as_trained(config: FusionConfig) -> FusionConfig:
    """The section as its model is trained: concatenation and the collaborative arm never see the text."""
    if config.mode == "joint":
        return config
    return config.model_copy(update={"item_input": "collaborative", "align_weight": 0.0})


def load_fusion(config: FusionConfig, semantic: np.ndarray, folder: Path) -> FusionModel:
    """The trained Stage I of a finished artifact, in eval mode.

    Args:
        semantic: embeddings that it was trained with, (num_items, semantic_dim).
        folder: of the artifact.
    """
    model = FusionModel(as_trained(config), torch.from_numpy(semantic))
    if (folder / DENSE).is_file():
        table = torch.from_numpy(read_embeddings(folder / "collaborative"))
        state = load_file(folder / DENSE) | {"collaborative.weight": table}
    else:
        state = load_file(folder / "model.safetensors")
    model.load_state_dict(state, strict=True)
    return model.eval()


def build_sharded_fusion(context: StageContext, settings: dict) -> None:
    """Train over graph partitions, where the workers write the tables; a sample of items is compared."""
    launch(train_sharded_fusion, context, settings)
    config = FusionConfig.model_validate(settings["fusion"])
    stores = [EmbeddingStore(f) for f in (context.inputs["semantic"], context.out / "collaborative", context.out)]
    count = stores[0].num_items
    rows = np.arange(count)
    if count > COMPARED_ITEMS:
        rows = np.sort(np.random.default_rng(settings["seed"]).choice(count, COMPARED_ITEMS, replace=False))
    semantic, collaborative, integrated = (store.rows(rows, failed="zero") for store in stores)
    _write_similarity(context, config, semantic, collaborative, integrated, concat_pca(semantic, collaborative))


def _write_similarity(context: StageContext, config: FusionConfig, semantic, collaborative, integrated, naive) -> None:
    write_json(
        context.out / "similarity.json",
        {
            "ours" if config.mode == "joint" else config.mode: modality_similarity(semantic, collaborative, integrated),
            "concat": modality_similarity(semantic, collaborative, naive),
        },
    )


def train_fusion(worker: Worker, context: StageContext, settings: dict) -> None:
    """Worker function: train Stage I; worker 0 writes model.safetensors and summary.json."""
    config = as_trained(FusionConfig.model_validate(settings["fusion"]))
    sequences = Catalog(context.inputs["catalog"], settings["order"]).sequences
    semantic = torch.from_numpy(read_embeddings(context.inputs["semantic"]))
    task = FusionTask(config, sequences, semantic, worker, settings["seed"], settings["validation_users"])
    engine = make_engine(task.model, config.optim, worker, context.runtime)
    summary = train(task, engine, config.optim, worker, context, seed=settings["seed"])
    if worker.is_main:
        write_json(context.out / "summary.json", summary)


def train_sharded_fusion(worker: Worker, context: StageContext, settings: dict) -> None:
    """Worker function: train Stage I on one partition, and write the tables together."""
    config = FusionConfig.model_validate(settings["fusion"])
    partitions = Partitions(context.inputs["partitions"])
    partition = partitions.of_worker(worker.rank, worker.world_size)
    owned = OwnedSequences(Catalog(context.inputs["catalog"], settings["order"]), np.asarray(partition.users))
    semantic = torch.from_numpy(
        EmbeddingStore(context.inputs["semantic"]).rows(np.asarray(partition.items), failed="zero")
    )
    task = ShardedFusionTask(
        config, owned, semantic, partitions, worker, settings["seed"], settings["validation_users"]
    )
    engine = ShardedEngine(task.model, config.optim, worker)
    summary = train(task, engine, config.optim, worker, context, seed=settings["seed"])
    task.model.eval()
    folders = (context.out, context.out / "collaborative", context.out / "adapted")
    for folder, table in zip(folders, task.model.own_tables()):
        write_sharded(
            folder, table, partitions.item_ids(), partitions.offsets, worker, first_row=task.model.num_own_users
        )
    if worker.is_main:
        save_file({name: p.detach().cpu() for name, p in engine.dense.items()}, context.out / DENSE)
        write_json(context.out / "summary.json", summary)
