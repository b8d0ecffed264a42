"""SIGTERM to `genrec run` in the middle of a training: code 75, and the same command goes on at that very step."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from test_kill_and_resume import TINY, finish, results, start

from genrec_dist.artifacts.files import read_jsonl

pytestmark = pytest.mark.slow
LONG = TINY | {
    "method": "sasrec",
    "sasrec": {
        "dim": 16,
        "optim": {"epochs": 25, "batch_size": 32, "warmup_steps": 5, "patience": 25, "evaluate_every": 5},
    },
}


def events(folder: Path, kind: str) -> list[dict]:
    return [e for e in read_jsonl(folder / "runs" / "tiny" / "events.jsonl") if e["event"] == kind]


def preempt(folder: Path, config: dict, signals: int = 1) -> float:
    """Start the run and send SIGTERM once its training has a checkpoint; seconds until it ended."""
    process = start(folder, config)
    deadline = time.monotonic() + 180
    pattern = "store/*/*.building/scratch/checkpoints/step-*/checkpoint.json"
    while time.monotonic() < deadline and process.poll() is None and not list(folder.glob(pattern)):
        time.sleep(0.02)
    began = time.monotonic()
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "preempted by SIGTERM" in output
    (last,) = events(folder, "preempted")
    assert last["exit_code"] == 75
    return time.monotonic() - began


def check_resumes(folder: Path, config: dict) -> None:
    """The same command goes on at the step of the stop, and ends."""
    (stopped,) = events(folder, "training_stopped")
    finish(start(folder, config))
    assert [e["step"] for e in events(folder, "training_resumed")] == [stopped["step"]]


def test_one_plain_process(tmp_path: Path) -> None:
    finish(start(tmp_path / "calm", LONG))
    preempt(tmp_path / "stopped", LONG)
    check_resumes(tmp_path / "stopped", LONG)
    assert results(tmp_path / "stopped", "tiny") == results(tmp_path / "calm", "tiny")


@pytest.mark.parametrize("backend", ["local", "ray"])
def test_two_workers(tmp_path: Path, backend: str) -> None:
    config = {**LONG, "runtime": {**TINY["runtime"], "backend": backend, "num_workers": 2, "checkpoint_minutes": 0}}
    preempt(tmp_path, config)
    check_resumes(tmp_path, config)


def test_a_second_signal_does_not_wait_for_the_workers(tmp_path: Path) -> None:
    config = {**LONG, "runtime": {**TINY["runtime"], "backend": "ray", "num_workers": 2}}
    assert preempt(tmp_path, config, signals=2) < 60
