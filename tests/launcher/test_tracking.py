"""Trackers beside a run: what reaches them, once; their failures never reach the run."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from genrec_dist.artifacts.files import append_jsonl
from genrec_dist.config import build_config
from genrec_dist.errors import ConfigError
from genrec_dist.pipeline import Stage
from genrec_dist.runs import RunFolder
from launcher import trackers, tracking
from launcher.trackers import check_tracking, make_trackers
from launcher.tracking import Tracking

STAGE = Stage("generator", 1, {}, {}, lambda context: None)


class Recorder:
    name = "recorder"

    def __init__(self, fail_at: int | None = None, block: threading.Event | None = None) -> None:
        self.got, self.fail_at, self.block, self.closed = [], fail_at, block, None

    def log(self, stage, step, scalars):
        if self.block is not None:
            self.block.wait(30)
        if step == self.fail_at:
            raise ConnectionError("no route\nto host")
        self.got.append((stage, step, scalars))

    def close(self, finished):
        self.closed = finished


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path, "r")


def follow(run: RunFolder, folder: Path, *made, records=(), error: Exception | None = None) -> None:
    """A run whose only stage leaves these records."""
    folder.mkdir(parents=True, exist_ok=True)
    with Tracking(build_config({}), run, lambda config, path, warn: made) as found:
        for record in records:
            append_jsonl(folder / "curves.jsonl", record)
        found.on_stage(STAGE, "building", folder)
        if error is not None:
            raise error


def train(step: int, **more) -> dict:
    return {"split": "train", "step": step, "loss": 1 / step} | more


def test_every_record_arrives_once_also_after_a_restart_from_a_checkpoint(run, tmp_path):
    first, second = Recorder(), Recorder()
    follow(run, tmp_path / "a", first, records=[train(10), train(20), {"split": "valid", "step": 20, "ndcg@10": 0.1}])
    assert first.got == [
        ("generator", 10, {"train/loss": 0.1}),
        ("generator", 20, {"train/loss": 0.05}),
        ("generator", 20, {"valid/ndcg@10": 0.1}),
    ]
    assert first.closed is True
    follow(run, tmp_path / "b", second, records=[train(10), train(20), train(30, note="x", flag=True)])
    assert second.got == [("generator", 30, {"train/loss": 1 / 30})]


def test_a_tracker_that_fails_is_dropped_with_an_event_and_a_warning(run, tmp_path):
    said, bad, good = [], Recorder(fail_at=2), Recorder()
    run.say = said.append
    follow(run, tmp_path / "a", bad, good, records=[train(1), train(2), train(3)])
    assert [step for _, step, _ in bad.got] == [1]
    assert [step for _, step, _ in good.got] == [1, 2, 3]
    events = [event for event in run.events() if event["event"] == "tracker_failed"]
    assert [(event["tracker"], event["error"]) for event in events] == [("recorder", "ConnectionError: no route")]
    assert len(said) == 1
    assert bad.closed is None
    assert good.closed is True


def test_a_tracker_that_blocks_is_left_behind(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.2)
    gate = threading.Event()
    stuck = Recorder(block=gate)
    follow(run, tmp_path / "a", stuck, records=[train(1)])
    assert stuck.got == []
    assert [event["event"] for event in run.events()] == ["tracker_failed"]
    gate.set()


def test_trackers_know_that_the_run_failed(run, tmp_path):
    recorder = Recorder()
    with pytest.raises(ZeroDivisionError):
        follow(run, tmp_path / "a", recorder, records=[train(1)], error=ZeroDivisionError())
    assert recorder.closed is False


def test_a_tracker_that_cannot_start_is_told_and_left_out(tmp_path, monkeypatch):
    def broken(config, run):
        raise OSError("no home")

    monkeypatch.setattr(trackers, "MlFlow", broken)
    config, warned = build_config({"tracking": {"mlflow": "file:x"}}), []
    made = make_trackers(config, tmp_path, lambda name, error: warned.append((name, str(error))))
    assert [tracker.name for tracker in made] == ["tensorboard"]
    assert warned == [("mlflow", "no home")]


def test_a_tracker_whose_package_is_missing_is_refused_before_the_run(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_tracking(build_config({}).tracking)
    for key, value in (("mlflow", "file:x"), ("wandb", "project")):
        with pytest.raises(ConfigError, match=rf"tracking\.{key}") as caught:
            check_tracking(build_config({"tracking": {key: value}}).tracking)
        assert "genrec_dist[tracking]" in caught.value.fix


def test_tensorboard_reads_what_was_written(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = build_config({})
    (tmp_path / "a").mkdir()
    for record in (train(1), train(2)):
        append_jsonl(tmp_path / "a" / "curves.jsonl", record)
    with Tracking(config, run) as found:
        found.on_stage(STAGE, "building", tmp_path / "a")
    events = EventAccumulator(str(run.path / "tensorboard" / "generator")).Reload()
    assert [(s.step, s.value) for s in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]


def test_mlflow_keeps_one_run_over_two_calls(run, tmp_path):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    uri = f"file:{tmp_path / 'mlruns'}"
    config = build_config({"name": "r", "tracking": {"tensorboard": False, "mlflow": uri}})
    for step in (1, 2):
        (tmp_path / "a").mkdir(exist_ok=True)
        append_jsonl(tmp_path / "a" / "curves.jsonl", train(step))
        with Tracking(config, run) as found:
            found.on_stage(STAGE, "building", tmp_path / "a")
    client = MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("genrec").experiment_id])
    assert [one.info.status for one in runs] == ["FINISHED"]
    history = client.get_metric_history(runs[0].info.run_id, "generator/train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 0.5)]


def test_wandb_offline_writes_into_the_run_folder(run, tmp_path):
    pytest.importorskip("wandb")
    config = build_config({"name": "r", "tracking": {"tensorboard": False, "wandb": "p", "offline": True}})
    (tmp_path / "a").mkdir()
    append_jsonl(tmp_path / "a" / "curves.jsonl", train(1))
    with Tracking(config, run) as found:
        found.on_stage(STAGE, "building", tmp_path / "a")
    assert list((run.path / "tracking").rglob("*.wandb"))
    assert not [event for event in run.events() if event["event"] == "tracker_failed"]
