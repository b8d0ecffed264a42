"""Layers with flat parameters: the same numbers as without, and states by the names of the pieces."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from genrec_dist.config import RuntimeConfig
from genrec_dist.errors import ConfigError
from genrec_dist.generator.transformer import CausalLayer, DecoderLayer, EncoderLayer, transformer_layers
from genrec_dist.testing.engine_steps import gather_job
from genrec_dist.testing.processes import run_processes
from genrec_dist.testing.tiny import randomise, tiny_optim
from genrec_dist.testing.tiny_tasks import generator_task
from genrec_dist.training.deepspeed_engine import deepspeed_settings
from genrec_dist.training.engine import model_state
from genrec_dist.training.flat import ALIGNED, FlatLayers
from genrec_dist.training.worker import Worker

DIM = 12
"""No product of it with a small number is a multiple of `ALIGNED`: pieces have room between them."""


class Stack(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = EncoderLayer(DIM, 2, 2, 0.2), DecoderLayer(DIM, 2, 2, 0.2)
        self.causal = nn.ModuleList([CausalLayer(DIM, 2, 2, 0.2)])
        randomise(self, 0.3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        source = sum(self.encoder(x, None, mask))
        y, branch = self.decoder(x, None, source, mask)
        return sum(self.causal[0](y, branch))


def gradients(
    model: Stack, names: FlatLayers | None, low: bool, between=lambda: None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    x, mask = torch.randn(3, 4, DIM), (torch.rand(3, 1, 1, 4) < 0.8).index_fill(3, torch.tensor(0), True)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        out = model(x, mask)
    between()
    out.float().square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return out.detach(), names.split(found) if names else found


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("resharded", [False, True])
def test_flat_layers_compute_what_layers_compute(resharded, recomputes, low):
    plain, flat = Stack(), Stack()
    for layer in (*transformer_layers(plain).values(), *transformer_layers(flat).values()):
        layer.recomputes = recomputes
    names = FlatLayers(transformer_layers(flat), resharded)
    assert len(list(flat.parameters())) == 2 * 3
    (out, expected), (got, found) = gradients(plain, None, low), gradients(flat, names, low)
    assert torch.equal(out, got)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("low", [False, True])
def test_the_backward_pass_takes_the_weights_that_were_brought_back(low):
    """What lay in the old memory is gone by then: NaN here."""
    plain, flat = Stack(), Stack()
    names = FlatLayers(transformer_layers(flat), resharded=True)

    def bring_back() -> None:
        for p in flat.parameters():
            old, p.data = p.data, p.data.clone()
            old.fill_(float("nan"))

    _, expected = gradients(plain, None, low)
    _, found = gradients(flat, names, low, bring_back)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_weights_are_in_place_while_they_are_shown():
    plain, flat = Stack(), Stack()
    names = FlatLayers(transformer_layers(flat), resharded=False)
    assert flat.encoder.ffn[0].weight is None
    with names.shown():
        assert torch.equal(flat.encoder.ffn[0].weight, plain.encoder.ffn[0].weight)
        assert torch.equal(flat.causal[0].attention.out.bias, plain.causal[0].attention.out.bias)
        with torch.no_grad():
            flat.causal[0](torch.ones(1, 2, DIM), None)
        assert torch.equal(flat.causal[0].attention.out.bias, plain.causal[0].attention.out.bias)
        key, _ = flat.decoder.cross_attention.project(torch.ones(1, 2, DIM))
    assert torch.equal(key, plain.decoder.cross_attention.project(torch.ones(1, 2, DIM))[0])
    assert flat.encoder.ffn[0].weight is None


def test_dropout_stops_in_evaluation():
    flat = Stack()
    FlatLayers(transformer_layers(flat), resharded=False)
    x = torch.randn(2, 3, DIM)
    flat.eval()
    assert torch.equal(flat(x, None), flat(x, None))
    flat.train()
    assert not torch.equal(flat(x, None), flat(x, None))


def test_states_go_by_the_names_of_the_weights():
    plain, flat = Stack(), Stack()
    names = FlatLayers(transformer_layers(flat), resharded=False)
    state = {f"model/{name}": value for name, value in model_state(plain).items()} | {"step": torch.tensor(3.0)}
    joined = names.join(copy.copy(state))
    assert joined.keys() == {f"model/{name}" for name, _ in flat.named_parameters()} | {"step"}
    assert all(torch.equal(joined[f"model/{name}"], p) for name, p in flat.named_parameters())
    assert any(p.numel() > sum(piece.shape.numel() for piece in pieces) for p, pieces in parts(flat, names))
    assert all(piece.room % ALIGNED == 0 for _, pieces in parts(flat, names) for piece in pieces)
    again = names.split(joined)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], value) for name, value in state.items())


def test_a_weight_without_a_moment_gets_zeros():
    flat = Stack()
    names = FlatLayers(transformer_layers(flat), resharded=False)
    moments = {"exp_avg/encoder.ffn.0.weight": torch.ones(2 * DIM, DIM)}
    found = names.split(names.join(moments))
    assert torch.equal(found.pop("exp_avg/encoder.ffn.0.weight"), torch.ones(2 * DIM, DIM))
    assert found
    assert not any(value.any() for value in found.values())


def parts(model: Stack, names: FlatLayers):
    for flat in names.layers.values():
        for kind, pieces in flat.groups.items():
            yield flat.parameter(kind), pieces


def test_half_gathers_are_for_half_products():
    runtime = RuntimeConfig(zero_stage=3, deepspeed={"gather_dtype": "bf16"})
    assert "torch_autocast" in deepspeed_settings(tiny_optim(precision="bf16"), Worker(), runtime)
    with pytest.raises(ConfigError, match="gather_dtype"):
        deepspeed_settings(tiny_optim(precision="fp32"), Worker(), runtime)


@pytest.mark.slow
def test_half_gathers_change_no_product(tmp_path):
    """Weights are rounded before they travel, not behind it; gradients of two workers are added in half precision."""
    run_processes(gather_job, 2, tmp_path)
    losses = {dtype: load_file(tmp_path / f"{dtype}.safetensors")["losses"] for dtype in ("fp32", "bf16")}
    assert torch.equal(losses["fp32"][0], losses["bf16"][0])
    assert 0 < (losses["fp32"] - losses["bf16"]).abs().max() < 2e-2


def test_the_generator_has_only_flat_layers():
    model = generator_task(Worker()).model
    count = len(model.encoder) + len(model.decoder)
    before = sum(p.numel() for p in model.parameters())
    names = FlatLayers(transformer_layers(model), resharded=True)
    assert len(names.layers) == count
    assert sum(p.numel() for p in model.parameters()) >= before
