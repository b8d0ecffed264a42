"""SASRec with full-catalog cross-entropy, inner-product or cosine: the reference every run carries.

Writes model.safetensors, curves.jsonl and summary.json. Evaluated by evaluation/stage.py.
Source: Kang and McAuley (2018); full cross-entropy as in later public reruns.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from genrec_dist.artifacts.files import write_json
from genrec_dist.catalog.dataset import Catalog, Sequences
from genrec_dist.collaborative.backbones import SasRec
from genrec_dist.collaborative.losses import counted, full_softmax, scale_of, similarity
from genrec_dist.config import Config, SasrecConfig
from genrec_dist.evaluation.dense import by_history, users_at_once
from genrec_dist.evaluation.likelihood import dense_validation
from genrec_dist.generator.parameters import count_parameters
from genrec_dist.generator.transformer import init_weights, scale_residuals
from genrec_dist.pipeline import Stage, StageContext
from genrec_dist.studies.sizes import sasrec_size
from genrec_dist.training.engine import make_engine
from genrec_dist.training.launch import launch
from genrec_dist.training.loop import train
from genrec_dist.training.samples import holdout_samples
from genrec_dist.training.tasks import RowBatches, steady
from genrec_dist.training.worker import Worker


def sasrec_stage(config: Config, catalog: Stage, kind: str) -> Stage:
    """Training stage of the reference; `kind` is 'inner' or 'cosine'."""
    section = config.sasrec.model_copy(update={"similarity": kind})
    settings = {
        "sasrec": section.model_dump(mode="json"),
        "order": config.catalog.order,
        "seed": config.seed,
        "validation_users": config.evaluation.validation_users,
    }
    return Stage(
        "sasrec", 1, settings, {"catalog": catalog}, lambda c: launch(train_sasrec, c, settings), f"sasrec_{kind}"
    )


class SasrecModel(nn.Module):
    """Item table and causal self-attention.

    Args:
        config: sasrec section.
        num_items: rows of the table.
    """

    def __init__(self, config: SasrecConfig, num_items: int) -> None:
        super().__init__()
        self.config = config
        self.item = nn.Embedding(num_items, config.dim)
        self.backbone = SasRec(
            config.dim, config.max_history, config.num_layers, config.num_heads, config.dropout, config.input_norm
        )
        init_weights(self.item)
        if config.init == "depth_scaled":
            scale_residuals(self.backbone.layers)

    whole_parameters = ("item.weight",)

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        """Cross-entropy over the catalog at every position of the windows."""
        config = self.config
        states = self.backbone.states(self.item.weight, batch["history"])
        states, targets = counted(states, batch["targets"], batch["mask"])
        logits = similarity(states, self.item.weight, config.similarity)
        logits = logits * scale_of(config.similarity, config.temperature)
        return {"loss": full_softmax(logits, targets) / batch["count"]}

    @torch.no_grad()
    def score_catalog(self, history: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Scores of all items for each history, (B, num_items)."""
        users = self.backbone.user(self.item.weight, history, mask)
        return similarity(users, self.item.weight, self.config.similarity)


class SasrecTask:
    """Model, data order and validation."""

    def __init__(self, config: SasrecConfig, sequences: Sequences, worker: Worker, seed: int, users: int) -> None:
        torch.manual_seed(seed)
        self.config, self.users = config, users
        self.model = SasrecModel(config, sequences.num_items).to(worker.device)
        self.batches = RowBatches.build(sequences, config.max_history, config.optim.batch_size, seed, worker.device)
        self.order = self.batches.order
        self._flops = np.array(
            [
                sasrec_size(
                    config.model_copy(update={"max_history": length}), sequences.num_items, length
                ).training_flops
                for length in range(config.max_history + 1)
            ]
        )
        self.valid, _ = holdout_samples(sequences, config.max_history, "valid", worker.device)

    def batch(self, indices: np.ndarray, worker: Worker) -> dict:
        return steady(self.batches.local(indices, worker), worker)

    def tokens(self, indices: np.ndarray) -> int:
        """Items of a global batch that are read."""
        return self.batches.tokens_of(indices)

    def flops(self, indices: np.ndarray) -> float:
        """Model FLOPs of a step on this global batch, padding left out."""
        return float(self._flops[self.batches.samples.lengths[indices]].sum())

    def validate(self, worker: Worker) -> dict[str, float]:
        scale = scale_of(self.config.similarity, self.config.temperature)
        model, width = self.model, self.config.max_history
        rows = users_at_once(len(model.item.weight), worker.device)
        return dense_validation(by_history(model.score_catalog), scale, self.valid, width, worker, self.users, rows)


def train_sasrec(worker: Worker, context: StageContext, settings: dict) -> None:
    """Worker function: train the reference."""
    config = SasrecConfig.model_validate(settings["sasrec"])
    sequences = Catalog(context.inputs["catalog"], settings["order"]).sequences
    task = SasrecTask(config, sequences, worker, settings["seed"], settings["validation_users"])
    sizes = count_parameters(task.model)
    engine = make_engine(task.model, config.optim, worker, context.runtime)
    summary = train(task, engine, config.optim, worker, context, seed=settings["seed"])
    if worker.is_main:
        write_json(context.out / "summary.json", summary | {"num_parameters": sizes})
