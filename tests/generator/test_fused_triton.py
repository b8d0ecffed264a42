"""Residual sum with norm, and activation with dropout, on a GPU against PyTorch's."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from genrec_dist.generator.fused_triton import add_norm, gelu_dropout  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).requires_grad_()


@pytest.mark.parametrize("shape", [(3, 7, 32), (5, 1, 128), (2, 40, 100), (2, 3, 1024)])
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("carries", [True, False])
def test_add_norm(shape, adds, carries):
    torch.manual_seed(0)
    x, weight, bias = normal(*shape), normal(shape[-1]), normal(shape[-1])
    branch = normal(*shape) if adds else None
    inputs = [x, weight, bias] + ([branch] if adds else [])
    total, normed = add_norm(x, branch, weight, bias, 1e-5, 0.0, torch.float32)
    expected = x.double() + (branch.double() if adds else 0.0)
    wanted = F.layer_norm(expected, shape[-1:], weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(total.double(), expected)
    torch.testing.assert_close(normed.double(), wanted, atol=1e-5, rtol=1e-5)
    to_total, to_normed = torch.randn_like(x), torch.randn_like(x)
    found = torch.autograd.grad((normed * to_normed).sum() + carries * (total * to_total).sum(), inputs)
    right = torch.autograd.grad((wanted * to_normed).sum() + carries * (expected * to_total).sum(), inputs)
    for a, b in zip(found, right):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_dropout_of_the_branch_is_the_same_both_ways():
    torch.manual_seed(0)
    x, branch = torch.zeros(64, 256, device=DEVICE), torch.ones(64, 256, device=DEVICE).requires_grad_()
    total, _ = add_norm(x, branch, *(torch.ones(256, device=DEVICE) for _ in range(2)), 1e-5, 0.25, torch.float32)
    assert total.detach().unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float(total.detach().mean()) == pytest.approx(1.0, abs=0.03)
    (grad,) = torch.autograd.grad(total.sum(), branch)
    torch.testing.assert_close(grad, total.detach())


@pytest.mark.parametrize("shape", [(3, 7, 32), (1000,), (5, 1025)])
def test_gelu(shape):
    torch.manual_seed(0)
    x = normal(*shape)
    found, wanted = gelu_dropout(x, 0.0), F.gelu(x.double())
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-5)
    grad = torch.randn(*shape, device=DEVICE)
    (got,), (right,) = torch.autograd.grad(found, x, grad), torch.autograd.grad(wanted, x, grad.double())
    torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-4)


def test_gelu_drops_the_same_both_ways():
    torch.manual_seed(0)
    x = torch.full((64, 256), 3.0, device=DEVICE).requires_grad_()
    found = gelu_dropout(x, 0.5)
    kept = found.detach() != 0
    assert float(kept.float().mean()) == pytest.approx(0.5, abs=0.03)
    torch.testing.assert_close(found.detach()[kept], (2 * F.gelu(x.detach()))[kept])
    (grad,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(grad != 0, kept)
