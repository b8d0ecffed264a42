"""Generator stage (PRORec Stage II): codebook + integrated embeddings + sequences -> trained generator.

Writes model.safetensors (best on validation NDCG@10), curves.jsonl and summary.json.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from genrec_dist.artifacts.files import write_json
from genrec_dist.artifacts.reader import read_embeddings
from genrec_dist.catalog.dataset import Catalog, Sequences
from genrec_dist.collaborative.stage import load_fusion
from genrec_dist.config import Config, FusionConfig, GeneratorConfig
from genrec_dist.errors import ConfigError
from genrec_dist.evaluation.generative import list_ranks
from genrec_dist.evaluation.likelihood import code_bits
from genrec_dist.evaluation.metrics import rank_metrics
from genrec_dist.generator.heads import DeviceTrie
from genrec_dist.generator.model import CATALOG_LOGITS, Generator
from genrec_dist.generator.parameters import count_parameters, load_parameters
from genrec_dist.generator.teacher import Teacher
from genrec_dist.identifiers.trie import Trie
from genrec_dist.pipeline import Stage, StageContext
from genrec_dist.studies.sizes import CodebookSize, decoder_layer_flops, generator_size
from genrec_dist.training.engine import make_engine
from genrec_dist.training.launch import launch
from genrec_dist.training.loop import train
from genrec_dist.training.samples import holdout_samples
from genrec_dist.training.tasks import PrefixBatches, uniform_negatives
from genrec_dist.training.worker import Worker

LENGTH_PARTS, PART_SAMPLES = 4, 64
"""Parts of like length of a batch on a CPU, at most, and samples of a part, at least."""


def generator_stage(config: Config, catalog: Stage, semantic: Stage, fusion: Stage, identifiers: Stage) -> Stage:
    """Stage that trains the generator; with a teacher it reads Stage I's model, and the text that belongs to it."""
    evaluation = config.evaluation
    settings = {
        "generator": config.generator.model_dump(mode="json"),
        "order": config.catalog.order,
        "seed": config.seed,
        "validation_users": evaluation.validation_users,
        "validation_beam": evaluation.validation_beam,
        "mix_weight": evaluation.mix_weight,
    }
    inputs = {"catalog": catalog, "fusion": fusion, "identifiers": identifiers}
    if config.generator.teacher_weight:
        settings["fusion"] = config.fusion.model_dump(mode="json")
        inputs["semantic"] = semantic
    return Stage("generator", 3, settings, inputs, lambda context: launch(train_generator, context, settings))


def build_model(config: GeneratorConfig, fusion: Path, identifiers: Path, span: tuple[int, int] = (0, 1)) -> Generator:
    """The generator with fresh weights."""
    return Generator(config, Trie.load(identifiers), torch.from_numpy(read_embeddings(fusion)), span)


def load_model(config: GeneratorConfig, fusion: Path, identifiers: Path, generator: Path) -> Generator:
    """The trained generator of a finished artifact, in eval mode."""
    return load_parameters(build_model(config, fusion, identifiers), generator, "generator")


class GeneratorTask:
    """Model, data order and validation of Stage II."""

    def __init__(
        self, model: Generator, sequences: Sequences, worker: Worker, settings: dict, teacher: Teacher | None = None
    ) -> None:
        config = model.config
        model.teacher = teacher
        self.model, self.config, self.settings = model, config, settings
        self.batches = PrefixBatches.build(
            sequences,
            config.max_history,
            config.optim.batch_size,
            settings["seed"],
            config.optim.length_buckets,
            worker.device,
            model.trie.depth.cpu().numpy() if config.depth_buckets else None,
            times=model.reads_times or (teacher is not None and teacher.reads_times),
        )
        self.order = self.batches.order
        self._costs = step_costs(model)
        self._level_flops = flops_per_level(model, self._costs[1])
        self.valid, _ = holdout_samples(sequences, config.max_history, "valid", worker.device, times=model.reads_times)

    def batch(self, indices: np.ndarray, worker: Worker) -> dict:
        shared = {}
        if self.config.distill_weight and self.config.distill_negatives:
            shared["distill_negatives"] = uniform_negatives(
                self.model.trie.num_items, self.config.distill_negatives, self.settings["seed"], indices, worker.device
            )
        if worker.device.type == "cpu":  # parts of like length have less padding
            parts = max(1, min(LENGTH_PARTS, len(indices) // (worker.world_size * PART_SAMPLES)))
            return {"parts": [part | shared for part in self.batches.local_parts(indices, worker, parts)]}
        return self.batches.local(indices, worker) | shared

    @property
    def prefetch_depth(self) -> int:
        """Batches worth making ahead."""
        return self.batches.prefetch_depth

    def tokens(self, indices: np.ndarray) -> int:
        """Places of encoder and decoder in a step on this global batch, padding left out."""
        per_item, per_target, _ = self._costs
        return round(per_item * self.batches.tokens_of(indices) + per_target * len(indices) + self._deeper(indices))

    def flops(self, indices: np.ndarray) -> float:
        """Model FLOPs of a step on this global batch, padding left out."""
        flops = self._costs[2][self.batches.samples.lengths[indices]].sum()
        return float(flops + self._level_flops * self._deeper(indices))

    def _deeper(self, indices: np.ndarray) -> float:
        """Codes of a batch's targets beyond as many mean ones; batches of like code length are far from the mean."""
        depths = self.batches.depths
        if depths is None:
            return 0.0
        return float(depths[self.batches.target_items(indices)].sum() - depths.mean() * len(indices))

    def validate(self, worker: Worker) -> dict[str, float]:
        ranks = list_ranks(
            self.model,
            self.valid,
            worker,
            width=self.settings["validation_beam"],
            mix_weight=self.settings["mix_weight"],
            limit=self.settings["validation_users"],
        )
        limit = self.settings["validation_users"]
        bits = code_bits(self.model.target_nats, self.valid, self.config.max_history, worker, limit)
        return rank_metrics(ranks, [10]) | bits


def step_costs(model: Generator) -> tuple[float, float, np.ndarray]:
    """Tokens of a history item and of a target, and training FLOPs of a sample by the length of its history.

    Codes past an item's depth and children that pad a node's are not counted: both are taken at their mean.

    Shapes:
        returns: scalars, and (max_history + 1,) float64.
    """
    config, trie = model.config, model.trie
    depth = float(trie.depth.float().mean())
    book = mean_codebook(trie)
    flops = [
        generator_size(
            config.model_copy(update={"max_history": length}), book, trie.num_items, model.integrated.shape[1]
        ).training_flops
        for length in range(config.max_history + 1)
    ]
    per_target = depth + {"none": 0, "start": 1, "end": 2}[model.dense_token]
    return 1.0 if config.encoder_input == "item" else depth, per_target, np.array(flops)


def flops_per_level(model: Generator, places: float) -> float:
    """Training FLOPs of one code more than a target's mean `places`, at a full history, with a child head."""
    config = model.config
    one, two = (
        decoder_layer_flops(config.dim, config.ffn_multiplier, n, config.max_history) for n in (places, places + 1)
    )
    ends = 4.0 * config.dim * model.integrated.shape[1]  # the code's embedding in, the query out
    return 3 * (config.num_decoder_layers * (two - one) + ends)


def mean_codebook(trie: DeviceTrie) -> CodebookSize:
    """Shape of a trie with the mean over items of what differs from item to item: depth, children beside a code."""
    path, depth = trie.item_path, trie.depth
    widths = []
    for level in range(trie.max_depth):
        here = depth > level
        siblings = trie.num_children[trie.parent[path[:, level]]].float()
        widths.append(float((siblings * here).sum() / len(depth)))
    return CodebookSize(trie.num_nodes, float(depth.float().mean()), trie.num_codes, tuple(widths), "means")


def _teacher(config: GeneratorConfig, context: StageContext, settings: dict, worker: Worker) -> Teacher | None:
    if not config.teacher_weight:
        return None
    text = read_embeddings(context.inputs["semantic"])
    stage_one = FusionConfig.model_validate(settings["fusion"])
    numbers = math.ceil(config.optim.batch_size / worker.world_size) * len(text)
    if stage_one.backbone == "din":  # scores every item of the history with every candidate
        numbers *= config.max_history
    if numbers > CATALOG_LOGITS:
        raise ConfigError(
            "Stage I's probabilities of the whole catalog are too many for a batch",
            where="generator.teacher_weight",
            got=f"{numbers:,} a worker",
            expected=f"at most {CATALOG_LOGITS:,}",
            fix="lower generator.optim.batch_size, or set generator.teacher_weight=0",
        )
    model = load_fusion(stage_one, text, context.inputs["fusion"])
    return Teacher(model.to(worker.device), config.teacher_temperature, config.teacher_skips_history)


def train_generator(worker: Worker, context: StageContext, settings: dict) -> None:
    """Worker function: train the generator."""
    config = GeneratorConfig.model_validate(settings["generator"])
    sequences = Catalog(context.inputs["catalog"], settings["order"]).sequences
    torch.manual_seed(settings["seed"])
    span = sequences.span if config.time_bumps else (0, 1)
    model = build_model(config, context.inputs["fusion"], context.inputs["identifiers"], span).to(worker.device)
    task = GeneratorTask(model, sequences, worker, settings, _teacher(config, context, settings, worker))
    sizes = count_parameters(model)
    engine = make_engine(model, config.optim, worker, context.runtime)
    summary = train(task, engine, config.optim, worker, context, seed=settings["seed"])
    if worker.is_main:
        write_json(context.out / "summary.json", summary | {"num_parameters": sizes})
