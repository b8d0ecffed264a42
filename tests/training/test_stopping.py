"""SIGTERM: the training saves at its next step boundary, leaves with code 75, and goes on from there."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

from genrec_dist.artifacts.files import read_json, read_jsonl
from genrec_dist.errors import EXIT_PREEMPTED, Preempted
from genrec_dist.testing.faulty_training import context_of, train_with_faults
from genrec_dist.training.launch import launch
from genrec_dist.training.meter import MEASURED
from genrec_dist.training.stopping import OnSigterm, StopRequest, ask_to_stop, forget_stop, stop_file
from genrec_dist.training.worker import Worker

torch.set_num_threads(1)


def events(folder, kind) -> list[dict]:
    return [e for e in read_jsonl(folder / "run" / "events.jsonl") if e["event"] == kind]


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def handler():
    """What was there before; it must be there after, and must not have been called."""
    calls = []
    old = signal.signal(signal.SIGTERM, lambda *_: calls.append(1))
    now = signal.getsignal(signal.SIGTERM)
    yield calls
    assert signal.getsignal(signal.SIGTERM) is now
    signal.signal(signal.SIGTERM, old)


def test_the_first_sets_a_flag_and_the_second_leaves(tmp_path, handler):
    with pytest.raises(Preempted) as caught, StopRequest(context_of(tmp_path), Worker()) as stop:  # noqa: PT012
        assert not stop.requested()
        sigterm()
        assert stop.requested()
        sigterm()
    assert caught.value.code == EXIT_PREEMPTED
    assert not handler


def test_the_end_of_the_grace_leaves_too(tmp_path):
    began = time.monotonic()
    with pytest.raises(Preempted), StopRequest(context_of(tmp_path, grace_seconds=0.3), Worker()):  # noqa: PT012
        sigterm()
        time.sleep(20)
    assert 0.3 <= time.monotonic() - began < 5


def test_one_that_comes_too_late_for_the_training_reaches_the_next_handler(tmp_path, handler):
    with StopRequest(context_of(tmp_path), Worker()):
        sigterm()
    assert handler


def test_a_signal_to_another_rank_reaches_rank_0_as_the_stop_file(tmp_path):
    context = context_of(tmp_path)
    with pytest.raises(Preempted), StopRequest(context, Worker(1, 2)) as other:  # noqa: PT012
        sigterm()
        with StopRequest(context, Worker(0, 2)) as main:
            assert main.requested()
        assert stop_file(context).exists()
        other.leave(3)
    assert not events(tmp_path, "training_stopped"), "rank 0 records it"
    forget_stop(context)
    with StopRequest(context, Worker()) as stop:
        assert not stop.requested()


def test_outside_the_main_thread_only_the_file_counts(tmp_path, handler):
    context, seen = context_of(tmp_path), []

    def work() -> None:
        with StopRequest(context, Worker()) as stop:
            seen.append(stop.requested())
            time.sleep(0.6)
            ask_to_stop(context)
            seen.append(stop.requested())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False, True]
    with OnSigterm(1.0):
        pass


def summary(folder) -> dict:
    return {k: v for k, v in read_json(folder / "summary.json").items() if k not in MEASURED}


def test_a_plain_training_stops_and_goes_on_where_it_stopped(tmp_path):
    launch(train_with_faults, context_of(tmp_path / "calm"), {})
    context = context_of(tmp_path / "stopped", checkpoint_minutes=0)
    with pytest.raises(Preempted):
        launch(train_with_faults, context, {"kill_at": 4, "signal": signal.SIGTERM})
    assert [e["step"] for e in events(tmp_path / "stopped", "training_stopped")] == [5]
    launch(train_with_faults, context, {})
    assert [e["step"] for e in events(tmp_path / "stopped", "training_resumed")] == [5]
    assert summary(tmp_path / "stopped") == summary(tmp_path / "calm")
    names = [folder / "model.safetensors" for folder in (tmp_path / "calm", tmp_path / "stopped")]
    assert not names[0].exists() or names[0].read_bytes() == names[1].read_bytes()


def signal_at(context, step: int) -> threading.Thread:
    """SIGTERM to this process once the training is at a step."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        file = context.scratch / "at.json"
        while time.monotonic() < deadline and not (file.exists() and read_json(file)["step"] >= step):
            time.sleep(0.02)
        sigterm()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.timeout(120)
def test_two_processes_save_when_their_launcher_gets_sigterm(tmp_path, handler):
    context = context_of(tmp_path, num_workers=2, checkpoint_minutes=0)
    signal_at(context, 4)
    with pytest.raises(Preempted):
        launch(train_with_faults, context, {"seconds": 0.2})
    (stopped,) = events(tmp_path, "training_stopped")
    assert 4 < stopped["step"] < 20
    assert not handler
    launch(train_with_faults, context, {})
    assert [e["step"] for e in events(tmp_path, "training_resumed")] == [stopped["step"]]
    assert summary(tmp_path)["steps"] == 20
    assert not events(tmp_path, "training_restarted")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ray_workers_save_when_the_driver_gets_sigterm(ray_session, tmp_path, handler):
    context = context_of(tmp_path, backend="ray", num_workers=2, checkpoint_minutes=0)
    signal_at(context, 4)
    with pytest.raises(Preempted):
        launch(train_with_faults, context, {"seconds": 0.3})
    (stopped,) = events(tmp_path, "training_stopped")
    assert 4 < stopped["step"] < 20
    assert not handler
    launch(train_with_faults, context, {})
    assert [e["step"] for e in events(tmp_path, "training_resumed")] == [stopped["step"]]
    assert summary(tmp_path)["steps"] == 20
