"""Means at a depth and differences between depths of one arm, from a few seeds.

Two seeds at one depth say little about the noise of a run: their t factor is 12.7. Two seeds at each of eight depths
say it well, if the noise is the same at all of them, so it is pooled. Runs of one seed share the order of their batches
and, of a generator, Stage I and codes; what a seed adds at every depth cancels in a difference. Fits no curve of size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

BySeed = Mapping[int, Mapping[int, float]]
"""Depth -> seed -> value, of one arm."""
ESTIMABLE = 1e-9


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, or a difference of such, with its 95% t interval.

    Args:
        mean: of the seeds.
        interval: None where no depth has a second seed, or too few runs are left to judge the noise by.
        num_seeds: that the depths in question have.
    """

    mean: float
    interval: tuple[float, float] | None
    num_seeds: int


def mean_at(values: BySeed, depth: int, tail: float = 0.025) -> Estimate:
    """Mean over the seeds of a depth; the spread about the means of the depths is pooled over all depths.

    Args:
        tail: probability beyond each end of the interval.

    Source:
        One-way layout with equal variances (Scheffé, The Analysis of Variance, 1959, chapter 3).
    """
    groups = [np.array(list(seeds.values()), float) for seeds in values.values() if seeds]
    freedom = sum(len(group) - 1 for group in groups)
    own = np.array(list(values[depth].values()), float)
    mean = float(own.mean())
    if not freedom:
        return Estimate(mean, None, len(own))
    noise = np.sqrt(sum(((group - group.mean()) ** 2).sum() for group in groups) / freedom)
    half = float(stats.t.ppf(1 - tail, freedom) * noise / np.sqrt(len(own)))
    return Estimate(mean, (mean - half, mean + half), len(own))


def difference(values: BySeed, depth: int, base: int) -> Estimate | None:
    """Value at `depth` less that at `base`; None where no seed has both."""
    return _contrast(values, {depth: 1.0, base: -1.0}, depth, base) if depth != base else None


def gain_per_doubling(values: BySeed, base: int, deep: int) -> Estimate | None:
    """Least-squares gain a doubling of the depth over the depths from `base` to `deep`; None where no seed has both."""
    depths = sorted(depth for depth, seeds in values.items() if seeds and base <= depth <= deep)
    if base not in depths or deep not in depths:
        return None
    x = np.log2(depths)
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    return _contrast(values, dict(zip(depths, weights.tolist(), strict=True)), deep, base)


def _contrast(values: BySeed, weights: Mapping[int, float], depth: int, base: int) -> Estimate | None:
    """A weighted sum of depths' effects beside those of the seeds.

    Source:
        Two-way layout without interaction, cells may be empty (Scheffé 1959, chapter 4): least squares, its residual
        is the noise. With all cells it is the mean of the paired differences; with two depths, the paired t test.
    """
    shared = values.get(depth, {}).keys() & values.get(base, {}).keys()
    if not shared:
        return None
    cells = [(d, seed, value) for d, seeds in sorted(values.items()) for seed, value in sorted(seeds.items())]
    depths = sorted({d for d, _, _ in cells})
    seeds = sorted({seed for _, seed, _ in cells})
    design = np.zeros((len(cells), len(depths) + len(seeds)))
    for row, (d, seed, _) in enumerate(cells):
        design[row, depths.index(d)] = design[row, len(depths) + seeds.index(seed)] = 1
    y = np.array([value for _, _, value in cells])
    inverse = np.linalg.pinv(design)
    contrast = np.zeros(design.shape[1])
    for d, weight in weights.items():
        contrast[depths.index(d)] = weight
    if np.abs(contrast @ inverse @ design - contrast).max() > ESTIMABLE:
        return None
    mean, freedom = float(contrast @ inverse @ y), len(cells) - int(np.linalg.matrix_rank(design))
    if not freedom:
        return Estimate(mean, None, len(shared))
    noise = np.sqrt(((y - design @ inverse @ y) ** 2).sum() / freedom)
    half = float(stats.t.ppf(0.975, freedom) * noise * np.linalg.norm(contrast @ inverse))
    return Estimate(mean, (mean - half, mean + half), len(shared))
