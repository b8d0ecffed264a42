"""Tiny tasks of the real models, and engines around them, for the tests of loop and engines."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch

from genrec_dist.baselines.hstu_stage import HstuTask
from genrec_dist.baselines.sasrec import SasrecTask
from genrec_dist.collaborative.fusion import FusionModel
from genrec_dist.collaborative.stage import FusionTask
from genrec_dist.config import DeepspeedConfig, FusionConfig, HstuConfig, RuntimeConfig, SasrecConfig
from genrec_dist.generator.gpt_stage import GptTask
from genrec_dist.generator.stage import GeneratorTask
from genrec_dist.generator.teacher import Teacher
from genrec_dist.testing.tiny import (
    tiny_embeddings,
    tiny_generator,
    tiny_gpt,
    tiny_optim,
    tiny_sequences,
    tiny_trie,
)
from genrec_dist.training.deepspeed_engine import DeepSpeedEngine
from genrec_dist.training.engine import Engine, TorchEngine
from genrec_dist.training.worker import Worker

NUM_ITEMS = 20
SETTINGS = {"seed": 0, "validation_beam": 10, "validation_users": 0, "mix_weight": 0.0}
"""Of a generator's stage."""
ENGINES = ("torch", "zero0", "zero1", "zero2", "zero3")


def sasrec_task(worker: Worker, dropout: float = 0.0, **optim) -> SasrecTask:
    """SASRec over 12 users."""
    section = SasrecConfig(
        dim=8, num_heads=2, dropout=dropout, max_history=4, temperature=0.3, optim=tiny_optim(**optim)
    )
    return SasrecTask(section, tiny_sequences(12, NUM_ITEMS, shortest=4), worker, seed=0, users=0)


def hstu_task(worker: Worker, dropout: float = 0.0, **optim) -> HstuTask:
    """HSTU over 12 users."""
    section = HstuConfig(
        dim=8, num_heads=2, dropout=dropout, max_history=4, temperature=0.3, time_buckets=8, optim=tiny_optim(**optim)
    )
    return HstuTask(section, tiny_sequences(12, NUM_ITEMS, shortest=4), worker, seed=0, users=0)


def generator_task(worker: Worker, dropout: float = 0.0, **optim) -> GeneratorTask:
    """Generator over 12 users, sampled distillation, a tree of uneven depth."""
    model = tiny_generator(
        tiny_trie(NUM_ITEMS, 4, seed=1),
        spread=0.2,
        dropout=dropout,
        distill_negatives=5,
        optim=tiny_optim(**optim),
    ).to(worker.device)
    return GeneratorTask(model, tiny_sequences(12, NUM_ITEMS, shortest=4), worker, SETTINGS)


def taught_task(worker: Worker, dropout: float = 0.0, **optim) -> GeneratorTask:
    """Generator over 12 users that learns from a Stage I which reads times, as itself does not."""
    section = FusionConfig(backbone="sasrec", dim=6, num_heads=2, max_history=6, time_bumps=4)
    torch.manual_seed(3)
    stage_one = FusionModel(section, torch.from_numpy(tiny_embeddings(NUM_ITEMS))).to(worker.device)
    model = tiny_generator(
        tiny_trie(NUM_ITEMS, 4, seed=1), spread=0.2, dropout=dropout, teacher_weight=0.6, optim=tiny_optim(**optim)
    ).to(worker.device)
    return GeneratorTask(model, tiny_sequences(12, NUM_ITEMS, shortest=4), worker, SETTINGS, Teacher(stage_one))


def gpt_task(worker: Worker, dropout: float = 0.0, **optim) -> GptTask:
    """Decoder-only generator over 12 users, child head, a tree of uneven depth."""
    trie = tiny_trie(NUM_ITEMS, 4, seed=1)
    model = tiny_gpt(trie, spread=0.2, head="child", dropout=dropout, optim=tiny_optim(**optim)).to(worker.device)
    settings = {"seed": 0, "validation_beam": 10, "validation_users": 0}
    return GptTask(model, tiny_sequences(12, NUM_ITEMS, shortest=4), worker, settings)


def fusion_task(worker: Worker, backbone: Literal["din", "sasrec"], dropout: float = 0.0, **optim) -> FusionTask:
    """Stage I over 12 users with alignment, full softmax, times."""
    section = FusionConfig(
        backbone=backbone, dim=8, num_heads=2, dropout=dropout, max_history=4, time_bumps=4, optim=tiny_optim(**optim)
    )
    semantic = torch.from_numpy(tiny_embeddings(NUM_ITEMS))
    return FusionTask(section, tiny_sequences(12, NUM_ITEMS, shortest=4), semantic, worker, seed=0, users=0)


TASKS: dict[str, Callable[..., Any]] = {"sasrec": sasrec_task, "generator": generator_task}
CAPTURED = TASKS | {
    "taught": taught_task,
    "hstu": hstu_task,
    "gpt": gpt_task,
    "fusion_din": partial(fusion_task, backbone="din"),
    "fusion_sasrec": partial(fusion_task, backbone="sasrec"),
}
"""Every model whose steps a GPU can capture."""


def make(kind: str, task, worker: Worker, **runtime) -> Engine:
    """The engine called 'torch' or 'zero0' to 'zero3' around the task's model; stage 3 shards every parameter.

    Args:
        runtime: further settings of the runtime section.
    """
    optim = task.config.optim
    if kind == "torch":
        return TorchEngine(task.model, optim, worker)
    sizes = DeepspeedConfig(persistence_threshold=0)
    settings = RuntimeConfig(zero_stage=int(kind[-1]), deepspeed=sizes, **runtime)
    return DeepSpeedEngine(task.model, optim, worker, settings)
