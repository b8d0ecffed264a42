"""The one train loop of the project.

A task brings a model, an order of batches and a validation; the engine makes the step; the worker says who
takes part. The loop owns schedule, logging, early stopping (by default on validation NDCG@10), and checkpoints. Random
numbers of a step are a function of its number, so a checkpoint needs no generator state and a resumed run on CPU is
bitwise the uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from genrec_dist.artifacts.files import write_json
from genrec_dist.artifacts.tensors import save_tensors
from genrec_dist.config import OptimConfig
from genrec_dist.errors import ConfigError, DataError, TrainingError
from genrec_dist.pipeline import StageContext
from genrec_dist.training.averaging import WeightAverage
from genrec_dist.training.cadence import Cadence
from genrec_dist.training.checkpoint_folder import write_errors
from genrec_dist.training.checkpoints import Checkpoints, State
from genrec_dist.training.curves import Curves
from genrec_dist.training.engine import Engine
from genrec_dist.training.losses import LossMeter, NonFinite
from genrec_dist.training.meter import Meter
from genrec_dist.training.order import BatchOrder
from genrec_dist.training.prefetch import Prefetcher
from genrec_dist.training.schedule import learning_rate, parts_of, seeding
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
        checkpoint_epochs: epochs between checkpoints where the clock does not count.

    Returns:
        Summary: steps, best step, best validation metric, seconds, whether it stopped early, and, of a task that says
        what a step costs, model FLOPs up to the best validation and in all.

    Raises:
        TrainingError: the loss is not finite; nothing was updated by that step.
        CheckpointError: a checkpoint could not be written; the ones before stay.
        Preempted: the training was asked to stop; the checkpoint of its last step is written.
    """
    runtime = context.runtime
    whole_batches = after_step is not None or isinstance(engine, ShardedEngine)
    parts = parts_of(worker, 0 if whole_batches else runtime.micro_batches)
    cadence = Cadence(runtime.checkpoint_minutes, runtime.checkpoint_steps)
    by_epochs = not cadence.by_clock  # epochs of a second would leave the disk no rest
    training = _Training(task, engine, config, worker, context, monitor)
    state, meter, per_epoch, total = training.state, training.meter, training.per_epoch, training.num_steps
    cadence.saved(state.step)

    def make(step: int) -> tuple[Any, list]:
        indices = task.order.batch(step)
        return indices, [task.batch(indices, part) for part in parts]

    with (
        training.checkpoints,
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
                engine.advance(local, rate, training.losses, seeding(parts, seed, state.step))
                if after_step is not None:
                    after_step(state.step)
                training.stepped(indices)
                watchdog.step_done(state.step)
                epoch_end = state.step % per_epoch == 0
                if epoch_end or state.step % training.log_every == 0:
                    training.log(rate)
                validates = epoch_end and training.epoch % config.evaluate_every == 0
                if validates or state.step == total:
                    watchdog.beat("validation")
                    training.validate(watchdog.worker)
                # The same on all workers, as worker 0 has it.
                due, stopping = worker.tell([cadence.due(state.step), worker.is_main and stop.requested()])
                ends = state.step == total or state.stopped
                if due or stopping or ends or (by_epochs and epoch_end and training.epoch % checkpoint_epochs == 0):
                    watchdog.beat("checkpoint")
                    training.save()
                    cadence.saved(state.step)
            except NonFinite as error:
                raise training.blame(error) from None
            if stopping:
                training.checkpoints.wait()  # collective where tables are sharded: all parts are there, then all leave
                worker.barrier()
                stop.leave(state.step)
            watchdog.beat("step")
    return training.finish()


class _Training:
    """What the steps of one training share; starts where its newest checkpoint stands.

    Args: as of `train`.
    """

    def __init__(
        self,
        task: Task,
        engine: Engine | ShardedEngine,
        config: OptimConfig,
        worker: Worker,
        context: StageContext,
        monitor: str,
    ) -> None:
        self.task, self.engine, self.config, self.worker = task, engine, config, worker
        self.context, self.monitor = context, monitor
        self.per_epoch = task.order.steps_per_epoch
        self.num_steps = self.per_epoch * config.epochs
        self.log_every = max(1, min(100, self.per_epoch // 4))
        if worker.is_main:
            _keep_settings(engine, context)
        self.average = _average_of(engine, config)
        runtime = context.runtime
        self.checkpoints = Checkpoints(
            context.scratch / "checkpoints", runtime.keep_checkpoints, fingerprint=context.key
        )
        self.best: State | None = None
        self.state = self._restore()
        self.curves = Curves(context.out / "curves.jsonl", self.state.curve_lines, worker.is_main)
        self.losses = LossMeter(worker)
        self.losses.start(self.state.step, self.state.losses)
        self.meter = Meter.start(task, config, worker, self.state.meter)

    @property
    def epoch(self) -> int:
        """Epochs that are through."""
        return self.state.step // self.per_epoch

    def stepped(self, indices: Any) -> None:
        """Count a step, and let the average follow."""
        self.state.step += 1
        if self.average is not None:
            self.average.update(self.state.step)
        self.meter.stepped(indices)

    def log(self, rate: float) -> None:
        """Write losses and speeds since the last call."""
        step, best = self.state.step, round(max(self.state.best, 0), 5)
        epoch = step / self.per_epoch
        self.curves.add(
            split="train",
            step=step,
            epoch=round(epoch, 4),
            learning_rate=rate,
            **self.meter.read(),
            **self.losses.read(),
        )
        if self.worker.is_main:
            self.context.progress(step, self.num_steps, "steps", epoch=round(epoch, 2), best=best)

    def validate(self, worker: Worker) -> None:
        """Validate the weights, or their average; keep the best so far, whichever it was of."""
        state, spent = self.state, self.meter.spent()
        with self.meter.validating():
            self.engine.model.eval()
            with self.average.applied() if self.average is not None else nullcontext():
                with self.engine.whole():
                    metrics = self.task.validate(worker)
                if self.monitor not in metrics:
                    raise DataError(
                        "no user has a validation item",
                        where="validation",
                        expected="at least one user with three interactions",
                        fix="loosen the k-core filter or check the source",
                    )
                epoch = round(state.step / self.per_epoch, 4)
                self.curves.add(split="valid", step=state.step, epoch=epoch, **spent, **metrics)
                if metrics[self.monitor] > state.best or self.best is None:
                    state.best, state.best_step, state.waited = metrics[self.monitor], state.step, 0
                    state.best_flops = spent.get("flops", 0.0)
                    self.best = self.engine.best()
                    return
        state.waited += 1
        state.stopped = state.waited >= self.config.patience

    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            TrainingError: a loss, a parameter or a moment is not finite.
        """
        with self.meter.saving():
            self.losses.refuse()
            state = self.state
            state.curve_lines, state.losses, state.meter = (
                self.curves.num_lines,
                self.losses.state(),
                self.meter.state(),
            )
            self.checkpoints.wait()  # one copy of the state at a time
            full = self.engine.state()
            if self.average is not None:
                full |= self.average.state()
            _refuse_poison(full, state.step)
            if isinstance(self.engine, ShardedEngine):
                self.checkpoints.save_sharded(state.step, asdict(state), full, self.best, state.best_step, self.worker)
            elif self.worker.is_main:
                self.checkpoints.save(state.step, asdict(state), full, self.best, state.best_step)

    def finish(self) -> dict:
        """Write the best model; the summary of `train`."""
        best, state = self.best, self.state
        assert best is not None
        if isinstance(self.engine, ShardedEngine):  # its tables are the stage's to write, by owner
            self.engine.load_best(best)
        elif self.worker.is_main:
            out = self.context.out
            with write_errors(out, sum(tensor.nbytes for tensor in best.values())):
                save_tensors(best, out / "model.safetensors")
        self.worker.barrier()
        return {
            "steps": state.step,
            "epochs": state.step / self.per_epoch,
            "best_step": state.best_step,
            f"best_valid_{self.monitor}": state.best,
            "stopped_early": state.stopped,
            **({"best_flops": state.best_flops, **self.meter.spent()} if self.meter.flops else {}),
            **self.meter.summary(),
        }

    def blame(self, error: NonFinite) -> TrainingError:
        """The error that a user reads, naming the batch; its samples are an event of the run."""
        samples = [int(i) for i in self.task.order.batch(error.step)]
        if self.worker.is_main:
            self.context.event("loss_not_finite", step=error.step, samples=samples)
        found = ", ".join(f"{name} = {value}" for name, value in error.found.items()) or "a loss of another worker"
        shown = ", ".join(map(str, samples[:5])) + (", ..." if len(samples) > 5 else "")
        epoch = error.step / self.per_epoch
        return TrainingError(
            "loss is not finite; the step was not applied",
            where=f"step {error.step} (epoch {epoch:.2f}), batch of {len(samples)} samples: {shown}",
            got=found,
            expected="a finite number",
            fix="lower the learning rate, raise warm-up, or set optim.precision=fp32; all samples are in events.jsonl",
        )

    def _restore(self) -> LoopState:
        if isinstance(self.engine, ShardedEngine):
            parts = self.checkpoints.latest_sharded(self.worker)
            self._tell_skipped()
            if parts is None:
                return LoopState()
            loop, files, best_files = parts
            self.engine.load_parts(files)
            self.best = self.engine.read_best(best_files) if best_files else None
        else:
            found = self.checkpoints.latest(self.worker)
            self._tell_skipped()
            if found is None:
                return LoopState()
            loop, tensors, self.best = found
            (self.engine if self.average is None else self.average).load(tensors)
        if self.worker.is_main:
            self.context.event("training_resumed", step=loop["step"])
        return LoopState(**loop)

    def _tell_skipped(self) -> None:
        for problem in self.checkpoints.skipped if self.worker.is_main else ():
            self.context.event("checkpoint_skipped", detail=problem)


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


def _keep_settings(engine: Engine | ShardedEngine, context: StageContext) -> None:
    """DeepSpeed's JSON into the run folder, where there is one."""
    settings = getattr(engine, "settings", None)
    if settings is not None and context.events_file is not None:
        write_json(context.events_file.parent / f"deepspeed-{context.title}.json", settings)


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
