"""What a step of the train loop depends on besides its data: learning rate, parts of the batch, random numbers.

A global batch is cut into parts, at least one a worker. A part is what a worker of that many workers would take, so
neither gradients nor dropout depend on how the parts are shared out. Random numbers are seeded by (seed, step, part).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from genrec_dist.config import OptimConfig
from genrec_dist.training.worker import Worker


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Linear warm-up to the peak, then constant or cosine to a tenth of it."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.schedule == "constant" or step < config.warmup_steps:
        return config.learning_rate * warm
    span = max(1, total_steps - config.warmup_steps)
    done = min(1.0, (step - config.warmup_steps) / span)
    return config.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def local_part(indices: np.ndarray, worker: Worker) -> np.ndarray:
    """This worker's samples of a global batch."""
    return indices[worker.rank :: worker.world_size]


def parts_of(worker: Worker, count: int) -> list[Worker]:
    """The parts of every global batch that a worker takes, each as the worker that it would be.

    Args:
        worker: this process.
        count: parts over all workers; 0: one a worker. Rounded up to a multiple of the workers.
    """
    each = max(1, -(-count // worker.world_size))
    total = each * worker.world_size
    return [replace(worker, rank=rank, world_size=total) for rank in range(worker.rank, total, worker.world_size)]


def seeding(parts: list[Worker], seed: int, step: int) -> Callable[[int], None]:
    """What a step calls before each of its parts."""

    def begin(index: int) -> None:
        mixed = np.random.SeedSequence([seed, step, parts[index].rank]).generate_state(2, np.uint32)
        torch.manual_seed(int(mixed[0]) << 31 | int(mixed[1]) >> 1)

    return begin
