"""A training that changes its number of workers and its ZeRO stage on the way: material of the resume tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from genrec_dist.artifacts.files import append_jsonl, write_json
from genrec_dist.config import RuntimeConfig
from genrec_dist.pipeline import StageContext
from genrec_dist.testing.faults import FaultyTask, InjectedFault
from genrec_dist.testing.tiny_tasks import TASKS, make
from genrec_dist.training.loop import train
from genrec_dist.training.worker import Worker

PARTS = 4


@dataclass(frozen=True)
class Phase:
    """One stretch of a training.

    Args:
        world_size: processes.
        engine: name as in `tiny_tasks.make`.
        crash_at: step that kills it; None: it runs to its end.
    """

    world_size: int
    engine: str
    crash_at: int | None = None


class _Recorded(FaultyTask):
    """Notes the samples that this worker takes, step by step."""

    def __init__(self, task, file: Path, crash_at: int | None) -> None:
        super().__init__(task, crash_at=crash_at)
        self.file = file

    def batch(self, indices, worker: Worker) -> dict:
        batch = super().batch(indices, worker)
        taken = indices[worker.rank :: worker.world_size]
        append_jsonl(self.file, {"step": self.step, "samples": taken.tolist()})
        return batch


def phase_job(worker: Worker, folder: Path, task_name: str, phase: Phase, dropout: float) -> None:
    """One process of a phase: train from what is in `folder` until the phase's end or the training's.

    Every worker notes its samples in `samples-<world size>-<rank>.jsonl`; worker 0 writes end.safetensors (the whole
    state) and summary.json where the training ends.
    """
    task = TASKS[task_name](worker, dropout=dropout, epochs=3, batch_size=9, weight_decay=0.1)
    engine = make(phase.engine, task, worker)
    recorded: Any = _Recorded(task, folder / f"samples-{phase.world_size}-{worker.rank}.jsonl", phase.crash_at)
    runtime = RuntimeConfig(
        backend="local", num_workers=worker.world_size, micro_batches=PARTS, checkpoint_minutes=1e-9
    )
    context = StageContext(folder, {}, runtime, events_file=folder / "events.jsonl")
    try:
        summary = train(recorded, engine, task.config.optim, worker, context, seed=3)
    except InjectedFault:
        return
    state = engine.state()
    if worker.is_main:
        save_file(state, folder / "end.safetensors")
        write_json(folder / "summary.json", summary)
