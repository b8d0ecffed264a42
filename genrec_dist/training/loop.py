"""The one train loop of the project.

A task brings a model, an order of batches and a validation; the engine makes the step; the worker says who
takes part. The loop owns schedule, logging, early stopping (by default on validation NDCG@10), and checkpoints. Random
numbers of a step are seeded by (seed, step, rank), so a checkpoint needs no generator state and a resumed run
on CPU is bitwise the uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from genrec_dist.artifacts.files import append_jsonl, write_atomic
from genrec_dist.config import OptimConfig
from genrec_dist.errors import DataError, TrainingError
from genrec_dist.pipeline import StageContext
from genrec_dist.training.checkpoints import Checkpoints, State
from genrec_dist.training.engine import Engine
from genrec_dist.training.order import BatchOrder
from genrec_dist.training.sharded import ShardedEngine
from genrec_dist.training.stopping import StopRequest
from genrec_dist.training.watchdog import Watchdog
from genrec_dist.training.worker import Worker

MONITOR = "ndcg@10"


class Task(Protocol):
    """What a model brings to the loop."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def order(self) -> BatchOrder: ...

    def batch(self, indices: Any, worker: Worker) -> Any:
        """This worker's part of a global batch, as the model reads it."""

    def validate(self, worker: Worker) -> dict[str, float]:
        """Validation metrics, the same on every worker; must hold the one that decides."""


@dataclass
class LoopState:
    """Everything besides tensors that a resumed loop needs; JSON-ready."""

    step: int = 0
    best: float = -1.0
    best_step: int = 0
    waited: int = 0
    stopped: bool = False
    curve_lines: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    summed: int = 0
    samples: int = 0
    logged_seconds: float = 0.0


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


class _Curves:
    """curves.jsonl, cut back to what a checkpoint knows when a run resumes."""

    def __init__(self, path: Path, lines: int, write: bool) -> None:
        self.path, self.lines, self.active = path, lines, write
        if write:
            kept = path.read_bytes().splitlines(keepends=True)[:lines] if path.exists() else []
            write_atomic(path, b"".join(kept))

    def add(self, **record: object) -> None:
        self.lines += 1
        if self.active:
            append_jsonl(self.path, record)


def train(
    task: Task,
    engine: Engine | ShardedEngine,
    config: OptimConfig,
    worker: Worker,
    context: StageContext,
    *,
    seed: int,
    monitor: str = MONITOR,
    after_step: Callable[[int], None] | None = None,
    checkpoint_epochs: int = 1,
) -> dict:
    """Train to the best validation metric.

    Args:
        task: model, data order, validation.
        engine: torch or DeepSpeed around the task's model.
        config: optimiser, schedule, stopping.
        worker: this process.
        context: stage context; checkpoints go to its scratch, curves.jsonl and model.safetensors to `out`. A sharded
            engine writes no model: the best parameters are in it at the end, on worker 0 and the others alike.
        seed: of dropout and negatives.
        monitor: validation metric that decides, higher is better.
        after_step: what else a step learns, given its number; on every worker, before any checkpoint of the step.
        checkpoint_epochs: epochs between checkpoints, besides those by the clock.

    Returns:
        Summary: steps, best step, best validation metric, seconds, whether it stopped early.

    Raises:
        TrainingError: the loss is not finite; nothing was updated by that step.
        Preempted: the training was asked to stop; the checkpoint of its last step is written.
    """
    checkpoints = Checkpoints(context.scratch / "checkpoints", context.runtime.keep_checkpoints)
    state, best = _restore(checkpoints, engine, context, worker)
    curves = _Curves(context.out / "curves.jsonl", state.curve_lines, worker.is_main)
    per_epoch = task.order.steps_per_epoch
    total = per_epoch * config.epochs
    log_every = max(1, min(100, per_epoch // 4))
    clock = saved = time.monotonic()
    with Watchdog(context, worker) as watchdog, StopRequest(context, worker) as stop:
        while state.step < total and not state.stopped:
            torch.manual_seed(_step_seed(seed, state.step, worker.rank))
            engine.model.train()
            indices = task.order.batch(state.step)
            losses = engine.forward(task.batch(indices, worker))
            engine.backward(losses["loss"])
            _accumulate(state, losses, len(indices), worker, state.step / per_epoch)
            rate = learning_rate(config, state.step, total)
            engine.step(rate)
            if after_step is not None:
                after_step(state.step)
            state.step += 1
            watchdog.step_done(state.step)
            now = time.monotonic()
            state.seconds, clock = state.seconds + now - clock, now
            epoch_end = state.step % per_epoch == 0
            if epoch_end or state.step % log_every == 0:
                _log(state, curves, rate, per_epoch)
                if worker.is_main:
                    context.progress(
                        state.step,
                        total,
                        "steps",
                        epoch=round(state.step / per_epoch, 2),
                        best=round(max(state.best, 0), 5),
                    )
            if (epoch_end and (state.step // per_epoch) % config.evaluate_every == 0) or state.step == total:
                watchdog.beat("validation")
                best = _validate(task, engine, config, watchdog.worker, state, best, curves, per_epoch, monitor)
            stopping = worker.is_main and stop.requested()
            due = context.runtime.checkpoint_minutes and now - saved >= 60 * context.runtime.checkpoint_minutes
            if worker.world_size > 1:  # every worker must take part in gathering: worker 0's clock decides
                flags = worker.broadcast(torch.tensor([float(due), float(stopping)], device=worker.device))
                due, stopping = (bool(flag) for flag in flags.tolist())
            if due or stopping or (epoch_end and state.step // per_epoch % checkpoint_epochs == 0):
                watchdog.beat("checkpoint")
                state.curve_lines = curves.lines
                full = engine.state()
                _refuse_poison(full, state.step)
                if isinstance(engine, ShardedEngine):
                    checkpoints.save_sharded(state.step, asdict(state), full, best, worker)
                elif worker.is_main:
                    checkpoints.save(state.step, asdict(state), full, best)
                saved = time.monotonic()
            if stopping:
                worker.barrier()  # worker 0 has written what the others need no longer wait for
                stop.leave(state.step)
            watchdog.beat("step")
    assert best is not None
    if isinstance(engine, ShardedEngine):  # its tables are the stage's to write, by owner
        engine.load_best(best)
    elif worker.is_main:
        save_file(best, context.out / "model.safetensors")
    worker.barrier()
    return {
        "steps": state.step,
        "epochs": state.step / per_epoch,
        "best_step": state.best_step,
        f"best_valid_{monitor}": state.best,
        "stopped_early": state.stopped,
        "seconds": round(state.seconds, 2),
    }


def _refuse_poison(tensors: State, step: int) -> None:
    """A finite loss can have non-finite gradients: what they spoilt must not become the newest checkpoint.

    Raises:
        TrainingError: a parameter or moment is not finite.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise TrainingError(
                "parameters are not finite; no checkpoint was written",
                where=f"step {step}",
                got=name,
                expected="finite values",
                fix="lower the learning rate, raise warm-up, or set optim.precision=fp32; the last checkpoint is kept",
            )


def _step_seed(seed: int, step: int, rank: int) -> int:
    mixed = np.random.SeedSequence([seed, step, rank]).generate_state(2, np.uint32)
    return int(mixed[0]) << 31 | int(mixed[1]) >> 1


def _restore(
    checkpoints: Checkpoints, engine: Engine | ShardedEngine, context: StageContext, worker: Worker
) -> tuple[LoopState, State | None]:
    best: State | None
    if isinstance(engine, ShardedEngine):
        parts = checkpoints.latest_sharded(worker)
        _tell_skipped(checkpoints, context, worker)
        if parts is None:
            return LoopState(), None
        loop, files, best_files = parts
        engine.load_parts(files)
        best = engine.read_best(best_files) if best_files else None
    else:
        found = checkpoints.latest()
        _tell_skipped(checkpoints, context, worker)
        if found is None:
            return LoopState(), None
        loop, tensors, best = found
        engine.load(tensors)
    if worker.is_main:
        context.event("training_resumed", step=loop["step"])
    return LoopState(**loop), best


def _tell_skipped(checkpoints: Checkpoints, context: StageContext, worker: Worker) -> None:
    for problem in checkpoints.skipped if worker.is_main else ():
        context.event("checkpoint_skipped", detail=problem)


def _accumulate(state: LoopState, losses: dict[str, torch.Tensor], count: int, worker: Worker, epoch: float) -> None:
    names = sorted(losses)
    values = worker.sum(torch.stack([losses[n].detach().float() for n in names])) / worker.world_size
    for name, value in zip(names, values.tolist()):
        if not math.isfinite(value):
            raise TrainingError(
                "loss is not finite; the step was not applied",
                where=f"step {state.step} (epoch {epoch:.2f})",
                got=f"{name} = {value}",
                expected="a finite number",
                fix="lower the learning rate, raise warm-up, or set optim.precision=fp32",
            )
        state.sums[name] = state.sums.get(name, 0.0) + value
    state.summed += 1
    state.samples += count


def _log(state: LoopState, curves: _Curves, rate: float, per_epoch: int) -> None:
    spent = state.seconds - state.logged_seconds
    curves.add(
        split="train",
        step=state.step,
        epoch=round(state.step / per_epoch, 4),
        learning_rate=rate,
        samples_per_second=round(state.samples / max(spent, 1e-9), 1),
        **{name: total / state.summed for name, total in state.sums.items()},
    )
    state.sums, state.summed, state.samples, state.logged_seconds = {}, 0, 0, state.seconds


def _validate(
    task: Task,
    engine: Engine | ShardedEngine,
    config: OptimConfig,
    worker: Worker,
    state: LoopState,
    best: State | None,
    curves: _Curves,
    per_epoch: int,
    monitor: str,
) -> State | None:
    engine.model.eval()
    metrics = task.validate(worker)
    if monitor not in metrics:
        raise DataError(
            "no user has a validation item",
            where="validation",
            expected="at least one user with three interactions",
            fix="loosen the k-core filter or check the source",
        )
    curves.add(split="valid", step=state.step, epoch=round(state.step / per_epoch, 4), **metrics)
    if metrics[monitor] > state.best or best is None:
        state.best, state.best_step, state.waited = metrics[monitor], state.step, 0
        if isinstance(engine, ShardedEngine):
            return engine.best()
        full = engine.state()
        return {name[6:]: value for name, value in full.items() if name.startswith("model/")}
    state.waited += 1
    state.stopped = state.waited >= config.patience
    return best
