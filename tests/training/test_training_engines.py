"""Engines and world sizes: the same losses and parameters, and checkpoints that load across all of them."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from genrec_dist.config import OptimConfig, RuntimeConfig
from genrec_dist.generator.transformer import checkpoint_activations
from genrec_dist.testing.engine_steps import (
    HALF,
    STEPS,
    continue_from,
    make_task,
    steps_job,
    take_steps,
    train_halves,
    two_worlds_job,
)
from genrec_dist.testing.parity import without_unseen_bias
from genrec_dist.testing.processes import run_processes
from genrec_dist.testing.tiny import tiny_optim
from genrec_dist.testing.tiny_tasks import ENGINES, TASKS, make, sasrec_task
from genrec_dist.training.deepspeed_engine import DeepSpeedEngine, deepspeed_settings
from genrec_dist.training.engine import TorchEngine, autocast, make_engine, make_optimizer
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
            a, b = without_unseen_bias(name, got[name]), without_unseen_bias(name, expected[name])
            torch.testing.assert_close(a, b, atol=3e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


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
    groups = make_optimizer(model.parameters(), tiny_optim(weight_decay=0.3)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert all(p.ndim >= 2 for p in groups[0]["params"])
    assert all(p.ndim < 2 for p in groups[1]["params"])
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_optimizer_by_name():
    model = torch.nn.Linear(2, 2)
    for name, kind in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        assert type(make_optimizer(model.parameters(), tiny_optim(optimizer=name))) is kind


def test_clipping_bounds_the_gradient():
    task = sasrec_task(Worker(), clip_norm=0.01)
    engine = make("torch", task, Worker())
    engine.backward(engine.forward(task.batch(task.order.batch(0), Worker()))["loss"])
    held = [p.grad for p in task.model.parameters()]  # the step lets go of them
    engine.step(1e-3)
    assert float(torch.stack([grad.norm() for grad in held]).norm()) == pytest.approx(0.01, rel=1e-3)


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
    assert dtype("fp16") == torch.float16


@pytest.mark.parametrize("engine", ENGINES)
def test_half_precision_stays_near_single(engine):
    """The same steps with bf16 and fp16 products: other roundings, the same training."""
    losses = {}
    for precision in ("fp32", "bf16", "fp16"):
        task = sasrec_task(Worker(), batch_size=6, precision=precision)
        built = make(engine, task, Worker())
        if built.scale:
            built.scale.value = 64.0  # the usual start overflows first, and leaves these few steps out
        losses[precision] = torch.tensor(take_steps(task, built, Worker(), 0, STEPS))
    assert (losses["fp32"] - losses["fp16"]).abs().max() < 5e-3
    assert (losses["fp32"] - losses["bf16"]).abs().max() < 5e-2
    assert not torch.equal(losses["fp32"], losses["bf16"])


@pytest.mark.parametrize("engine", ENGINES)
def test_an_overflow_of_float16_leaves_the_step_out_and_halves_the_scale(engine):
    task = sasrec_task(Worker(), batch_size=6, precision="fp16")
    built = make(engine, task, Worker())
    built.scale.value = 2.0**126  # beyond float16 with any gradient at all
    before = built.state()
    take_steps(task, built, Worker(), 0, 1)
    after = built.state()
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("model/"))
    assert built.scale.value == 2.0**125
    built.scale.value, built.scale.good, built.scale.interval = 8.0, 0, 2
    take_steps(task, built, Worker(), 1, 3)
    assert built.scale.value == 16.0
    assert any((built.state()[name] != after[name]).any() for name in after if name.startswith("model/"))
    other = make(engine, sasrec_task(Worker(), batch_size=6, precision="fp16"), Worker())
    other.load(built.state())
    assert other.scale.value == 16.0


@pytest.mark.parametrize(("engine", "offload"), [("zero1", "optimizer"), ("zero2", "optimizer"), ("zero3", "all")])
def test_offload_changes_nothing(alone, engine, offload):
    task = make_task("sasrec", Worker())
    built = make(engine, task, Worker(), offload=offload)
    losses = take_steps(task, built, Worker(), 0, HALF)
    half = built.state()
    losses += take_steps(task, built, Worker(), HALF, STEPS)
    check(built.state() | {"losses": torch.tensor(losses)}, alone["sasrec", "torch"][1])
    again = make(engine, make_task("sasrec", Worker()), Worker(), offload=offload)
    again.load(half)
    assert all(torch.equal(again.state()[name], value) for name, value in half.items())


@pytest.mark.parametrize("engine", ["torch", "zero3"])
def test_recomputed_activations_change_nothing(engine):
    ends = []
    for recompute in (False, True):
        task = TASKS["generator"](Worker(), dropout=0.3, batch_size=6)
        calls = count_calls(task.model.decoder[0].self_attention)
        if recompute:
            checkpoint_activations(task.model)
        built = make(engine, task, Worker())
        built.model.train()
        for step in range(3):
            torch.manual_seed(step)
            built.backward(built.forward(task.batch(task.order.batch(step), Worker()))["loss"])
            built.step(1e-2)
        ends.append((built.state(), calls[0]))
    (plain, once), (recomputed, twice) = ends
    assert (once, twice) == (3, 6)
    assert all(torch.equal(plain[name], value) for name, value in recomputed.items())


def count_calls(module: torch.nn.Module) -> list[int]:
    calls = [0]

    def count(*_):
        calls[0] += 1

    module.register_forward_pre_hook(count)
    return calls


def test_any_batch_size_goes_with_any_number_of_workers():
    """DeepSpeed itself insists on a multiple; the loop cuts the batches, so it need not know."""
    for batch_size, world_size in ((7, 2), (1, 4), (8, 2)):
        settings = deepspeed_settings(
            tiny_optim(batch_size=batch_size), Worker(0, world_size), RuntimeConfig(zero_stage=1)
        )
        assert settings["train_micro_batch_size_per_gpu"] >= 1
        assert "train_batch_size" not in settings


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_knows_every_setting(stage):
    """What is generated are settings that DeepSpeed has: its own models refuse unknown keys."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    offload = {0: "none", 3: "all"}.get(stage, "optimizer")
    runtime = RuntimeConfig(zero_stage=stage, offload=offload)
    zero = deepspeed_settings(tiny_optim(), Worker(), runtime)["zero_optimization"]
    assert DeepSpeedZeroConfig(**zero).stage == stage
    with pytest.raises(ValidationError):
        DeepSpeedZeroConfig(**zero, no_such_key=1)


def test_settings_that_contradict_each_other_are_refused():
    for wrong in (
        {"offload": "optimizer"},
        {"offload": "all", "zero_stage": 2},
        {"micro_batches": 3, "num_workers": 2},
        {"deepspeed": {"no_such_key": 1}},
    ):
        with pytest.raises(ValidationError):
            RuntimeConfig(**wrong)


def test_an_engine_of_a_new_world_takes_no_group_of_the_old_one():
    run_processes(two_worlds_job, 1)
