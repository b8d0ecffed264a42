"""Faults on purpose: a training killed at a step, files cut short or flipped, a worker that raises."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from genrec_dist.artifacts.files import write_json
from genrec_dist.errors import DataError
from genrec_dist.pipeline import StageContext
from genrec_dist.training.worker import Worker


class InjectedFault(BaseException):
    """Stands for a kill; no handler of ordinary errors catches it."""


class FaultyTask:
    """A training task that dies, hangs, or turns its loss to NaN, at one global step.

    Args:
        task: the real task.
        crash_at: step whose batch raises `InjectedFault`.
        nan_at: step whose loss is multiplied by NaN.
        hang_at: step whose batch never comes.
        before: called with each step before its batch is made.
    """

    def __init__(
        self,
        task,
        *,
        crash_at: int | None = None,
        nan_at: int | None = None,
        hang_at: int | None = None,
        before: Callable[[int], None] | None = None,
    ) -> None:
        self.task, self.crash_at, self.nan_at, self.hang_at, self.before = task, crash_at, nan_at, hang_at, before
        self.model, self.order = task.model, _WatchedOrder(task.order, self)
        self.step = -1
        if nan_at is not None:
            self.model.register_forward_hook(self._poison)

    def __getattr__(self, name: str):
        return getattr(self.task, name)  # what else the loop may ask: tokens, flops

    def batch(self, indices, worker: Worker) -> dict:
        if self.step == self.crash_at:
            raise InjectedFault(f"step {self.step}")
        if self.before is not None:
            self.before(self.step)
        if self.step == self.hang_at:
            stuck_for_ever()
        return self.task.batch(indices, worker)

    def validate(self, worker: Worker) -> dict[str, float]:
        return self.task.validate(worker)

    def _poison(self, module, inputs, losses):
        if isinstance(losses, dict) and self.step == self.nan_at:
            return {name: loss * torch.nan for name, loss in losses.items()}
        return None


class _WatchedOrder:
    """The task's order, noting which step is under way."""

    def __init__(self, order, owner: FaultyTask) -> None:
        self.order, self.owner, self.steps_per_epoch = order, owner, order.steps_per_epoch

    def batch(self, step: int):
        self.owner.step = step
        return self.order.batch(step)


def stuck_for_ever() -> None:
    """What a hang looks like: a function that does not return and that a stack should name."""
    while True:
        time.sleep(60)


def truncate(path: Path, fraction: float = 0.5) -> None:
    """Cut a file to a fraction of its length."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])


def flip_byte(path: Path, position: int = -1) -> None:
    """Invert one byte of a file; its size stays."""
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(bytes(data))


def raise_data_error(worker: Worker, context: StageContext, settings: dict) -> None:
    """Worker function that fails with a DataError on the rank `settings["rank"]`; the others wait for it."""
    if worker.rank == settings["rank"]:
        raise DataError("made to fail", where="settings.rank", got=worker.rank, expected="no fault", fix="none")
    worker.barrier()


def exit_once(worker: Worker, context: StageContext, settings: dict) -> None:
    """Worker function whose rank `settings["rank"]` dies the first time; then it writes how many took part.

    `settings["after"]` seconds pass before: Ray does not retry a worker that dies while its group still starts.
    """
    marker = context.scratch / "died"
    if worker.rank == settings["rank"] and not marker.exists():
        time.sleep(settings.get("after", 0))
        marker.touch()
        os._exit(9)
    total = worker.sum(torch.ones(()))
    if worker.is_main:
        write_json(context.out / "total.json", int(total))
