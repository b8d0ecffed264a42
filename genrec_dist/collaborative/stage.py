"""Fusion stage (PRORec Stage I): semantic embeddings + sequences -> integrated embeddings.

Writes the integrated table (Zarr, the artifact itself), `collaborative/` and `adapted/` tables, model.safetensors,
curves.jsonl, summary.json and similarity.json (equations 9 and 10, Table 4).
"""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import load_file

from genrec_dist.artifacts.embeddings import write_embeddings
from genrec_dist.artifacts.files import write_json
from genrec_dist.artifacts.reader import read_embeddings
from genrec_dist.catalog.dataset import Catalog, Sequences
from genrec_dist.collaborative.fusion import FusionModel, integrate
from genrec_dist.collaborative.similarity import concat_pca, modality_similarity
from genrec_dist.config import Config, FusionConfig
from genrec_dist.evaluation.dense import dense_ranks
from genrec_dist.evaluation.metrics import rank_metrics
from genrec_dist.pipeline import Stage, StageContext
from genrec_dist.training.engine import make_engine
from genrec_dist.training.launch import launch
from genrec_dist.training.loop import train
from genrec_dist.training.samples import holdout_samples
from genrec_dist.training.tasks import PrefixBatches, RowBatches, alignment_batch, uniform_negatives
from genrec_dist.training.worker import Worker


def fusion_stage(config: Config, catalog: Stage, semantic: Stage) -> Stage:
    """Stage that trains Stage I and writes the integrated embeddings."""
    settings = {
        "fusion": config.fusion.model_dump(mode="json"),
        "order": config.catalog.order,
        "seed": config.seed,
        "validation_users": config.evaluation.validation_users,
    }
    inputs = {"catalog": catalog, "semantic": semantic}
    return Stage("fusion", 1, settings, inputs, lambda context: build_fusion(context, settings))


class FusionTask:
    """Model, data order and validation of Stage I."""

    def __init__(
        self, config: FusionConfig, sequences: Sequences, semantic: torch.Tensor, worker: Worker, seed: int, users: int
    ) -> None:
        torch.manual_seed(seed)
        self.config, self.seed, self.users = config, seed, users
        self.model = FusionModel(config, semantic).to(worker.device)
        optim, device = config.optim, worker.device
        self.batches: PrefixBatches | RowBatches
        if config.backbone == "sasrec" and config.loss == "full_softmax":
            self.batches = RowBatches.build(sequences, config.max_history, optim.batch_size, seed, device)
        else:
            self.batches = PrefixBatches.build(
                sequences, config.max_history, optim.batch_size, seed, optim.length_buckets, device
            )
        self.order = self.batches.order
        self.valid, _ = holdout_samples(sequences, config.max_history, "valid", device)

    def batch(self, indices: np.ndarray, worker: Worker) -> dict:
        batch = self.batches.local(indices, worker)
        batch |= alignment_batch(self.batches.target_items(indices), worker)
        if self.config.loss == "sampled_softmax":
            batch["negatives"] = uniform_negatives(
                self.model.num_items, self.config.num_negatives, self.seed, indices, worker.device
            )
        return batch

    @torch.no_grad()
    def validate(self, worker: Worker) -> dict[str, float]:
        ranks = dense_ranks(self.model.score_catalog, self.valid, self.config.max_history, worker, limit=self.users)
        return rank_metrics(ranks, [10])


def build_fusion(context: StageContext, settings: dict) -> None:
    """Train (or, for the naive baseline, concatenate) and write all tables."""
    launch(train_fusion, context, settings)
    config = FusionConfig.model_validate(settings["fusion"])
    semantic = read_embeddings(context.inputs["semantic"])
    state = load_file(context.out / "model.safetensors")
    model = FusionModel(config, torch.from_numpy(semantic))
    model.load_state_dict(state, strict=True)
    model.eval()
    with torch.no_grad():
        collaborative, adapted, _ = (table.detach() for table in model.items())
        joint = integrate(collaborative, adapted, config.integrated).numpy()
    naive = concat_pca(semantic, collaborative.numpy())
    integrated = naive if config.mode == "concat_pca" else joint
    write_embeddings(context.out, np.ascontiguousarray(integrated, np.float32))
    for name, table in (("collaborative", collaborative), ("adapted", adapted)):
        (context.out / name).mkdir(exist_ok=True)
        write_embeddings(context.out / name, table.numpy())
    write_json(
        context.out / "similarity.json",
        {
            "ours" if config.mode == "joint" else config.mode: modality_similarity(
                semantic, collaborative.numpy(), integrated
            ),
            "concat": modality_similarity(semantic, collaborative.numpy(), naive),
        },
    )


def train_fusion(worker: Worker, context: StageContext, settings: dict) -> None:
    """Worker function: train Stage I; worker 0 writes model.safetensors and summary.json.

    The naive concatenation baseline takes its collaborative table from a model that never sees the text.
    """
    config = FusionConfig.model_validate(settings["fusion"])
    if config.mode == "concat_pca":
        config.item_input, config.align_weight = "collaborative", 0.0
    sequences = Catalog(context.inputs["catalog"], settings["order"]).sequences
    semantic = torch.from_numpy(read_embeddings(context.inputs["semantic"]))
    task = FusionTask(config, sequences, semantic, worker, settings["seed"], settings["validation_users"])
    engine = make_engine(task.model, config.optim, worker, context.runtime)
    summary = train(task, engine, config.optim, worker, context, seed=settings["seed"])
    if worker.is_main:
        write_json(context.out / "summary.json", summary)
