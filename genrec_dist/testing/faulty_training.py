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
    """
    faulty = worker.rank == settings.get("rank", 0)
    context.event("rank_started", rank=worker.rank, world_size=worker.world_size)

    def once(name: str) -> bool:
        marker = context.scratch / f"did-{name}"
        new = faulty and name in settings and not marker.exists()
        if new:
            marker.touch()
        return new

    kill_at = settings["kill_at"] if once("kill_at") else None

    def before(step: int) -> None:
        time.sleep(settings.get("seconds", 0))
        if worker.is_main:
            write_json(context.scratch / "at.json", {"step": step})
        if step == kill_at:
            os.kill(os.getpid(), settings.get("signal", signal.SIGKILL))

    task = sasrec_task(worker, epochs=settings.get("epochs", 4), batch_size=4)
    hang_at = settings["hang_at"] if once("hang_at") else None
    engine = make("torch", task, worker)
    wrapped: Any = FaultyTask(task, hang_at=hang_at, before=before)
    summary = train(wrapped, engine, task.config.optim, worker, context, seed=1)
    if worker.is_main:
        write_json(context.out / "summary.json", summary | {"world_size": worker.world_size})
