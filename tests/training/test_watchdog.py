"""A worker that hangs is found, named by its stack, and ended; its group goes on from the last checkpoint."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from genrec_dist.artifacts.files import read_json, read_jsonl
from genrec_dist.errors import EXIT_HUNG
from genrec_dist.testing.faults import stuck_for_ever
from genrec_dist.testing.faulty_training import context_of, train_with_faults
from genrec_dist.training.launch import launch
from genrec_dist.training.watchdog import Watchdog, stacks_file
from genrec_dist.training.worker import Worker

torch.set_num_threads(1)


def events(folder, kind) -> list[dict]:
    return [e for e in read_jsonl(folder / "run" / "events.jsonl") if e["event"] == kind]


class Exit:
    """Stands for os._exit: notes the code."""

    def __init__(self) -> None:
        self.code, self.called = None, threading.Event()

    def __call__(self, code: int) -> None:
        self.code = code
        self.called.set()


def test_silence_after_the_first_step_ends_the_process_and_names_the_function(tmp_path):
    context, leave = context_of(tmp_path, hang_seconds=0.3), Exit()
    stuck = threading.Thread(target=stuck_for_ever, daemon=True)
    stuck.start()
    with Watchdog(context, Worker(), leave=leave) as watchdog:
        assert not leave.called.wait(0.6), "no step is finished yet"
        watchdog.step_done(7)
        watchdog.beat("validation")
        began = time.monotonic()
        assert leave.called.wait(5)
        assert 0.3 < time.monotonic() - began < 3
    (hung,) = events(tmp_path, "worker_hung")
    assert (hung["rank"], hung["step"], hung["phase"]) == (0, 7, "validation")
    assert "stuck_for_ever" in stacks_file(context, 0).read_text()


def test_signs_of_life_keep_it_quiet(tmp_path):
    leave = Exit()
    with Watchdog(context_of(tmp_path, hang_seconds=0.5), Worker(), leave=leave) as watchdog:
        watchdog.step_done(1)
        for _ in range(10):
            time.sleep(0.1)
            watchdog.worker.alive()
    assert leave.code is None
    assert not events(tmp_path, "worker_hung")


def test_zero_seconds_turn_it_off(tmp_path):
    before = threading.active_count()
    with Watchdog(context_of(tmp_path, hang_seconds=0), Worker()) as watchdog:
        watchdog.step_done(1)
        assert threading.active_count() == before


def test_the_worker_it_hands_out_is_equal_and_prints_the_same(tmp_path):
    worker = Worker(1, 2)
    watched = Watchdog(context_of(tmp_path), worker).worker
    assert watched == worker
    assert repr(watched) == repr(worker)


def outcome(folder) -> tuple[int, list[float]]:
    losses = [r["loss"] for r in read_jsonl(folder / "curves.jsonl") if r["split"] == "train"]
    return read_json(folder / "summary.json")["steps"], losses


@pytest.mark.timeout(120)
def test_a_hang_of_one_of_two_processes_is_seen_by_both_and_the_training_ends_as_if_undisturbed(tmp_path):
    launch(train_with_faults, context_of(tmp_path / "calm"), {})
    context = context_of(tmp_path / "hung", num_workers=2, hang_seconds=1.0, max_failures=1)
    launch(train_with_faults, context, {"rank": 1, "hang_at": 5})
    hung = events(tmp_path / "hung", "worker_hung")
    assert {e["rank"] for e in hung} == {0, 1}
    assert all(e["step"] == 5 and 1.0 <= e["seconds"] < 10 for e in hung)
    assert "stuck_for_ever" in stacks_file(context, 1).read_text()
    assert "all_reduce" in stacks_file(context, 0).read_text()
    assert [e["step"] for e in events(tmp_path / "hung", "training_resumed")] == [5]
    (restart,) = events(tmp_path / "hung", "training_restarted")
    assert (restart["cause"], restart["kind"], restart["left"]) == ("worker_hung", "failure", 0)
    steps, losses = zip(*(outcome(tmp_path / name) for name in ("calm", "hung")))
    assert steps[0] == steps[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert EXIT_HUNG not in range(7)
