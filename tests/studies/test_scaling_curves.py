"""Curves against planted parameters, against scipy and brute force, at their bounds, and one by one against many."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import least_squares, minimize

from genrec_dist.studies.scaling.curves import CURVES, DELTA, huber, solve

N = np.repeat([1, 2, 4, 8, 12, 16, 24, 32], 3) * 2e5


def noisy(y: np.ndarray, scale: float = 0.004, seed: int = 0) -> np.ndarray:
    """Logarithm with normal noise."""
    return np.log(y) + np.random.default_rng(seed).normal(0, scale, len(y))


@pytest.mark.parametrize(
    ("e", "a", "alpha", "sign", "limit"),
    [(8.0, 2.0, 0.5, 1, np.inf), (1.7, 4.0, 0.34, 1, np.inf), (0.0, 9.0, 0.07, 1, np.inf), (0.06, 0.03, 0.6, -1, 1.0)],
)
def test_exact_points_give_back_the_planted_power_law(e, a, alpha, sign, limit):
    y = e + sign * a * (N / 2e5) ** -alpha
    fit = solve(CURVES["power"], N, np.log(y), sign, limit)
    assert fit.theta[0] == pytest.approx(alpha, rel=2e-3)
    assert fit.c0[0] == pytest.approx(e, rel=2e-3, abs=2e-2 * y[0])
    assert fit.c1[0] * (fit.unit / 2e5) ** fit.theta[0] == pytest.approx(a, rel=5e-3)
    np.testing.assert_allclose(fit.predict(N)[0], y, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "sign", "y"),
    [
        ("constant", 1, np.full(len(N), 9.0)),
        ("log_linear", 1, 12 - 0.5 * np.log(N / 2e5)),
        ("log_linear", -1, 0.03 + 0.004 * np.log(N / 2e5)),
        ("saturating", 1, 8 + 2 * np.exp(-N / 8e5)),
        ("saturating", -1, 0.06 - 0.03 * np.exp(-N / 8e5)),
        ("peaked", -1, 0.06 - 0.004 * (np.log(N / 2e5) - 2) ** 2),
    ],
)
def test_every_family_follows_its_own_curve(name, sign, y):
    fit = solve(CURVES[name], N, np.log(y), sign)
    np.testing.assert_allclose(fit.predict(N)[0], y, rtol=2e-4)


@pytest.mark.parametrize("seed", range(4))
def test_no_descent_from_many_starts_ends_lower(seed):
    """The summed Huber loss of the search against Nelder-Mead from a grid of starts over all three parameters."""
    log_y = noisy(8 + 2 * (N / 2e5) ** -0.5, seed=seed)
    fit = solve(CURVES["power"], N, log_y)

    def loss(parameters):
        log_e, log_a, alpha = parameters
        prediction = np.exp(log_e) + np.exp(log_a) * (N / fit.unit) ** -alpha
        return huber(np.log(prediction) - log_y).sum() / DELTA

    starts = [(e, a, alpha) for e in (1.0, 2.0, 2.2) for a in (-1.0, 0.5) for alpha in (0.2, 0.5, 1.5)]
    options = {"xatol": 1e-9, "fatol": 1e-12, "maxiter": 3000}
    best = min(minimize(loss, start, method="Nelder-Mead", options=options).fun for start in starts)
    assert fit.objective[0] / DELTA <= best * (1 + 1e-3)
    assert fit.objective[0] == pytest.approx(huber(np.log(fit.predict(N)[0]) - log_y).sum(), rel=1e-9)


@pytest.mark.parametrize("name", ["power", "saturating", "peaked"])
def test_wide_delta_agrees_with_least_squares_of_scipy(name):
    """With every residual inside delta the Huber loss is least squares in log space."""
    y = {"power": 8 + 2 * (N / 2e5) ** -0.5, "saturating": 8 + 2 * np.exp(-N / 8e5)}.get(
        name, 8 + 0.2 * (np.log(N / 2e5) - 2) ** 2
    )
    log_y = noisy(y)
    fit = solve(CURVES[name], N, log_y, delta=1.0)

    def residuals(p):
        return np.log(p[0] + p[1] * CURVES[name].shape(N / fit.unit, p[2])) - log_y

    start = [fit.c0[0] * 1.01, fit.c1[0] * 0.95, fit.theta[0] * 1.05]
    reference = least_squares(residuals, start, x_scale=np.abs(start), xtol=1e-13, ftol=1e-13, gtol=1e-13)
    assert fit.objective[0] == pytest.approx(reference.cost, rel=1e-5)
    np.testing.assert_allclose([fit.c0[0], fit.c1[0], fit.theta[0]], reference.x, rtol=5e-3)


def test_many_sets_at_once_reach_what_each_alone_reaches():
    sets = np.stack([noisy(8 + 2 * (N / 2e5) ** -0.5, 0.01, seed) for seed in range(70)])
    many = solve(CURVES["power"], N, sets)
    alone = np.array([solve(CURVES["power"], N, one).objective[0] for one in sets])
    assert (many.objective / alone).max() < 1.02
    assert np.median(many.objective / alone) < 1.001


def test_rising_losses_get_a_negative_exponent_and_flat_ones_either():
    assert solve(CURVES["power"], N, noisy(8 * (N / 2e5) ** 0.1)).theta[0] < 0
    flat = np.stack([noisy(np.full(len(N), 9.0), 0.01, seed) for seed in range(40)])
    signs = np.sign(solve(CURVES["power"], N, flat).theta)
    assert 5 < (signs > 0).sum() < 35


def test_bounds_hold():
    rising = 0.2 + 0.25 * np.log(N / 2e5)
    fit = solve(CURVES["power"], N, noisy(rising), sign=-1, limit=1.0)
    assert 0 <= fit.c0[0] <= 1
    assert fit.c1[0] >= 0
    pure = solve(CURVES["power"], N, noisy(9 * (N / 2e5) ** -0.02))
    assert pure.c0[0] >= 0
    assert np.isfinite(pure.objective[0])


def test_huber_loss_by_hand():
    np.testing.assert_allclose(huber(np.array([0.0005, -0.001, 0.01])), [1.25e-7, 5e-7, 1e-3 * (0.01 - 0.0005)])
