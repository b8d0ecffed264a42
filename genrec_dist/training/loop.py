"""The one train loop of the project.

A task brings a model, an order of batches and a validation; the engine makes the step; the worker says who
takes part. The loop owns schedule, logging, early stopping (by default on validation NDCG@10), and checkpoints. Random
numbers of a step are seeded by (seed, step, part of the batch), so a checkpoint needs no generator state and a resumed
run on CPU is bitwise the uninterrupted one.

A global batch is cut into parts, at least one a worker. A part is what a worker of that many workers would take, so
neither gradients nor dropout depend on how the parts are shared out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from genrec_dist.artifacts.files import append_jsonl, write_atomic, write_json
from genrec_dist.artifacts.tensors import save_tensors
from genrec_dist.config import OptimConfig
from genrec_dist.errors import ConfigError, DataError, TrainingError
from genrec_dist.pipeline import StageContext
from genrec_dist.training.averaging import WeightAverage
from genrec_dist.training.cadence import Cadence
from genrec_dist.training.checkpoint_folder import write_errors
from genrec_dist.training.checkpoints import Checkpoints, State
from genrec_dist.training.engine import Engine
from genrec_dist.training.losses import LossMeter, NonFinite
from genrec_dist.training.meter import Meter
from genrec_dist.training.order import BatchOrder
from genrec_dist.training.prefetch import Prefetcher
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
    best_flops: float = 0.0
    waited: int = 0
    stopped: bool = False
    curve_lines: int = 0
    losses: dict[str, Any] = field(default_factory=dict)
    meter: dict[str, float] = field(default_factory=dict)


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
        after_step: what else a step learns, given its number; on every worker, before any checkpoint of the step. Such
            a task, and one with sharded tables, takes its batches whole.
        checkpoint_epochs: epochs between checkpoints, besides those by clock and steps.

    Returns:
        Summary: steps, best step, best validation metric, seconds, whether it stopped early, and, of a task that says
        what a step costs, model FLOPs up to the best validation and in all.

    Raises:
        TrainingError: the loss is not finite; nothing was updated by that step.
        CheckpointError: a checkpoint could not be written; the ones before stay.
        Preempted: the training was asked to stop; the checkpoint of its last step is written.
    """
    runtime = context.runtime
    checkpoints = Checkpoints(context.scratch / "checkpoints", runtime.keep_checkpoints, fingerprint=context.key)
    if worker.is_main:
        _keep_settings(engine, context)
    average = _average_of(engine, config)
    state, best = _restore(checkpoints, engine, context, worker, average)
    curves = _Curves(context.out / "curves.jsonl", state.curve_lines, worker.is_main)
    losses = LossMeter(worker)
    losses.start(state.step, state.losses)
    meter = Meter.start(task, config, worker, state.meter)
    whole_batches = after_step is not None or isinstance(engine, ShardedEngine)
    parts = parts_of(worker, 0 if whole_batches else runtime.micro_batches)
    per_epoch = task.order.steps_per_epoch
    total = per_epoch * config.epochs
    log_every = max(1, min(100, per_epoch // 4))
    cadence = Cadence(runtime.checkpoint_minutes, runtime.checkpoint_steps)
    cadence.saved(state.step)

    def make(step: int) -> tuple[Any, list]:
        indices = task.order.batch(step)
        return indices, [task.batch(indices, part) for part in parts]

    with (
        checkpoints,
        Watchdog(context, worker) as watchdog,
        StopRequest(context, worker) as stop,
        Prefetcher(make, state.step, total, getattr(task, "prefetch_depth", 0)) as batches,
    ):
        while state.step < total and not state.stopped:
            engine.model.train()
            with meter.waiting():
                indices, local = batches.get(state.step)
            rate = learning_rate(config, state.step, total)
            try:
                engine.advance(local, rate, losses, _seeding(parts, seed, state.step))
                if after_step is not None:
                    after_step(state.step)
                state.step += 1
                if average is not None:
                    average.update(state.step)
                watchdog.step_done(state.step)
                meter.stepped(indices)
                epoch_end = state.step % per_epoch == 0
                if epoch_end or state.step % log_every == 0:
                    curves.add(
                        split="train",
                        step=state.step,
                        epoch=round(state.step / per_epoch, 4),
                        learning_rate=rate,
                        **meter.read(),
                        **losses.read(),
                    )
                    _say(context, worker, state, total, per_epoch)
                validates = epoch_end and (state.step // per_epoch) % config.evaluate_every == 0
                if validates or state.step == total:
                    watchdog.beat("validation")
                    with meter.validating():
                        best = _validate(
                            task,
                            engine,
                            config,
                            watchdog.worker,
                            state,
                            best,
                            curves,
                            per_epoch,
                            monitor,
                            meter.spent(),
                            average,
                        )
                due, stopping = _decide(worker, cadence, state.step, stop)
                if due or stopping or (epoch_end and state.step // per_epoch % checkpoint_epochs == 0):
                    watchdog.beat("checkpoint")
                    with meter.saving():
                        _save(checkpoints, engine, worker, state, best, curves, losses, meter, average)
                    cadence.saved(state.step)
            except NonFinite as error:
                raise _blame(error, task, per_epoch, context, worker) from None
            if stopping:
                checkpoints.wait()  # collective where tables are sharded: all parts are there before anyone leaves
                worker.barrier()
                stop.leave(state.step)
            watchdog.beat("step")
    assert best is not None
    if isinstance(engine, ShardedEngine):  # its tables are the stage's to write, by owner
        engine.load_best(best)
    elif worker.is_main:
        with write_errors(context.out, sum(tensor.nbytes for tensor in best.values())):
            save_tensors(best, context.out / "model.safetensors")
    worker.barrier()
    return {
        "steps": state.step,
        "epochs": state.step / per_epoch,
        "best_step": state.best_step,
        f"best_valid_{monitor}": state.best,
        "stopped_early": state.stopped,
        **({"best_flops": state.best_flops, **meter.spent()} if meter.flops else {}),
        **meter.summary(),
    }


def _average_of(engine: Engine | ShardedEngine, config: OptimConfig) -> WeightAverage | None:
    """The average of the weights, where the configuration wants one.

    Raises:
        ConfigError: tables are sharded by owner, which have none.
    """
    if not config.ema_decay:
        return None
    if isinstance(engine, ShardedEngine):
        raise ConfigError(
            "weights that are sharded by owner are not averaged",
            where="optim.ema_decay",
            got=config.ema_decay,
            expected="0 with runtime.shard_tables",
        )
    return WeightAverage(engine, config.ema_decay)


def _decide(worker: Worker, cadence: Cadence, step: int, stop: StopRequest) -> tuple[bool, bool]:
    """Whether a checkpoint is due and whether to stop: the same on all workers, as worker 0 has it."""
    due, stopping = worker.tell([cadence.due(step), worker.is_main and stop.requested()])
    return due, stopping


def _say(context: StageContext, worker: Worker, state: LoopState, total: int, per_epoch: int) -> None:
    if worker.is_main:
        epoch, best = round(state.step / per_epoch, 2), round(max(state.best, 0), 5)
        context.progress(state.step, total, "steps", epoch=epoch, best=best)


def _keep_settings(engine: Engine | ShardedEngine, context: StageContext) -> None:
    """DeepSpeed's JSON into the run folder, where there is one."""
    settings = getattr(engine, "settings", None)
    if settings is not None and context.events_file is not None:
        write_json(context.events_file.parent / f"deepspeed-{context.title}.json", settings)


def _seeding(parts: list[Worker], seed: int, step: int) -> Callable[[int], None]:
    def begin(index: int) -> None:
        torch.manual_seed(_step_seed(seed, step, parts[index].rank))

    return begin


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
    checkpoints: Checkpoints,
    engine: Engine | ShardedEngine,
    context: StageContext,
    worker: Worker,
    average: WeightAverage | None,
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
        found = checkpoints.latest(worker)
        _tell_skipped(checkpoints, context, worker)
        if found is None:
            return LoopState(), None
        loop, tensors, best = found
        (engine if average is None else average).load(tensors)
    if worker.is_main:
        context.event("training_resumed", step=loop["step"])
    return LoopState(**loop), best


def _tell_skipped(checkpoints: Checkpoints, context: StageContext, worker: Worker) -> None:
    for problem in checkpoints.skipped if worker.is_main else ():
        context.event("checkpoint_skipped", detail=problem)


def _save(
    checkpoints: Checkpoints,
    engine: Engine | ShardedEngine,
    worker: Worker,
    state: LoopState,
    best: State | None,
    curves: _Curves,
    losses: LossMeter,
    meter: Meter,
    average: WeightAverage | None,
) -> None:
    losses.refuse()
    state.curve_lines, state.losses, state.meter = curves.lines, losses.state(), meter.state()
    checkpoints.wait()  # one copy of the state at a time
    full = engine.state()
    if average is not None:
        full |= average.state()
    _refuse_poison(full, state.step)
    if isinstance(engine, ShardedEngine):
        checkpoints.save_sharded(state.step, asdict(state), full, best, state.best_step, worker)
    elif worker.is_main:
        checkpoints.save(state.step, asdict(state), full, best, state.best_step)


def _blame(error: NonFinite, task: Task, per_epoch: int, context: StageContext, worker: Worker) -> TrainingError:
    """The error that a user reads, naming the batch; its samples are an event of the run."""
    samples = [int(i) for i in task.order.batch(error.step)]
    if worker.is_main:
        context.event("loss_not_finite", step=error.step, samples=samples)
    found = ", ".join(f"{name} = {value}" for name, value in error.found.items()) or "a loss of another worker"
    shown = ", ".join(map(str, samples[:5])) + (", ..." if len(samples) > 5 else "")
    return TrainingError(
        "loss is not finite; the step was not applied",
        where=f"step {error.step} (epoch {error.step / per_epoch:.2f}), batch of {len(samples)} samples: {shown}",
        got=found,
        expected="a finite number",
        fix="lower the learning rate, raise warm-up, or set optim.precision=fp32; all samples are in events.jsonl",
    )


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
    spent: dict[str, float],
    average: WeightAverage | None,
) -> State | None:
    """Validate the weights, or their average; the best so far, whichever it was of."""
    engine.model.eval()
    with average.applied() if average is not None else nullcontext():
        with engine.whole():
            metrics = task.validate(worker)
        if monitor not in metrics:
            raise DataError(
                "no user has a validation item",
                where="validation",
                expected="at least one user with three interactions",
                fix="loosen the k-core filter or check the source",
            )
        curves.add(split="valid", step=state.step, epoch=round(state.step / per_epoch, 4), **spent, **metrics)
        if metrics[monitor] > state.best or best is None:
            state.best, state.best_step, state.waited = metrics[monitor], state.step, 0
            state.best_flops = spent.get("flops", 0.0)
            return engine.best()
    state.waited += 1
    state.stopped = state.waited >= config.patience
    return best
