"""Packing: round trips, padding tokens that neither arrive nor learn, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec_dist.generator.packing import pack, places, take, unpack
from genrec_dist.testing.tiny import tiny_sequences
from genrec_dist.training.samples import prefix_samples


def masked(lengths: list[int], width: int) -> torch.Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.sampled_from([(), (3,), (2, 3)]))
def test_round_trip(lengths, rest):
    mask = masked(lengths, 5)
    x = torch.randn(len(lengths), 5, *rest)
    row, place = places(mask)
    packed = pack(x, mask)
    assert packed.shape == (sum(lengths), *rest)
    assert torch.equal(packed, take(x, row, place))
    back = unpack(packed, row, place, len(lengths), 5)
    assert torch.equal(back, x * mask.view(*mask.shape, *[1] * len(rest)))
    assert torch.equal(pack(back, mask), packed)


def test_padding_tokens_are_dropped_and_get_no_gradient():
    mask = masked([2, 0, 3], 4)
    row, place = (torch.cat([part, torch.full((3,), fill)]) for part, fill in zip(places(mask), (3, 0)))
    x = torch.randn(8, 2, requires_grad=True)
    out = unpack(x, row, place, 3, 4)
    assert out.shape == (3, 4, 2)
    assert torch.equal(out[mask], x[:5])
    assert (out[~mask] == 0).all()
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    assert torch.equal(x.grad[:5], weight[mask])
    assert (x.grad[5:] == 0).all()
    padded = torch.randn(3, 4, 2, requires_grad=True)
    taken = take(padded, row, place)
    assert torch.equal(taken[:5], padded[mask])
    assert (taken[5:] == 0).all()
    (taken * torch.ones(8, 2)).sum().backward()
    assert torch.equal(padded.grad, mask[..., None].expand(3, 4, 2).float())


@pytest.mark.parametrize("multiple", [1, 16])
def test_gradients_against_finite_differences(multiple):
    mask = masked([2, 0, 3], 4)
    extra = -5 % multiple
    row, place = (torch.cat([part, torch.full((extra,), fill)]) for part, fill in zip(places(mask), (3, 0)))
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unpack(take(x, row, place).tanh(), row, place, 3, 4), x)
    assert torch.autograd.gradcheck(lambda x: unpack(pack(x, mask).tanh(), *places(mask), 3, 4), x)


def test_packed_and_padded_batches_give_the_same_layer():
    """What a packed batch says of its tokens is what `unpack` needs."""
    samples = prefix_samples(tiny_sequences(20, 15), 6, torch.device("cpu"))
    chosen = np.arange(len(samples))[::3]
    padded, packed = samples.gather(chosen, 6), samples.gather_packed(chosen, 16)
    table, layer = torch.randn(15, 4), torch.nn.Linear(4, 3)
    there = unpack(layer(table[packed["tokens"]]), packed["row"], packed["place"], len(chosen), 6)
    torch.testing.assert_close(there, layer(table[padded["history"]]) * padded["mask"][..., None])
