"""A tiny training as a worker function, with faults at chosen steps of one rank: for tests of launches and restarts."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from genrec_dist.artifacts.files import write_json
from genrec_dist.config import RuntimeConfig
from genrec_dist.pipeline import StageContext
from genrec_dist.testing.faults import FaultyTask
from genrec_dist.testing.tiny_tasks import make, sasrec_task
from genrec_dist.training.loop import train
from genrec_dist.training.worker import Worker


def context_of(folder, **runtime) -> StageContext:
    """Stage context of a tiny training in `folder`, with events beside it; a checkpoint after every step."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"num_threads": 1, "device": "cpu", "checkpoint_minutes": 1e-9, "backend": "local"} | runtime
    return StageContext(folder, {}, RuntimeConfig(**settings), "tiny", "tiny", folder / "run" / "events.jsonl")


def train_with_faults(worker: Worker, context: StageContext, settings: dict) -> None:
    """Worker function: SASRec over 12 users, no dropout; writes summary.json.

    Settings:
        rank: that the faults are for.
        hang_at: step whose batch never comes; once.
        kill_at, signal: step before which the process gets a signal, once.
        seconds: that every step takes.
        epochs: default 4, of 5 steps.
        patience: of the early stop, default as of the task.
    """
    context.event("rank_started", rank=worker.rank, world_size=worker.world_size)
    faults = {name: settings[name] for name in ("hang_at", "kill_at") if name in settings}
    if worker.rank != settings.get("rank", 0):
        faults = {}
    faults = {name: step for name, step in faults.items() if not (context.scratch / f"did-{name}").exists()}

    def before(step: int) -> None:
        time.sleep(settings.get("seconds", 0))
        if worker.is_main:
            write_json(context.scratch / "at.json", {"step": step})
        for name in (name for name, at in faults.items() if at == step):
            (context.scratch / f"did-{name}").touch()
        if step == faults.get("kill_at"):
            os.kill(os.getpid(), settings.get("signal", signal.SIGKILL))

    optim = {name: settings[name] for name in ("patience",) if name in settings}
    task = sasrec_task(worker, epochs=settings.get("epochs", 4), batch_size=4, **optim)
    engine = make("torch", task, worker)
    wrapped: Any = FaultyTask(task, hang_at=faults.get("hang_at"), before=before)
    summary = train(wrapped, engine, task.config.optim, worker, context, seed=1)
    if worker.is_main:
        write_json(context.out / "summary.json", summary | {"world_size": worker.world_size})
