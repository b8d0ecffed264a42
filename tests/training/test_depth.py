"""32 layers: the first steps of every model that a sweep over layers makes deeper, and what the scaled start does."""

from __future__ import annotations

import math

import pytest
import torch

from genrec_dist.baselines.hstu_stage import HstuTask
from genrec_dist.baselines.sasrec import SasrecTask
from genrec_dist.config import HstuConfig, SasrecConfig
from genrec_dist.generator.gpt_stage import GptTask
from genrec_dist.generator.stage import GeneratorTask
from genrec_dist.generator.transformer import Layer
from genrec_dist.testing.tiny import tiny_generator, tiny_gpt, tiny_optim, tiny_sequences, tiny_trie
from genrec_dist.training.engine import TorchEngine
from genrec_dist.training.worker import Worker

torch.set_num_threads(1)
NUM_ITEMS, DEPTH, STEPS = 20, 32, 6
SETTINGS = {"seed": 0, "validation_beam": 10, "validation_users": 0, "mix_weight": 0.0}


def make_task(kind: str, depth: int, init: str, precision: str = "fp32"):
    """A tiny task whose model has its own start."""
    common = {"init": init, "dropout": 0.1, "max_history": 4, "optim": tiny_optim(batch_size=64, precision=precision)}
    sequences, trie = tiny_sequences(20, NUM_ITEMS, shortest=6), tiny_trie(NUM_ITEMS, 4, seed=1)
    if kind == "generator":
        both = {"num_encoder_layers": min(depth, 4), "num_decoder_layers": depth}
        return GeneratorTask(tiny_generator(trie, spread=0, **both, **common), sequences, Worker(), SETTINGS)
    if kind == "gpt":
        return GptTask(tiny_gpt(trie, spread=0, num_layers=depth, **common), sequences, Worker(), SETTINGS)
    section, task = {"sasrec": (SasrecConfig, SasrecTask), "hstu": (HstuConfig, HstuTask)}[kind]
    return task(section(dim=8, num_heads=2, num_layers=depth, **common), sequences, Worker(), 0, 0)


KINDS = ("generator", "gpt", "sasrec", "hstu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("init", "precision"), [("plain", "fp32"), pytest.param("depth_scaled", "bf16", marks=pytest.mark.slow)]
)
def test_the_first_steps_of_32_layers_are_finite_and_learn(kind, init, precision):
    task = make_task(kind, DEPTH, init, precision)
    engine = TorchEngine(task.model, task.config.optim, Worker())
    engine.model.train()
    losses = []
    for _ in range(STEPS):
        torch.manual_seed(0)
        loss = engine.forward(task.batch(task.order.batch(0), Worker()))["loss"]
        engine.backward(loss)
        assert all(torch.isfinite(p.grad).all() for p in engine.parameters if p.grad is not None)
        engine.step(2e-3)
        losses.append(float(loss.detach()))
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]


def outputs(model: torch.nn.Module) -> list[torch.Tensor]:
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    return [out.weight for layer in layers for out in layer.residual_outputs]


@pytest.mark.parametrize(("kind", "branches"), [("gpt", 2), ("sasrec", 2), ("hstu", 1)])
def test_scaled_start_divides_the_outputs_of_branches_alone(kind, branches):
    plain, scaled = (make_task(kind, 8, init).model for init in ("plain", "depth_scaled"))
    for a, b in zip(outputs(plain), outputs(scaled), strict=True):
        torch.testing.assert_close(b, a / math.sqrt(8 * branches))
    changed = {id(weight) for weight in outputs(scaled)}
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert id(b) in changed or torch.equal(a, b)


def test_encoder_and_decoder_are_scaled_by_their_own_number_of_branches():
    plain, scaled = (make_task("generator", 3, init).model for init in ("plain", "depth_scaled"))
    for stack, count in (("encoder", 3 * 2), ("decoder", 3 * 3)):
        pairs = zip(outputs(getattr(plain, stack)), outputs(getattr(scaled, stack)), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(b, a / math.sqrt(count))
