"""Attention of short sequences on a GPU against PyTorch's, forward and gradients."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from genrec_dist.generator.attention_triton import short_attention  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def material(queries: int, keys: int, width: int, dtype=torch.float32, batch: int = 3, heads: int = 2):
    """Queries, and keys with values, as the layers make them; a mask that leaves one, half or all keys."""
    torch.manual_seed(queries * 1000 + keys)
    query = torch.randn(batch, queries, heads, width, device=DEVICE, dtype=dtype).transpose(1, 2)
    both = torch.randn(batch, keys, 2, heads, width, device=DEVICE, dtype=dtype)
    mask = torch.arange(keys, device=DEVICE) < torch.tensor([keys, max(keys // 2, 1), 1], device=DEVICE)[:, None]
    return [x.detach().requires_grad_() for x in (query, both)] + [mask]


def reference(query, both, mask, causal):
    key, value = both.permute(2, 0, 3, 1, 4)
    length, total = query.shape[2], key.shape[2]
    keep = torch.ones(len(query), 1, length, total, dtype=torch.bool, device=DEVICE)
    if mask is not None:
        keep = keep & mask[:, None, None]
    if causal:
        keep = keep & torch.ones(length, total, dtype=torch.bool, device=DEVICE).tril(total - length)
    return F.scaled_dot_product_attention(query.double(), key.double(), value.double(), attn_mask=keep).transpose(1, 2)


@pytest.mark.parametrize(
    ("queries", "keys", "width"), [(6, 20, 32), (20, 20, 16), (5, 5, 64), (1, 17, 32), (33, 40, 16)]
)
@pytest.mark.parametrize(("masked", "causal"), [(True, False), (False, True), (True, True), (False, False)])
def test_forward_and_gradients(queries, keys, width, masked, causal):
    query, both, mask = material(queries, keys, width)
    if causal and masked:
        mask = torch.ones_like(mask)
        mask[1, -1] = keys - queries > 0 or keys == 1  # every query still sees a key
        mask[1, 0] = True
    mask = mask if masked else None
    found = short_attention(query, both, mask, causal, 0.0)
    expected = reference(query, both, mask, causal)
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-4)
    grad = torch.randn_like(found)
    got = torch.autograd.grad(found, (query, both), grad)
    wanted = torch.autograd.grad(expected, (query, both), grad.double())
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-3)


def test_a_row_without_keys_is_zero():
    query, both, mask = material(4, 8, 16)
    mask[2] = False
    found = short_attention(query, both, mask, False, 0.0)
    assert (found[2] == 0).all()
    found.sum().backward()
    assert all(torch.isfinite(x.grad).all() and (x.grad[2] == 0).all() for x in (query, both))


def test_dropout_keeps_the_mean_and_comes_again_with_the_seed():
    query, both, _ = material(16, 20, 32, batch=64 if not INTERPRETED else 4)
    both.data[:, :, 1] = 1.0  # so every output is the sum of the kept weights
    torch.manual_seed(1)
    first = short_attention(query, both, None, False, 0.3)
    torch.manual_seed(1)
    again = short_attention(query, both, None, False, 0.3)
    other = short_attention(query, both, None, False, 0.3)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert abs(float(first.detach().mean()) - 1.0) < (0.05 if not INTERPRETED else 0.2)
    assert (first - 1.0).abs().max() > 0.1


def test_gradients_go_through_the_dropout_that_was_drawn():
    """The function is linear in the values: its gradient with the same draw gives the output back."""
    query, both, _ = material(6, 20, 32)
    torch.manual_seed(1)
    found = short_attention(query, both, None, False, 0.5)
    (to_both,) = torch.autograd.grad(found.sum(), both, retain_graph=True)
    assert float((to_both * both)[:, :, 1].sum()) == pytest.approx(float(found.sum()), rel=1e-4)
    step = 1e-2 * torch.randn_like(query)
    torch.manual_seed(1)
    ahead = short_attention(query + step, both, None, False, 0.5).sum()
    torch.manual_seed(1)
    behind = short_attention(query - step, both, None, False, 0.5).sum()
    (to_query,) = torch.autograd.grad(found.sum(), query)
    assert float((to_query * step).sum()) == pytest.approx(float(ahead - behind) / 2, rel=2e-2, abs=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="bfloat16 products need a GPU")
def test_bfloat16_is_near():
    query, both, mask = material(6, 20, 64, torch.bfloat16)
    found = short_attention(query, both, mask, False, 0.0)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), reference(query, both, mask, False), atol=2e-2, rtol=2e-2)
