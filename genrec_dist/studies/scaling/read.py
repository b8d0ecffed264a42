"""A trial from its run folder: how the run ended and, once it is finished, what its generator's training recorded.

Reads config.yaml, events.jsonl, provenance.json and metrics.json of the run, and summary.json and curves.jsonl of the
trained generator's artifact; writes nothing, starts nothing, imports no torch. What an artifact of an earlier version
does not record is None or left out, never made up.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from genrec_dist.artifacts.files import read_json, read_jsonl
from genrec_dist.config import Config
from genrec_dist.errors import ConfigError
from genrec_dist.evaluation.metrics import BITS
from genrec_dist.runs import RunFolder
from genrec_dist.studies.scaling.trials import CurvePoint, Trial, TrialState

GONE = {
    "preempted": "preempted, the same command continues it",
    "interrupted": "interrupted",
    "run_restarted": "ended early, its sweep starts it again",
}


def read_trial(run_folder: str | Path, arm: str, depth: int, varied: Sequence[str] = ()) -> Trial:
    """The trial of a run, whatever state it is in.

    Args:
        run_folder: need not exist; the trial is pending then.
        arm: which system.
        depth: layers.
        varied: dotted configuration keys to keep as hyperparameters.

    Raises:
        ConfigError: the run's method has no layers to count, or a key of `varied` does not exist.
    """
    folder = Path(run_folder)
    if not (folder / "config.yaml").is_file():
        return Trial(folder.name, arm, depth, seed=0, state="pending")
    run = RunFolder(folder.parent, folder.name)
    config, provenance = run.config(), _json(folder / "provenance.json")
    state, reason = _state(run.events())
    known: dict[str, Any] = {
        "seed": config.seed,
        "hyperparameters": {key: _setting(config, key) for key in varied},
        "hardware": _hardware(provenance),
        "commit": _commit(provenance),
    }
    title = model_stage(config)
    if state != "finished":
        return Trial(folder.name, arm, depth, state=state, reason=reason, **known)
    artifact = run.artifact(title)
    if not artifact.is_dir():
        lost = f"finished, but its artifact {artifact.parent.name}/{artifact.name} is not in the store beside the runs"
        return Trial(folder.name, arm, depth, state="failed", reason=lost, **known)
    summary, records = _json(artifact / "summary.json"), read_jsonl(artifact / "curves.jsonl")
    best = next((r for r in records if r["split"] == "valid" and r["step"] == summary.get("best_step")), {})
    memory = [r["memory_mib"] for r in records if "memory_mib" in r]
    return Trial(
        folder.name,
        arm,
        depth,
        state=state,
        num_parameters=summary.get("num_parameters", {}),
        train_flops=best.get("flops"),
        bits_per_item=best.get(BITS),
        metrics=_json(folder / "metrics.json").get("main", {}).get("test", {}),
        curve=curve_of(records),
        tokens_per_second=_typical(records, "tokens_per_second"),
        peak_memory_bytes=round(max(memory) * 2**20) if memory else None,
        mfu=_typical(records, "mfu"),
        **known,
    )


def model_stage(config: Config) -> str:
    """Title of the stage that trains what a sweep over layers makes deeper.

    Raises:
        ConfigError: the method trains nothing of the kind.
    """
    titles = {
        "prorec": "generator",
        "csj_id": "gpt",
        "semantic_id": "gpt",
        "sasrec": f"sasrec_{config.sasrec.similarity}",
        "hstu": "hstu",
    }
    if config.method not in titles:
        raise ConfigError(
            "this method has no layers to scale", where="method", got=config.method, expected=f"one of {sorted(titles)}"
        )
    return titles[config.method]


def _state(events: list[dict]) -> tuple[TrialState, str | None]:
    """State of the latest command, and why a trial is not finished."""
    starts = [i for i, event in enumerate(events) if event["event"] == "run_started"]
    latest = events[starts[-1] :] if starts else []
    for event in reversed(latest):
        if event["event"] == "run_finished":
            return "finished", None
        if event["event"] == "run_failed":
            return "failed", (event.get("error") or "no reason was recorded").strip().splitlines()[0]
        if event["event"] in GONE:
            return "pending", GONE[event["event"]]
    process = next((event for event in latest if event["event"] == "process"), None)
    if process is None or _alive(process):
        return ("running", None) if latest else ("pending", None)
    return "pending", "its process is gone, the same command continues it"


def _alive(process: dict) -> bool:
    """Whether a recorded process still runs; on another host it is taken to."""
    if process.get("host") != platform.node():
        return True
    try:
        return abs(psutil.Process(process["pid"]).create_time() - process["created"]) < 1
    except psutil.Error:
        return False


def curve_of(records: list[dict]) -> tuple[CurvePoint, ...]:
    """One point a validation of curves.jsonl; its training loss is the mean over the steps since the one before."""
    points: list[CurvePoint] = []
    at, losses, steps = 0, 0.0, 0
    for record in records:
        if record["split"] == "train":
            if "loss" in record:
                since = record["step"] - at
                losses, steps = losses + record["loss"] * since, steps + since
            at = record["step"]
            continue
        points.append(
            CurvePoint(
                epoch=record["epoch"],
                step=record["step"],
                flops=record.get("flops", 0.0),
                train_loss=losses / steps if steps else None,
                bits_per_item=record.get(BITS),
                metrics={name: value for name, value in record.items() if "@" in name},
            )
        )
        losses, steps = 0.0, 0
    return tuple(points)


def _typical(records: list[dict], name: str) -> float | None:
    values = [record[name] for record in records if record.get(name)]
    return median(values) if values else None


def _setting(config: Config, key: str) -> str | int | float | bool:
    value: Any = config
    for part in key.split("."):
        if not hasattr(value, part):
            raise ConfigError("no such setting", where="varied", got=key, expected="a dotted configuration key")
        value = getattr(value, part)
    return value if isinstance(value, (str, int, float, bool)) else str(value)


def _hardware(provenance: dict) -> str:
    """One line: the GPUs, or the processor where there are none."""
    gpus: list[str] = provenance.get("gpus") or []
    if gpus:
        return ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus))
    cores = provenance.get("cpu_cores")
    return f"{provenance.get('cpu', '')}, {cores} cores" if cores else ""


def _commit(provenance: dict) -> str:
    git = provenance.get("git") or {}
    return git.get("commit", "") + ("-dirty" if git.get("dirty") else "")


def _json(file: Path) -> dict:
    return read_json(file) if file.is_file() else {}
