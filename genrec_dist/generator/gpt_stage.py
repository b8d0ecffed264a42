"""Stage of the decoder-only generator (CSJ-ID): codebook + sequences -> trained model.

Writes model.safetensors (best on validation NDCG@10), curves.jsonl (the loss also level by level) and summary.json.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from genrec_dist.artifacts.embeddings import ARRAY
from genrec_dist.artifacts.files import write_json
from genrec_dist.artifacts.reader import read_embeddings
from genrec_dist.catalog.dataset import Catalog, Sequences
from genrec_dist.config import Config, GptConfig
from genrec_dist.errors import ConfigError
from genrec_dist.evaluation.generative import list_ranks
from genrec_dist.evaluation.likelihood import code_bits
from genrec_dist.evaluation.metrics import rank_metrics
from genrec_dist.generator.gpt import GptGenerator
from genrec_dist.generator.heads import ChildHead
from genrec_dist.generator.parameters import count_parameters, load_parameters
from genrec_dist.generator.stage import mean_codebook
from genrec_dist.identifiers.trie import Trie
from genrec_dist.pipeline import Stage, StageContext
from genrec_dist.studies.sizes import gpt_size
from genrec_dist.training.engine import make_engine
from genrec_dist.training.launch import launch
from genrec_dist.training.loop import train
from genrec_dist.training.samples import holdout_samples
from genrec_dist.training.tasks import RowBatches, steady
from genrec_dist.training.worker import Worker


def gpt_stage(config: Config, catalog: Stage, identifiers: Stage) -> Stage:
    """Stage that trains the decoder-only generator."""
    settings = {
        "gpt": config.gpt.model_dump(mode="json"),
        "order": config.catalog.order,
        "seed": config.seed,
        "validation_users": config.evaluation.validation_users,
        "validation_beam": config.evaluation.validation_beam,
    }
    inputs = {"catalog": catalog, "identifiers": identifiers}
    return Stage("gpt", 2, settings, inputs, lambda context: launch(train_gpt, context, settings))


def build_gpt(config: GptConfig, identifiers: Path) -> GptGenerator:
    """The generator with fresh weights.

    Raises:
        ConfigError: head 'child', and the identifier artifact holds no embeddings.
    """
    table = None
    if config.head == "child":
        if not (identifiers / ARRAY).exists():
            raise ConfigError(
                "gpt.head=child needs a tokenizer that leaves a table",
                where="gpt.head",
                got=f"no {ARRAY} in {identifiers}",
                expected="identifiers.tokenizer=rqvae, or hierarchical_kmeans over two tables (method csj_id)",
                fix="use gpt.head=per_level",
            )
        table = torch.from_numpy(read_embeddings(identifiers))
    return GptGenerator(config, Trie.load(identifiers), table)


def load_gpt(config: GptConfig, identifiers: Path, generator: Path) -> GptGenerator:
    """The trained generator of a finished artifact, in eval mode."""
    return load_parameters(build_gpt(config, identifiers), generator, "gpt")


class GptTask:
    """Model, data order and validation."""

    def __init__(self, model: GptGenerator, sequences: Sequences, worker: Worker, settings: dict) -> None:
        config = model.config
        self.model, self.config, self.settings = model, config, settings
        optim = config.optim
        self.batches = RowBatches.build(
            sequences, config.max_history, optim.batch_size, settings["seed"], worker.device, optim.length_buckets
        )
        self.order = self.batches.order
        book = replace(mean_codebook(model.trie), max_depth=model.trie.max_depth)
        width = model.head.nodes.embedding_dim if isinstance(model.head, ChildHead) else 0
        self._flops = np.array(
            [
                gpt_size(config.model_copy(update={"max_history": length}), book, width, length).training_flops
                for length in range(config.max_history + 1)
            ]
        )
        self.valid, _ = holdout_samples(sequences, config.max_history, "valid", worker.device)

    def batch(self, indices: np.ndarray, worker: Worker) -> dict:
        batch = steady(self.batches.local(indices, worker), worker)
        if worker.device.type == "cuda":  # the model's host code must not ask the device for the count
            batch["rows"] = len(indices) * self.batches.samples.width / worker.world_size
        return batch

    @property
    def prefetch_depth(self) -> int:
        """Batches worth making ahead."""
        return self.batches.prefetch_depth

    def tokens(self, indices: np.ndarray) -> int:
        """Codes of a global batch's items, padding of rows left out; a level past an item's depth is a token too."""
        return (self.batches.tokens_of(indices) + len(indices)) * self.model.trie.max_depth

    def flops(self, indices: np.ndarray) -> float:
        """Model FLOPs of a step on this global batch, padding left out."""
        return float(self._flops[self.batches.samples.lengths[indices]].sum())

    def validate(self, worker: Worker) -> dict[str, float]:
        width, limit = self.settings["validation_beam"], self.settings["validation_users"]
        ranks = list_ranks(self.model, self.valid, worker, width=width, limit=limit)
        bits = code_bits(self.model.target_nats, self.valid, self.config.max_history, worker, limit)
        return rank_metrics(ranks, [10]) | bits


def train_gpt(worker: Worker, context: StageContext, settings: dict) -> None:
    """Worker function: train the generator."""
    config = GptConfig.model_validate(settings["gpt"])
    sequences = Catalog(context.inputs["catalog"], settings["order"]).sequences
    torch.manual_seed(settings["seed"])
    model = build_gpt(config, context.inputs["identifiers"]).to(worker.device)
    task = GptTask(model, sequences, worker, settings)
    sizes = count_parameters(model)
    engine = make_engine(model, config.optim, worker, context.runtime)
    summary = train(task, engine, config.optim, worker, context, seed=settings["seed"])
    if worker.is_main:
        write_json(context.out / "summary.json", summary | {"num_parameters": sizes})
