"""Captured steps on a GPU: the steps of the plain engine, for every model that is trained by gradients."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from genrec_dist.testing.parity import without_unseen_bias
from genrec_dist.testing.tiny import tiny_optim
from genrec_dist.testing.tiny_tasks import CAPTURED
from genrec_dist.training.averaging import WeightAverage
from genrec_dist.training.engine import TorchEngine
from genrec_dist.training.graphs import GraphEngine
from genrec_dist.training.losses import LossMeter
from genrec_dist.training.schedule import seeding
from genrec_dist.training.worker import Worker

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
STEPS = 24


def run(name: str, kind: type[TorchEngine], ema: bool = False) -> tuple[dict, dict, TorchEngine]:
    """Losses and state after some steps without dropout, and the engine."""
    worker = Worker(device=torch.device("cuda", 0))
    torch.manual_seed(0)
    task = CAPTURED[name](worker, batch_size=6, epochs=50, clip_norm=1.0, precision="fp32")
    engine = kind(task.model, task.config.optim, worker)
    average = WeightAverage(engine, 0.9) if ema else None
    meter = LossMeter(worker)
    meter.start(0, {})
    engine.model.train()
    for step in range(STEPS):
        engine.advance([task.batch(task.order.batch(step), worker)], 1e-3, meter, seeding([worker], 0, step))
        if average is not None:
            average.update(step + 1)
    state = engine.state() | (average.state() if average is not None else {})
    return meter.read(), state, engine


@pytest.mark.parametrize("ema", [False, True], ids=["plain", "average"])
@pytest.mark.parametrize("name", list(CAPTURED))
def test_captured_steps_are_the_plain_ones(name, ema):
    losses, state, _ = run(name, TorchEngine, ema)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got_losses, got, engine = run(name, GraphEngine, ema)
    assert engine.capturing
    assert engine._parts, "no step was captured"
    assert engine._update is not None
    assert got_losses == pytest.approx(losses, rel=1e-4)
    assert got.keys() == state.keys()
    for key, value in state.items():
        a, b = without_unseen_bias(key, got[key]), without_unseen_bias(key, value)
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


class _Waits(nn.Module):
    """A forward that asks the device for a number, which no capture allows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, batch: dict) -> dict:
        return {"loss": self.dropout(self.linear(batch["x"]))[batch["chosen"]].sum()}


def test_a_step_that_cannot_be_captured_runs_on():
    worker = Worker(device=torch.device("cuda", 0))
    engine = GraphEngine(_Waits().to(worker.device), tiny_optim(precision="fp32"), worker)
    meter = LossMeter(worker)
    meter.start(0, {})
    batch = {"x": torch.randn(4, 8, device=worker.device), "chosen": torch.arange(4, device=worker.device) > 1}

    def train() -> None:
        for step in range(10):
            engine.advance([batch], 1e-3, meter, seeding([worker], 0, step))

    with pytest.warns(UserWarning, match="not captured"):
        train()
    assert not engine.capturing
    assert meter.read()
