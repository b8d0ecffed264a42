"""A few training steps under any engine, and what they left: the material of engine and world-size parity tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from genrec_dist.config import DeepspeedConfig, RuntimeConfig
from genrec_dist.testing.tiny_tasks import ENGINES, TASKS, make
from genrec_dist.training.engine import State, make_engine
from genrec_dist.training.schedule import learning_rate
from genrec_dist.training.worker import Worker

HALF, STEPS = 4, 8
CLIP = {"sasrec": 32.0, "generator": 8.2}
"""Clipping norms that some of the steps exceed and some do not."""


def make_task(name: str, worker: Worker):
    """Tiny task whose last batch of an epoch is one sample: one of two workers then has none."""
    sizes = TASKS[name](worker).order.num_samples
    batch_size = next(b for b in range(6, sizes) if sizes % b == 1)
    return TASKS[name](worker, batch_size=batch_size, weight_decay=0.1, clip_norm=CLIP[name])


def take_steps(task, engine: Any, worker: Worker, start: int, stop: int) -> list[float]:
    """Train from step `start` to `stop` without dropout; the global losses."""
    losses = []
    engine.model.eval()
    for step in range(start, stop):
        out = engine.forward(task.batch(task.order.batch(step), worker))
        engine.backward(out["loss"])
        losses.append(worker.sum(out["loss"].detach().clone()).item() / worker.world_size)
        engine.step(learning_rate(task.config.optim, step, STEPS))
    return losses


def train_halves(name: str, kind: str, worker: Worker) -> tuple[State, State]:
    """States after `HALF` and after all `STEPS` steps; 'losses' is added to the second."""
    task = make_task(name, worker)
    engine = make(kind, task, worker)
    losses = take_steps(task, engine, worker, 0, HALF)
    half = engine.state()
    losses += take_steps(task, engine, worker, HALF, STEPS)
    return half, engine.state() | {"losses": torch.tensor(losses)}


def continue_from(name: str, kind: str, worker: Worker, half: State) -> State:
    """Load a half-way state, written under any engine and world size, and train to the end."""
    task = make_task(name, worker)
    engine = make(kind, task, worker)
    engine.load(half)
    losses = take_steps(task, engine, worker, HALF, STEPS)
    return engine.state() | {"losses": torch.tensor(losses)}


def steps_job(worker: Worker, folder: Path) -> None:
    """One process of a group: train under every engine; go on from each half-way state `alone-*` in the folder.

    Rank 0 writes `<task>-<engine>-{half,end}.safetensors` and `<task>-<engine>-from-<engine>.safetensors`.
    """
    for name in TASKS:
        for kind in ENGINES:
            half, end = train_halves(name, kind, worker)
            results = {"half": half, "end": end}
            for path in sorted(folder.glob(f"alone-{name}-*.safetensors")):
                results[f"from-{path.stem.split('-')[-1]}"] = continue_from(name, kind, worker, load_file(path))
            if worker.is_main:
                for label, state in results.items():
                    save_file(state, folder / f"{name}-{kind}-{label}.safetensors")


def two_worlds_job(worker: Worker) -> None:
    """Train, leave the group of processes, and train in a new one: the same losses."""
    losses = []
    for _ in range(2):
        task = make_task("generator", worker)
        losses.append(take_steps(task, make("zero2", task, worker), worker, 0, HALF))
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert losses[0] == losses[1]


def gather_job(worker: Worker, folder: Path) -> None:
    """Train at ZeRO 3 with bfloat16 products, weights gathered in either type; losses to `<dtype>.safetensors`."""
    for dtype in ("fp32", "bf16"):
        task = TASKS["generator"](worker, batch_size=6, precision="bf16")
        sizes = DeepspeedConfig(persistence_threshold=0, gather_dtype=dtype)
        engine = make_engine(
            task.model, task.config.optim, worker, RuntimeConfig(engine="deepspeed", zero_stage=3, deepspeed=sizes)
        )
        losses = torch.tensor(take_steps(task, engine, worker, 0, STEPS))
        if worker.is_main:
            save_file({"losses": losses}, folder / f"{dtype}.safetensors")
