"""Stage of the HSTU baseline: sequences with their times -> trained model.

Writes model.safetensors (best on validation NDCG@10), curves.jsonl and summary.json. Evaluated by evaluation/stage.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from genrec_dist.artifacts.files import write_json
from genrec_dist.baselines.hstu import HstuModel
from genrec_dist.catalog.dataset import Catalog, Sequences
from genrec_dist.collaborative.losses import scale_of
from genrec_dist.config import Config, HstuConfig
from genrec_dist.evaluation.dense import users_at_once
from genrec_dist.evaluation.likelihood import dense_validation
from genrec_dist.generator.parameters import count_parameters, load_parameters
from genrec_dist.pipeline import Stage, StageContext
from genrec_dist.studies.sizes import hstu_size
from genrec_dist.training.engine import make_engine
from genrec_dist.training.launch import launch
from genrec_dist.training.loop import train
from genrec_dist.training.samples import holdout_samples
from genrec_dist.training.tasks import RowBatches, steady
from genrec_dist.training.worker import Worker


def hstu_stage(config: Config, catalog: Stage) -> Stage:
    """Stage that trains HSTU."""
    settings = {
        "hstu": config.hstu.model_dump(mode="json"),
        "order": config.catalog.order,
        "seed": config.seed,
        "validation_users": config.evaluation.validation_users,
    }
    return Stage("hstu", 1, settings, {"catalog": catalog}, lambda context: launch(train_hstu, context, settings))


def load_hstu(config: HstuConfig, num_items: int, folder: Path) -> HstuModel:
    """The trained model of a finished artifact, in eval mode."""
    return load_parameters(HstuModel(config, num_items), folder, "hstu")


class HstuTask:
    """Model, data order and validation."""

    def __init__(self, config: HstuConfig, sequences: Sequences, worker: Worker, seed: int, users: int) -> None:
        torch.manual_seed(seed)
        self.config, self.users = config, users
        self.model = HstuModel(config, sequences.num_items).to(worker.device)
        optim, width = config.optim, config.max_history
        self.batches = RowBatches.build(
            sequences, width, optim.batch_size, seed, worker.device, optim.length_buckets, times=True
        )
        self.order = self.batches.order
        self._flops = np.array(
            [
                hstu_size(config.model_copy(update={"max_history": n}), sequences.num_items, n).training_flops
                for n in range(width + 1)
            ]
        )
        self.valid, _ = holdout_samples(sequences, width, "valid", worker.device, times=True)

    def batch(self, indices: np.ndarray, worker: Worker) -> dict:
        return steady(self.batches.local(indices, worker), worker)

    @property
    def prefetch_depth(self) -> int:
        """Batches worth making ahead."""
        return self.batches.prefetch_depth

    def tokens(self, indices: np.ndarray) -> int:
        """Items of a global batch that are read."""
        return self.batches.tokens_of(indices)

    def flops(self, indices: np.ndarray) -> float:
        """Model FLOPs of a step on this global batch, padding left out."""
        return float(self._flops[self.batches.samples.lengths[indices]].sum())

    def validate(self, worker: Worker) -> dict[str, float]:
        scale = scale_of(self.config.similarity, self.config.temperature)
        biases = 2 * self.config.num_layers * self.config.max_history**2  # of a user, made for all layers at once
        return dense_validation(
            lambda batch: self.model.score_catalog(batch["history"], batch["mask"], batch["times"]),
            scale,
            self.valid,
            self.config.max_history,
            worker,
            self.users,
            users_at_once(max(len(self.model.item.weight), biases), worker.device),
        )


def train_hstu(worker: Worker, context: StageContext, settings: dict) -> None:
    """Worker function: train the model."""
    config = HstuConfig.model_validate(settings["hstu"])
    sequences = Catalog(context.inputs["catalog"], settings["order"]).sequences
    task = HstuTask(config, sequences, worker, settings["seed"], settings["validation_users"])
    sizes = count_parameters(task.model)
    engine = make_engine(task.model, config.optim, worker, context.runtime)
    summary = train(task, engine, config.optim, worker, context, seed=settings["seed"])
    if worker.is_main:
        write_json(context.out / "summary.json", summary | {"num_parameters": sizes})
