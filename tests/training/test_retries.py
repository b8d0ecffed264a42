"""Why a group ended, and which budget that costs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from genrec_dist.artifacts.files import read_json, read_jsonl
from genrec_dist.errors import TrainingError
from genrec_dist.testing.faulty_training import context_of, train_with_faults
from genrec_dist.training import attempts
from genrec_dist.training.attempts import Cause, Retries
from genrec_dist.training.launch import launch
from genrec_dist.training.launch_processes import ExitWatch
from genrec_dist.training.watchdog import stacks_file
from genrec_dist.training.worker import Worker

torch.set_num_threads(1)


def events(folder, kind) -> list[dict]:
    return [e for e in read_jsonl(folder / "run" / "events.jsonl") if e["event"] == kind]


def test_budgets_are_separate_and_every_restart_is_an_event(tmp_path):
    retries = Retries(context_of(tmp_path, max_failures=1, max_preemptions=2))
    lost = Cause("node_lost", "gone", {"rank": 1})
    assert [retries.spend(lost), retries.spend(Cause("worker_died", "crash")), retries.spend(lost)] == [True] * 3
    assert not retries.spend(Cause("worker_hung", "silent"))
    assert not retries.spend(lost)
    found = events(tmp_path, "training_restarted")
    assert [(e["cause"], e["kind"], e["attempt"], e["left"], e["error"]) for e in found] == [
        ("node_lost", "preemption", 2, 1, "gone"),
        ("worker_died", "failure", 3, 0, "crash"),
        ("node_lost", "preemption", 4, 0, "gone"),
    ]
    assert found[0]["rank"] == 1


def test_what_an_earlier_and_larger_group_left_is_not_taken_for_this_one(tmp_path):
    context = context_of(tmp_path)
    for rank in range(3):
        attempts.register(Worker(rank, 3), context, f"node-{rank}")
    attempts.register(Worker(0, 2), context, "node-a")
    attempts.register(Worker(1, 2), context, "node-b")
    assert [(r["rank"], r["node"]) for r in attempts.workers(context)] == [(0, "node-a"), (1, "node-b")]
    attempts.note_failure(context, 1, ValueError("first\nlast"))
    assert attempts.failures(context) == {1: "ValueError: last"}
    assert attempts.typed_failure(context) is None
    attempts.prepare(context)
    assert (attempts.workers(context), attempts.failures(context), attempts.hung(context)) == ([], {}, None)


def test_the_process_that_ended_first_is_the_cause():
    with ExitWatch(2) as watch:
        killed = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "spawn_main"])
        other = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(2); raise SystemExit(1)", "spawn_main"]
        )
        time.sleep(0.5)
        assert watch.first() is None
        os.kill(killed.pid, signal.SIGKILL)
        time.sleep(0.3)
        assert watch.first() == (killed.pid, -signal.SIGKILL)
        assert other.wait(10) == 1
        time.sleep(0.2)
        assert watch.first() == (killed.pid, -signal.SIGKILL)
        assert killed.wait(1) == -signal.SIGKILL, "it was only looked at"


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("number", "kind", "cause"),
    [
        (signal.SIGKILL, "failure", "worker_died"),
        pytest.param(signal.SIGTERM, "preemption", "worker_stopped", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_of_two_processes_costs_its_budget(tmp_path, number, kind, cause):
    budgets = {"max_failures": int(kind == "failure"), "max_preemptions": int(kind == "preemption")}
    context = context_of(tmp_path, num_workers=2, **budgets)
    launch(train_with_faults, context, {"rank": 1, "kill_at": 5, "signal": number, "seconds": 0.1})
    (restart,) = events(tmp_path, "training_restarted")
    assert (restart["cause"], restart["kind"], restart["left"]) == (cause, kind, 0)
    if number == signal.SIGKILL:
        assert (restart["rank"], restart["signal"]) == (1, "SIGKILL")
    (resumed,) = events(tmp_path, "training_resumed")
    assert resumed["step"] == 5 if number == signal.SIGKILL else 5 < resumed["step"] < 15
    assert read_json(tmp_path / "summary.json")["steps"] == 20
    assert [e["world_size"] for e in events(tmp_path, "workers_started")] == [2, 2]


@pytest.mark.timeout(120)
def test_a_spent_budget_says_what_happened(tmp_path):
    context = context_of(tmp_path, num_workers=2, max_failures=0)
    with pytest.raises(TrainingError, match="retries exhausted") as caught:
        launch(train_with_faults, context, {"rank": 1, "kill_at": 5})
    assert caught.value.got == "worker_died: died of SIGKILL"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_ray_worker_that_dies_and_one_that_hangs_are_told_apart(ray_session, tmp_path):
    context = context_of(tmp_path, backend="ray", num_workers=2, max_failures=2, max_preemptions=0, hang_seconds=5.0)
    launch(train_with_faults, context, {"rank": 1, "kill_at": 3, "hang_at": 8, "seconds": 0.2})
    found = events(tmp_path, "training_restarted")
    assert [(e["cause"], e["kind"], e["left"]) for e in found] == [
        ("worker_died", "failure", 1),
        ("worker_hung", "failure", 0),
    ]
    assert found[0]["rank"] == 1
    assert "stuck_for_ever" in stacks_file(context, 1).read_text()
    assert [e["step"] for e in events(tmp_path, "training_resumed")] == [3, 8]
    assert read_json(tmp_path / "summary.json")["steps"] == 20
