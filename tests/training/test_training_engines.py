"""Engines and world sizes: the same losses and parameters, and checkpoints that load across all of them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from genrec_dist.config import OptimConfig, RuntimeConfig
from genrec_dist.testing.engine_steps import HALF, STEPS, continue_from, make_task, steps_job, train_halves
from genrec_dist.testing.processes import run_processes
from genrec_dist.testing.tiny import tiny_optim
from genrec_dist.testing.tiny_tasks import ENGINES, TASKS, make, sasrec_task
from genrec_dist.training.engine import (
    DeepSpeedEngine,
    TorchEngine,
    autocast,
    deepspeed_settings,
    make_engine,
    make_optimizer,
)
from genrec_dist.training.worker import Worker

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def alone() -> dict:
    """States of one process under every engine, by (task, engine)."""
    return {(name, kind): train_halves(name, kind, Worker()) for name in TASKS for kind in ENGINES}


@pytest.fixture(scope="module")
def together(alone, tmp_path_factory):
    """Folder with what two processes made, from the start and from the states of one process."""
    folder = tmp_path_factory.mktemp("together")
    for (name, kind), (half, _) in alone.items():
        if kind in ("torch", "zero2"):
            save_file(half, folder / f"alone-{name}-{kind}.safetensors")
    run_processes(steps_job, 2, folder)
    return folder


def check(got: dict, expected: dict, last: int = STEPS) -> None:
    """Same losses, parameters and moments to float32 rounding (Adam enlarges it where a gradient is tiny)."""
    torch.testing.assert_close(got["losses"], expected["losses"][-last:], atol=1e-6, rtol=1e-6)
    assert got.keys() == expected.keys()
    for name in got:
        if name != "losses":
            a, b = without_key_bias(name, got[name]), without_key_bias(name, expected[name])
            torch.testing.assert_close(a, b, atol=3e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def without_key_bias(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The bias of attention keys has gradient zero (softmax does not see it); Adam makes steps of the rounding."""
    return tensor[len(tensor) // 2 :] if name.endswith("key_value.bias") else tensor


def test_the_steps_cross_an_epoch_and_a_batch_of_one():
    for name in TASKS:
        order = make_task(name, Worker()).order
        assert order.steps_per_epoch < STEPS
        assert 1 in {len(order.batch(step)) for step in range(STEPS)}


def test_training_moves(alone):
    for half, end in alone.values():
        assert end["losses"][-1] != end["losses"][0]
        assert (half["step"], end["step"]) == (HALF, STEPS)
        assert all((half[k] != end[k]).any() for k in half if k.startswith("model/"))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_deepspeed_agrees_with_torch(alone, task, engine):
    check(alone[task, engine][1], alone[task, "torch"][1])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_agree_with_one(alone, together, task, engine):
    check(load_file(together / f"{task}-{engine}-end.safetensors"), alone[task, "torch"][1])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("written_by", ["torch", "zero2"])
def test_two_processes_go_on_from_one(alone, together, task, engine, written_by):
    got = load_file(together / f"{task}-{engine}-from-{written_by}.safetensors")
    check(got, alone[task, "torch"][1], last=STEPS - HALF)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("written_by", ENGINES)
def test_one_process_goes_on_from_two(alone, together, task, engine, written_by):
    half = load_file(together / f"{task}-{written_by}-half.safetensors")
    check(continue_from(task, engine, Worker(), half), alone[task, "torch"][1], last=STEPS - HALF)


@pytest.mark.parametrize("engine", ENGINES)
def test_loading_its_own_state_is_exact(alone, engine):
    half, end = alone["sasrec", engine]
    again = continue_from("sasrec", engine, Worker(), half)
    assert torch.equal(again["losses"], end["losses"][HALF:])
    assert all(torch.equal(again[name], end[name]) for name in again if name != "losses")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_state_before_the_first_step_loads(engine):
    first = sasrec_task(Worker())
    state = make(engine, first, Worker()).state()
    second = sasrec_task(Worker())
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.add_(1.0)
    loaded = make(engine, second, Worker())
    loaded.load(state)
    assert all(torch.equal(loaded.state()[name], value) for name, value in state.items())


def test_weight_decay_spares_norms_and_biases():
    model = sasrec_task(Worker()).model
    groups = make_optimizer(model.parameters(), tiny_optim(weight_decay=0.3), torch.device("cpu")).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert all(p.ndim >= 2 for p in groups[0]["params"])
    assert all(p.ndim < 2 for p in groups[1]["params"])
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_optimizer_by_name():
    model = torch.nn.Linear(2, 2)
    for name, kind in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        assert type(make_optimizer(model.parameters(), tiny_optim(optimizer=name), torch.device("cpu"))) is kind


def test_clipping_bounds_the_gradient():
    task = sasrec_task(Worker(), clip_norm=0.01)
    engine = make("torch", task, Worker())
    engine.backward(engine.forward(task.batch(task.order.batch(0), Worker()))["loss"])
    engine.step(1e-3)
    norm = torch.stack([p.grad.norm() for p in task.model.parameters()]).norm()
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


def test_engine_by_configuration():
    def built(**runtime):
        return make_engine(sasrec_task(Worker()).model, tiny_optim(), Worker(), RuntimeConfig(**runtime))

    assert isinstance(built(backend="local"), TorchEngine)
    assert isinstance(built(backend="ray", engine="torch"), TorchEngine)
    assert isinstance(built(backend="local", engine="deepspeed"), DeepSpeedEngine)
    assert built(backend="ray", zero_stage=1).zero_stage == 1


def test_precision_by_configuration():
    def dtype(precision):
        with autocast(OptimConfig(precision=precision), torch.device("cpu")):
            return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

    assert dtype("auto") == dtype("fp32") == torch.float32
    assert dtype("bf16") == torch.bfloat16


def test_any_batch_size_goes_with_any_number_of_workers():
    """DeepSpeed itself insists on a multiple; the loop cuts the batches, so it need not know."""
    for batch_size, world_size in ((7, 2), (1, 4), (8, 2)):
        settings = deepspeed_settings(tiny_optim(batch_size=batch_size), world_size, 1)
        assert settings["train_micro_batch_size_per_gpu"] >= 1
        assert "train_batch_size" not in settings
