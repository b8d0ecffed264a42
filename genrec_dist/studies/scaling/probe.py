"""Seconds of a training step, from real steps on this machine over made-up data of the run's shape.

The model, its task, its batches and its engine are the run's own; sequences, codes and embeddings are drawn at random,
so nothing has to be built before. Reads and writes no file.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from genrec_dist.catalog.dataset import Sequences
from genrec_dist.config import Config
from genrec_dist.generator.gpt import GptGenerator
from genrec_dist.generator.model import Generator
from genrec_dist.identifiers.random_codes import random_codes
from genrec_dist.identifiers.trie import Trie, build_trie
from genrec_dist.studies.sizes import CodebookSize, Counts
from genrec_dist.training.engine import make_engine
from genrec_dist.training.losses import LossMeter
from genrec_dist.training.worker import Worker, pick_device, setup_torch

MOST_USERS = 20_000
"""Users of the made-up catalog: enough for batches of every length."""
WARM_STEPS, MOST_STEPS, SECONDS = 2, 20, 3.0


@dataclass(frozen=True)
class Material:
    """Made-up inputs of a model: sequences and trie of the catalog's shape, and the width of its embeddings."""

    sequences: Sequences
    trie: Trie | None
    width: int


def make_material(counts: Counts, codebook: CodebookSize | None, num_clusters: int, width: int) -> Material:
    """Sequences as long as the catalog's and random distinct codes as deep as the codebook's."""
    rng = np.random.default_rng(0)
    if counts.lengths is not None:
        lengths = rng.permutation(counts.lengths)[:MOST_USERS]
    else:
        mean = counts.num_interactions / max(counts.num_users, 1)
        lengths = 4 + rng.geometric(1 / max(mean - 4, 1), min(counts.num_users, MOST_USERS))
    total = int(lengths.sum())
    sequences = Sequences(
        indptr=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=rng.integers(0, counts.num_items, total).astype(np.int32),
        timestamps=np.arange(total, dtype=np.int64),
        num_items=counts.num_items,
    )
    trie = None
    if codebook is not None:
        depth = round(codebook.max_depth)
        codes = random_codes(counts.num_items, num_clusters, depth)
        trie = build_trie(codes, np.full(counts.num_items, depth))
    return Material(sequences, trie, width)


def seconds_of_step(config: Config, section: str, material: Material, threads: int) -> float:
    """Median seconds of a training step of the whole global batch on one worker.

    Args:
        config: of the run.
        section: of the model, a key of `TASKS`.
        material: its inputs.
        threads: CPU threads.
    """
    runtime = config.runtime.model_copy(update={"backend": "local", "num_workers": 1, "engine": "torch"})
    worker = Worker(device=pick_device(runtime.device))
    setup_torch(worker, threads)
    torch.manual_seed(config.seed)
    task = TASKS[section](config, material, worker)
    settings = getattr(config, section).optim
    engine = make_engine(task.model, settings, worker, runtime)
    meter, times = LossMeter(worker), []
    engine.model.train()
    deadline = None
    for step in range(MOST_STEPS):
        begun = time.perf_counter()
        indices = task.order.batch(step)
        engine.advance([task.batch(indices, worker)], settings.learning_rate, meter, lambda part: None)
        if worker.device.type == "cuda":
            torch.cuda.synchronize(worker.device)
        if step >= WARM_STEPS:
            times.append(time.perf_counter() - begun)
            deadline = deadline or time.perf_counter() + SECONDS
            if time.perf_counter() > deadline:
                break
    return float(np.median(times))


def _generator(config: Config, material: Material, worker: Worker):
    from genrec_dist.generator.stage import GeneratorTask

    assert material.trie is not None
    table = torch.randn(material.trie.num_items, material.width)
    model: nn.Module = Generator(config.generator, material.trie, table).to(worker.device)
    settings = {"seed": config.seed, "validation_users": 0, "validation_beam": 1, "mix_weight": 0.0}
    return GeneratorTask(model, material.sequences, worker, settings)  # type: ignore[arg-type]


def _gpt(config: Config, material: Material, worker: Worker):
    from genrec_dist.generator.gpt_stage import GptTask

    assert material.trie is not None
    table = torch.randn(material.trie.num_items, material.width) if config.gpt.head == "child" else None
    model = GptGenerator(config.gpt, material.trie, table).to(worker.device)
    settings = {"seed": config.seed, "validation_users": 0, "validation_beam": 1}
    return GptTask(model, material.sequences, worker, settings)


def _sasrec(config: Config, material: Material, worker: Worker):
    from genrec_dist.baselines.sasrec import SasrecTask

    return SasrecTask(config.sasrec, material.sequences, worker, config.seed, 0)


def _hstu(config: Config, material: Material, worker: Worker):
    from genrec_dist.baselines.hstu_stage import HstuTask

    return HstuTask(config.hstu, material.sequences, worker, config.seed, 0)


TASKS: dict[str, Callable] = {"generator": _generator, "gpt": _gpt, "sasrec": _sasrec, "hstu": _hstu}
"""Section -> (config, material, worker) -> task of the train loop."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step as a line through what was measured: a fixed part, and one that grows with the FLOPs.

    Args:
        flops: of each measured step, ascending.
        seconds: measured.
    """

    flops: tuple[float, ...]
    seconds: tuple[float, ...]

    def of(self, flops: float) -> float:
        """Seconds of a step of so many FLOPs; neither part of the line is below zero."""
        slope = self.seconds[-1] / self.flops[-1]
        if len(self.flops) > 1:
            rise, run = self.seconds[-1] - self.seconds[0], self.flops[-1] - self.flops[0]
            slope = min(max(rise / run, 0.0), slope)
        return self.seconds[-1] + slope * (flops - self.flops[-1])
