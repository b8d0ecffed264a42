"""Moving average of the weights: by hand, the same under every engine, part of checkpoints, what a training keeps."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from genrec_dist.artifacts.files import read_jsonl
from genrec_dist.config import RuntimeConfig
from genrec_dist.pipeline import StageContext
from genrec_dist.testing.faults import FaultyTask, InjectedFault
from genrec_dist.testing.parity import without_unseen_bias
from genrec_dist.testing.tiny_tasks import ENGINES, TASKS, make
from genrec_dist.training.averaging import PREFIX, WeightAverage
from genrec_dist.training.deepspeed_engine import DeepSpeedEngine
from genrec_dist.training.loop import train
from genrec_dist.training.losses import LossMeter
from genrec_dist.training.worker import Worker

torch.set_num_threads(1)
STEPS = 4


def begun(kind: str, task_name: str = "sasrec"):
    task = TASKS[task_name](Worker(), batch_size=5)
    engine = make(kind, task, Worker())
    meter = LossMeter(Worker())
    meter.start(0, {})

    def step(number: int) -> None:
        engine.advance([task.batch(task.order.batch(number), Worker())], 0.05, meter, lambda part: None)

    return engine, step


@pytest.mark.parametrize("kind", ENGINES)
def test_the_average_by_hand(kind):
    engine, step = begun(kind)
    average, expected = WeightAverage(engine, 0.25), engine.best()
    for number in range(STEPS):
        step(number)
        average.update(number + 1)
        share = 1 - min(0.25, (2 + number) / (11 + number))
        now = engine.best()
        expected = {name: old + share * (now[name] - old) for name, old in expected.items()}
    weights = engine.best()
    with average.applied():
        for name, value in engine.best().items():
            torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)
        with engine.whole():  # what a validation reads
            read = {name: p.detach().cpu() for name, p in engine.model.named_parameters()}
            read = engine.flat.split(read) if isinstance(engine, DeepSpeedEngine) else read
            assert read.keys() == expected.keys()
            for name, value in read.items():
                torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)
    for name, value in engine.best().items():  # training goes on with the weights, to the last bit
        assert torch.equal(value, weights[name]), name
        assert not torch.equal(value, expected[name]), name


@pytest.mark.parametrize(("writer", "reader"), [("torch", "zero3"), ("zero3", "zero1"), ("zero1", "torch")])
def test_an_average_goes_from_engine_to_engine(writer, reader):
    engine, step = begun(writer)
    average = WeightAverage(engine, 0.9)
    for number in range(2):
        step(number)
        average.update(number + 1)
    kept = engine.state() | average.state()
    assert {name for name in kept if name.startswith(PREFIX)} == {PREFIX + name for name in engine.best()}
    other, go_on = begun(reader)
    again = WeightAverage(other, 0.9)
    again.load(kept)
    for steps, mean in ((step, average), (go_on, again)):
        steps(2)
        mean.update(3)
    for name, value in (other.state() | again.state()).items():
        expected = (engine.state() | average.state())[name]
        got, expected = without_unseen_bias(name, value), without_unseen_bias(name, expected)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def run(folder, kind: str, crash_at: int | None = None):
    folder.mkdir(exist_ok=True)
    task = TASKS["generator"](Worker(), dropout=0.3, epochs=2, batch_size=9, ema_decay=0.8)
    engine = make(kind, task, Worker())
    context = StageContext(folder, {}, RuntimeConfig(backend="local", checkpoint_minutes=1e-9))
    return train(FaultyTask(task, crash_at=crash_at), engine, task.config.optim, Worker(), context, seed=1), engine


@pytest.mark.parametrize("kind", ["torch", "zero3"])
def test_a_training_keeps_the_average_and_resumes_it_to_the_last_bit(tmp_path, kind):
    summary, engine = run(tmp_path / "whole", kind)
    crash_at = summary["steps"] // 2 + 1
    with pytest.raises(InjectedFault):
        run(tmp_path / "killed", kind, crash_at)
    run(tmp_path / "killed", kind)
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    valid = [line for line in read_jsonl(tmp_path / "whole" / "curves.jsonl") if line["split"] == "valid"]
    assert valid == [line for line in read_jsonl(tmp_path / "killed" / "curves.jsonl") if line["split"] == "valid"]
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert any(not torch.equal(whole[name], value) for name, value in engine.best().items())
