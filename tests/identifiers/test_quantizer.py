"""Residual quantiser: a case worked out by hand, gradients, moving averages, dead codes, Sinkhorn."""

import itertools

import numpy as np
import pytest
import torch

from genrec_dist.config import RqvaeConfig
from genrec_dist.identifiers.quantizer import ResidualQuantizer, sinkhorn
from genrec_dist.identifiers.residual import residual_kmeans
from genrec_dist.identifiers.rows import ArrayRows

CODES = torch.tensor([[[0.0, 0.0], [4.0, 0.0]], [[0.0, 1.0], [-1.0, 0.0]]])


def make(codes: torch.Tensor = CODES, **config) -> ResidualQuantizer:
    levels, clusters, dim = codes.shape
    quantizer = ResidualQuantizer(RqvaeConfig(**config), levels, clusters, dim)
    for level in range(levels):
        quantizer._set(level, torch.arange(clusters), codes[level])
    return quantizer


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
@pytest.mark.parametrize("commitment", ["levels", "total"])
def test_hand_worked(codebook: str, commitment: str) -> None:
    # row (3, 0): nearest of (0,0), (4,0) is (4,0), residual (-1,0), next (-1,0), nothing is left.
    # row (1, 2): (0,0), residual (1,2), distances to (0,1) and (-1,0) are 2 and 8: (0,1), (1,1) is left.
    found = make(codebook=codebook, commitment=commitment)(torch.tensor([[3.0, 0.0], [1.0, 2.0]]))
    assert found.codes.tolist() == [[1, 1], [0, 0]]
    assert found.values.tolist() == [[3.0, 0.0], [0.0, 1.0]]
    assert found.residuals[:, 1].tolist() == [[-1.0, 0.0], [1.0, 2.0]]
    # squared errors a dimension: level 1 leaves |(-1,0)|^2 / 2 = .5 and |(1,2)|^2 / 2 = 2.5; level 2 leaves 0 and 1.
    last, every = [0.0, 1.0], [0.5, 3.5]
    assert found.commit.tolist() == (every if commitment == "levels" else last)
    assert found.codebook.tolist() == (every if codebook == "gradient" else [0.0, 0.0])


def test_a_tie_goes_to_the_lower_code() -> None:
    assert make()(torch.tensor([[2.0, 0.0]])).codes[0, 0] == 0


def test_gradient_goes_straight_through() -> None:
    """d f(values) / d rows is the derivative of f at the codes, as finite differences of f find it."""
    torch.manual_seed(0)
    quantizer = make(torch.randn(3, 8, 5))
    rows = torch.randn(6, 5, requires_grad=True)
    weight = torch.randn(5, 5, dtype=torch.float64)

    def decode(values: torch.Tensor) -> torch.Tensor:
        return torch.tanh(values.double() @ weight).square().sum()

    found = quantizer(rows)
    decode(found.values).backward()
    values, step = found.values.detach().double(), 1e-6
    for place in np.ndindex(*values.shape):
        up, down = values.clone(), values.clone()
        up[place] += step
        down[place] -= step
        numeric = (decode(up) - decode(down)) / (2 * step)
        assert rows.grad[place].item() == pytest.approx(numeric.item(), rel=1e-4, abs=1e-6)


def test_commitment_pulls_rows_and_codebook_loss_pulls_codes() -> None:
    quantizer = make(codebook="gradient", commitment="total")
    rows = torch.tensor([[1.0, 2.0]], requires_grad=True)
    found = quantizer(rows)
    found.commit.sum().backward()
    assert rows.grad.tolist() == [[1.0, 1.0]]  # d |(1,1)|^2 / 2
    assert quantizer.codebooks.grad is None
    quantizer(rows.detach()).codebook.sum().backward()
    # level 1, code 0 at (0,0) is pulled to (1,2); level 2, code 0 at (0,1) to its residual (1,2)
    assert quantizer.codebooks.grad.tolist() == [[[-1.0, -2.0], [0, 0]], [[-1.0, -1.0], [0, 0]]]


def test_moving_averages_by_hand() -> None:
    quantizer = make(codebook="ema", ema_decay=0.5)
    rows = torch.tensor([[3.0, 0.0], [5.0, 0.0]])
    moments = quantizer.moments(quantizer(rows))
    assert moments[0].tolist() == [[0.0, 0.0, 0.0], [2.0, 8.0, 0.0]]
    quantizer.learn(moments)
    # code (4,0), used once: usage (1 + 2) / 2, sum (4 + 8) / 2, so it stays at 4; the unused one keeps its place.
    assert quantizer.usage[0].tolist() == [0.5, 1.5]
    assert quantizer.codebooks[0].tolist() == [[0.0, 0.0], [4.0, 0.0]]
    # level 2, residuals (-1,0) and (1,0): |(1,0) - (0,1)|^2 = 2 < 4, so one each.
    assert quantizer.codebooks[1].tolist() == [[0.5, 0.5], [-1.0, 0.0]]


def test_moments_of_two_workers_add_up() -> None:
    torch.manual_seed(1)
    quantizer = make(torch.randn(2, 6, 3))
    rows = torch.randn(40, 3)
    whole = quantizer.moments(quantizer(rows))
    parts = sum(quantizer.moments(quantizer(rows[rank::2])) for rank in range(2))
    assert torch.allclose(whole, parts, atol=1e-5)


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_dead_codes_are_found_and_revived(codebook: str) -> None:
    quantizer = make(torch.randn(2, 4, 3), codebook=codebook, ema_decay=0.9, revive_below=0.2)
    quantizer.usage[1, 2] = 0.01
    dead = quantizer.dead()
    assert dead.tolist() == [[1, 2]]
    quantizer.revive(dead, torch.tensor([[7.0, 8.0, 9.0]]))
    assert quantizer.codebooks[1, 2].tolist() == [7.0, 8.0, 9.0]
    assert not len(quantizer.dead())
    quantizer.learn(torch.zeros(2, 4, 4))  # an average of nothing new leaves it there
    assert torch.allclose(quantizer.codebooks[1, 2], torch.tensor([7.0, 8.0, 9.0]))


def test_sinkhorn_fills_columns_alike() -> None:
    distances = torch.rand(64, 8, generator=torch.Generator().manual_seed(0))
    distances[:, 0] *= 0.1  # everyone would like the first
    plan = sinkhorn(distances, 0.05, 200)
    assert torch.allclose(plan.sum(1), torch.ones(64, dtype=torch.float64))
    assert torch.allclose(plan.sum(0), torch.full((8,), 8.0, dtype=torch.float64), rtol=0.02)
    assert (distances.argmin(1) == 0).float().mean() > 0.7
    assert (plan.argmax(1) == 0).float().mean() < 0.3


def test_sinkhorn_of_two_halves_is_that_of_the_whole() -> None:
    """Column sums are those of all workers: with the other half's sums added, a half gets its rows of the whole."""
    distances = torch.rand(10, 4, generator=torch.Generator().manual_seed(3))
    sums: list[torch.Tensor] = []
    whole = sinkhorn(distances, 0.1, 7, lambda x: sums.append(x) or x)
    given = iter(sums)
    assert torch.allclose(sinkhorn(distances[:5], 0.1, 7, lambda _: next(given)), whole[:5])


def test_sinkhorn_only_in_training_and_on_the_last_level() -> None:
    torch.manual_seed(0)
    rows = torch.randn(32, 2)
    quantizer = make(torch.randn(2, 4, 2), sinkhorn_epsilon=0.05)
    plain = make(quantizer.codebooks.clone())
    assert torch.equal(quantizer.eval()(rows).codes, plain(rows).codes)
    trained = quantizer.train()(rows).codes
    assert torch.equal(trained[:, 0], plain(rows).codes[:, 0])
    assert trained[:, 1].bincount(minlength=4).max() <= plain(rows).codes[:, 1].bincount(minlength=4).max()


def test_residual_kmeans_leaves_less_at_every_level() -> None:
    rows = np.random.default_rng(0).normal(size=(500, 6)).astype(np.float32)
    found = residual_kmeans(ArrayRows(rows), 3, 16, seed=1)
    again = residual_kmeans(ArrayRows(rows), 3, 16, seed=1)
    assert np.array_equal(found.codebooks, again.codebooks)
    left, errors = rows, [np.square(rows).sum()]
    for level, table in enumerate(found.codebooks):
        nearest = ((left[:, None] - table[None]) ** 2).sum(2).argmin(1)
        assert np.array_equal(nearest, found.codes[:, level])
        left = left - table[nearest]
        errors.append(np.square(left).sum())
    assert all(after < 0.8 * before for before, after in itertools.pairwise(errors))
