"""The train loop: killed and resumed to the last bit, early stopping, non-finite loss, schedule."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from genrec_dist.artifacts.files import read_jsonl
from genrec_dist.config import RuntimeConfig
from genrec_dist.errors import TrainingError
from genrec_dist.pipeline import StageContext
from genrec_dist.testing.faults import FaultyTask, InjectedFault, truncate
from genrec_dist.testing.tiny import tiny_optim
from genrec_dist.testing.tiny_tasks import TASKS, make, sasrec_task
from genrec_dist.training.loop import train
from genrec_dist.training.meter import MEASURED
from genrec_dist.training.schedule import learning_rate, local_part
from genrec_dist.training.worker import Worker

torch.set_num_threads(1)
EVERY_STEP, EVERY_EPOCH = 1e-9, 0.0  # runtime.checkpoint_minutes


def make_context(folder, checkpoint_minutes=EVERY_STEP) -> StageContext:
    folder.mkdir(exist_ok=True)
    runtime = RuntimeConfig(backend="local", checkpoint_minutes=checkpoint_minutes)
    return StageContext(folder, {}, runtime, events_file=folder / "events.jsonl")


def run(folder, task_name="sasrec", engine="torch", *, minutes=EVERY_STEP, faults=None, **optim):
    """Train once in `folder`; what an earlier call left there is resumed."""
    optim = {"epochs": 3, "batch_size": 5} | optim
    task = TASKS[task_name](Worker(), dropout=0.3, **optim)
    engine = make(engine, task, Worker())
    wrapped = FaultyTask(task, **faults) if faults else task
    summary = train(wrapped, engine, task.config.optim, Worker(), make_context(folder, minutes), seed=1)
    return summary, engine.state()


def outcome(folder, summary, state) -> dict:
    """Everything that must not depend on where a run was killed."""
    curves = [{k: v for k, v in line.items() if k not in MEASURED} for line in read_jsonl(folder / "curves.jsonl")]
    return {
        "summary": {k: v for k, v in summary.items() if k not in MEASURED},
        "curves": curves,
        "model": (folder / "model.safetensors").read_bytes(),
        "state": {name: tensor.numpy().tobytes() for name, tensor in state.items()},
    }


@pytest.mark.parametrize("engine", ["torch", "zero0", "zero1"])
@pytest.mark.parametrize("task", list(TASKS))
def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(tmp_path, engine, task):
    whole = outcome(tmp_path / "whole", *run(tmp_path / "whole", task, engine, epochs=2))
    steps = whole["summary"]["steps"]
    per_epoch = steps // 2
    for crash_at, minutes in ((per_epoch - 1, EVERY_STEP), (per_epoch + 2, EVERY_EPOCH), (steps - 1, EVERY_STEP)):
        folder = tmp_path / f"killed-{crash_at}"
        with pytest.raises(InjectedFault):
            run(folder, task, engine, minutes=minutes, faults={"crash_at": crash_at}, epochs=2)
        assert not (folder / "model.safetensors").exists()
        assert outcome(folder, *run(folder, task, engine, minutes=minutes, epochs=2)) == whole
        resumed = [e["step"] for e in read_jsonl(folder / "events.jsonl") if e["event"] == "training_resumed"]
        assert resumed == [crash_at if minutes == EVERY_STEP else per_epoch]


@pytest.mark.parametrize("minutes", [EVERY_STEP, EVERY_EPOCH])
def test_killed_at_twenty_random_points(tmp_path, minutes):
    """And at the first and the last step, and around the end of an epoch."""
    whole = outcome(tmp_path / "whole", *run(tmp_path / "whole", epochs=8))
    steps = whole["summary"]["steps"]
    drawn = np.random.default_rng(0).choice(steps, 20, replace=False).tolist()
    for crash_at in {*drawn, 0, 1, steps // 8 - 1, steps // 8, steps // 8 + 1, steps - 1}:
        folder = tmp_path / f"killed-{crash_at}"
        with pytest.raises(InjectedFault):
            run(folder, minutes=minutes, faults={"crash_at": crash_at}, epochs=8)
        assert outcome(folder, *run(folder, minutes=minutes, epochs=8)) == whole


def test_killed_again_and_again(tmp_path):
    whole = outcome(tmp_path / "whole", *run(tmp_path / "whole"))
    folder = tmp_path / "killed"
    for crash_at in range(0, whole["summary"]["steps"], 3):
        with pytest.raises(InjectedFault):
            run(folder, minutes=EVERY_EPOCH if crash_at % 2 else EVERY_STEP, faults={"crash_at": crash_at})
    assert outcome(folder, *run(folder)) == whole


def test_killed_between_steps(tmp_path, monkeypatch):
    """A kill while progress is written: the step is done, its checkpoint is not."""
    whole = outcome(tmp_path / "whole", *run(tmp_path / "whole"))
    folder, progress = tmp_path / "killed", StageContext.progress

    def killed(self, done, total, unit, **info):
        progress(self, done, total, unit, **info)
        if done == whole["summary"]["steps"] // 3 + 1:
            raise InjectedFault

    with monkeypatch.context() as patch:
        patch.setattr(StageContext, "progress", killed)
        with pytest.raises(InjectedFault):
            run(folder)
    assert outcome(folder, *run(folder)) == whole


def test_a_truncated_checkpoint_is_named_and_the_one_before_resumed(tmp_path):
    whole = outcome(tmp_path / "whole", *run(tmp_path / "whole"))
    folder = tmp_path / "killed"
    with pytest.raises(InjectedFault):
        run(folder, faults={"crash_at": 6})
    truncate(folder / "scratch" / "checkpoints" / "step-6" / "state.safetensors")
    assert outcome(folder, *run(folder)) == whole
    events = read_jsonl(folder / "events.jsonl")
    assert [e["detail"] for e in events if e["event"] == "checkpoint_skipped"] == [
        "step-6: state.safetensors is missing or truncated"
    ]
    assert [e["step"] for e in events if e["event"] == "training_resumed"] == [5]


def test_a_finished_training_is_not_trained_again(tmp_path):
    first = outcome(tmp_path, *run(tmp_path))
    assert outcome(tmp_path, *run(tmp_path, faults={"crash_at": 0})) == first


class Scripted:
    """A task whose validations are given."""

    def __init__(self, scores: list[float]) -> None:
        self.task = sasrec_task(Worker(), dropout=0.3, epochs=len(scores), batch_size=5, patience=2)
        self.model, self.order, self.batch = self.task.model, self.task.order, self.task.batch
        self.scores, self.calls, self.states = scores, 0, []

    def validate(self, worker: Worker) -> dict[str, float]:
        assert not self.model.training
        self.states.append({name: p.detach().clone() for name, p in self.model.named_parameters()})
        self.calls += 1
        return {"ndcg@10": self.scores[self.calls - 1], "recall@10": 0.5}


def train_scripted(folder, scores: list[float], **optim) -> tuple[Scripted, dict]:
    task = Scripted(scores)
    config = task.task.config.optim.model_copy(update=optim)
    engine = make("torch", task.task, Worker())
    return task, train(task, engine, config, Worker(), make_context(folder, EVERY_EPOCH), seed=0)


def test_early_stopping_keeps_the_best_parameters(tmp_path):
    task, summary = train_scripted(tmp_path, [0.1, 0.3, 0.3, 0.2, 0.9])
    per_epoch = task.order.steps_per_epoch
    assert task.calls == 4  # the third ties, the fourth is worse: patience 2 is spent
    assert summary["stopped_early"]
    assert summary["steps"] == 4 * per_epoch
    assert summary["epochs"] == 4
    assert (summary["best_step"], summary["best_valid_ndcg@10"]) == (2 * per_epoch, 0.3)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == task.states[1].keys()
    assert all(torch.equal(saved[name], value) for name, value in task.states[1].items())
    assert not torch.equal(saved["item.weight"], task.states[3]["item.weight"])
    valid = [r for r in read_jsonl(tmp_path / "curves.jsonl") if r["split"] == "valid"]
    assert [(r["epoch"], r["ndcg@10"]) for r in valid] == [(1, 0.1), (2, 0.3), (3, 0.3), (4, 0.2)]


def test_a_better_validation_refills_the_patience(tmp_path):
    task, summary = train_scripted(tmp_path, [0.1, 0.05, 0.2, 0.1, 0.3])
    assert task.calls == 5
    assert not summary["stopped_early"]
    assert summary["best_step"] == summary["steps"]


def test_a_model_that_never_scores_is_still_saved(tmp_path):
    task, summary = train_scripted(tmp_path, [0.0, 0.0, 0.0, 0.0])
    assert (tmp_path / "model.safetensors").exists()
    assert summary["best_valid_ndcg@10"] == 0.0
    assert task.calls == 3


def test_the_last_step_is_always_validated(tmp_path):
    task, summary = train_scripted(tmp_path, [0.1, 0.2, 0.3], evaluate_every=2)
    assert task.calls == 2  # after epochs 2 and 3
    assert summary["best_step"] == summary["steps"]


@pytest.mark.parametrize("engine", ["torch", "zero0", "zero2", "zero3"])
def test_a_non_finite_loss_stops_before_the_step(tmp_path, engine):
    with pytest.raises(InjectedFault):
        run(tmp_path / "before", engine=engine, faults={"crash_at": 4})
    task = sasrec_task(Worker(), dropout=0.3, epochs=3, batch_size=5)
    model = make(engine, task, Worker())
    with pytest.raises(TrainingError) as caught:
        train(FaultyTask(task, nan_at=4), model, task.config.optim, Worker(), make_context(tmp_path / "nan"), seed=1)
    samples = task.order.batch(4).tolist()
    assert caught.value.where == (
        f"step 4 (epoch {4 / task.order.steps_per_epoch:.2f}), batch of 5 samples: {', '.join(map(str, samples))}"
    )
    named = [e for e in read_jsonl(tmp_path / "nan" / "events.jsonl") if e["event"] == "loss_not_finite"]
    assert [(e["step"], e["samples"]) for e in named] == [(4, samples)]
    assert caught.value.got == "loss = nan"
    before = load_file(tmp_path / "before" / "scratch" / "checkpoints" / "step-4" / "state.safetensors")
    after = model.state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not (tmp_path / "nan" / "model.safetensors").exists()


def test_curves_hold_means_of_finite_numbers(tmp_path):
    summary, _ = run(tmp_path)
    records = read_jsonl(tmp_path / "curves.jsonl")
    train_records = [r for r in records if r["split"] == "train"]
    assert train_records[-1]["step"] == summary["steps"]
    assert all(math.isfinite(r["loss"]) and r["samples_per_second"] > 0 for r in train_records)
    assert len([r for r in records if r["split"] == "valid"]) == 3
    json.dumps(summary, allow_nan=False)


def test_training_learns(tmp_path):
    run(tmp_path, epochs=30, learning_rate=0.01, patience=30)
    losses = [r["loss"] for r in read_jsonl(tmp_path / "curves.jsonl") if r["split"] == "train"]
    assert losses[-1] < 0.8 * losses[0]


def test_parameters_without_a_gradient_survive_a_resume(tmp_path):
    """An item table row or a layer that no loss reaches has no moments to save."""
    task = sasrec_task(Worker(), batch_size=5)
    task.model.unused = torch.nn.Linear(2, 2)
    engine = make("torch", task, Worker())
    losses = engine.forward(task.batch(task.order.batch(0), Worker()))
    engine.backward(losses["loss"])
    engine.step(1e-3)
    other = sasrec_task(Worker(), batch_size=5)
    other.model.unused = torch.nn.Linear(2, 2)
    fresh = make("torch", other, Worker())
    fresh.load(engine.state())
    for name, value in engine.state().items():
        assert torch.equal(fresh.state()[name], value)


def test_learning_rate_by_hand():
    config = tiny_optim(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(config, s, 12) for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = tiny_optim(learning_rate=1.0, warmup_steps=4, schedule="cosine")
    assert [learning_rate(cosine, s, 12) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(cosine, 4, 12) == pytest.approx(1.0)
    assert learning_rate(cosine, 8, 12) == pytest.approx(0.55)  # half way: 0.1 + 0.9 / 2
    assert learning_rate(cosine, 12, 12) == pytest.approx(0.1)
    assert learning_rate(cosine, 99, 12) == pytest.approx(0.1)
    falling = [learning_rate(cosine, s, 100) for s in range(4, 100)]
    assert falling == sorted(falling, reverse=True)


def test_learning_rate_without_warm_up_and_longer_than_the_run():
    assert learning_rate(tiny_optim(learning_rate=0.5, warmup_steps=0), 0, 10) == 0.5
    assert learning_rate(tiny_optim(learning_rate=0.5, warmup_steps=0, schedule="cosine"), 0, 10) == 0.5
    long = tiny_optim(learning_rate=1.0, warmup_steps=100, schedule="cosine")
    assert learning_rate(long, 9, 10) == pytest.approx(0.1)


def test_workers_parts_make_the_whole_batch():
    indices = np.arange(7) * 10
    parts = [local_part(indices, Worker(rank, 3)).tolist() for rank in range(3)]
    assert parts == [[0, 30, 60], [10, 40], [20, 50]]
