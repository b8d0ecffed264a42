"""Means at a depth and differences between depths of one arm, from a few seeds; what each seed adds at every depth.

Two seeds at one depth say little about the noise of a run: their t factor is 12.7. Two seeds at each of eight depths
say it well, if the noise is the same at all of them, so it is pooled. Runs of one seed share the order of their batches
and, of a generator, Stage I and codes, so they are not independent: what a seed adds at every depth is told apart from
the noise by a two-way layout. Fits no curve of size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats
from scipy.sparse.csgraph import connected_components

BySeed = Mapping[int, Mapping[int, float]]
"""Depth -> seed -> value, of one arm."""
TAIL = 0.025
ESTIMABLE = 1e-9


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, or a difference of such, with its t interval.

    Args:
        mean: of the seeds.
        interval: None where no depth has a second seed, or too few runs are left to judge the noise by.
        num_seeds: that the depths in question have.
    """

    mean: float
    interval: tuple[float, float] | None
    num_seeds: int


class TwoWay:
    """Least squares of depths' and seeds' effects, without interaction; cells may be empty.

    Args:
        depth, seed: of each run.

    Shapes:
        depth, seed: (num_runs,) int. design: (num_runs, num_depths + num_seeds), 0 and 1; inverse: its transpose's.
        block: (num_runs,) int, equal where depths and seeds in common, or others between them, tie runs together.

    Source:
        Scheffé, The Analysis of Variance, 1959, chapter 4.
    """

    def __init__(self, depth: np.ndarray, seed: np.ndarray) -> None:
        self.depths, rows = np.unique(depth, return_inverse=True)
        self.seeds, columns = np.unique(seed, return_inverse=True)
        self.of_seed = np.eye(len(self.seeds))[columns]
        self.design = np.concatenate([np.eye(len(self.depths))[rows], self.of_seed], axis=1)
        self.inverse = np.linalg.pinv(self.design)
        self.num_blocks, labels = connected_components(self.design.T @ self.design, directed=False)
        self.block = labels[rows]

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the residual."""
        return len(self.design) - len(self.depths) - self.num_effects

    @property
    def num_effects(self) -> int:
        """What the seeds take beyond a level of each block: none for a seed that no other is compared with."""
        return len(self.seeds) - self.num_blocks

    @cached_property
    def effects(self) -> np.ndarray:
        """What turns the runs' values into what each one's seed adds, about 0 in the mean of a block.

        Shapes:
            (num_runs, num_runs).
        """
        added = self.of_seed @ self.inverse[len(self.depths) :]
        same = (self.block[:, None] == self.block).astype(float)
        return added - same / same.sum(axis=1, keepdims=True) @ added

    def residual(self, y: np.ndarray) -> np.ndarray:
        """What the layout leaves of y."""
        return y - self.design @ (self.inverse @ y)


def mean_of(values: BySeed, depth: int) -> Estimate:
    """Mean at a depth of the seeds that it has, with the interval for these seeds: what they add at every depth is part
    of the mean, not of its noise. For seeds at large it is too narrow (`mean_at_large`).

    Source:
        Two-way layout; where too few runs tell seeds from noise, the spread about the means of the depths.
    """
    own = np.array(list(values[depth].values()), float)
    layout, y = _layout(values)
    noise = _noise(layout.residual(y), layout.freedom) or _noise(*_within(values))
    return _estimate(float(own.mean()), noise, float(np.sqrt(1 / len(own))), len(own))


def mean_at_large(values: BySeed, depth: int, tail: float = TAIL) -> Estimate:
    """Mean at a depth, with the interval for seeds at large: a seed's effect at every depth is drawn anew with it.

    With few seeds few degrees of freedom are left: two seeds that differ have a t factor of up to 12.7.

    Args:
        tail: probability beyond each end of the interval.

    Source:
        Two-way layout with random effects of the seeds, variance by the method of moments (Searle, Casella and
        McCulloch, Variance Components, 1992, chapter 5), degrees of freedom of Satterthwaite 1946; where too few runs
        tell seeds from noise, the spread about the means of the depths.
    """
    own = np.array(list(values[depth].values()), float)
    mean, scale = float(own.mean()), float(np.sqrt(1 / len(own)))
    layout, y = _layout(values)
    if not layout.num_effects or not layout.freedom:
        return _estimate(mean, _noise(*_within(values)), scale, len(own), tail)
    within, residual = _within(values), layout.residual(y)
    left = float(residual @ residual) / layout.freedom
    seeds = float(within[0] @ within[0] - residual @ residual) / layout.num_effects
    share = layout.num_effects / within[1]  # `seeds` holds the variance between seeds 1 / share times, the noise once
    parts = max(seeds, 0.0) * share, left * (1 - share)
    spread = parts[0] ** 2 / layout.num_effects + parts[1] ** 2 / layout.freedom
    freedom = sum(parts) ** 2 / spread if spread else float(layout.freedom)
    return _estimate(mean, (float(np.sqrt(sum(parts))), freedom), scale, len(own), tail)


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

    With all cells of the layout it is the mean of the paired differences; with two depths, the paired t test.
    """
    shared = values.get(depth, {}).keys() & values.get(base, {}).keys()
    if not shared:
        return None
    layout, y = _layout(values)
    contrast = np.zeros(layout.design.shape[1])
    contrast[[list(layout.depths).index(d) for d in weights]] = list(weights.values())
    by_run = contrast @ layout.inverse
    if np.abs(by_run @ layout.design - contrast).max() > ESTIMABLE:
        return None
    noise = _noise(layout.residual(y), layout.freedom)
    return _estimate(float(by_run @ y), noise, float(np.linalg.norm(by_run)), len(shared))


def _layout(values: BySeed) -> tuple[TwoWay, np.ndarray]:
    cells = [(d, seed, value) for d, seeds in sorted(values.items()) for seed, value in sorted(seeds.items())]
    depth, seed, y = zip(*cells, strict=True)
    return TwoWay(np.array(depth), np.array(seed)), np.array(y, float)


def _within(values: BySeed) -> tuple[np.ndarray, int]:
    """Residuals about the means of the depths, and their degrees of freedom (one-way layout)."""
    groups = [np.array(list(seeds.values()), float) for seeds in values.values() if seeds]
    return np.concatenate([group - group.mean() for group in groups]), sum(len(group) - 1 for group in groups)


def _noise(residual: np.ndarray, freedom: int) -> tuple[float, float] | None:
    """Standard deviation of a run and its degrees of freedom."""
    return (float(np.sqrt((residual**2).sum() / freedom)), float(freedom)) if freedom else None


def _estimate(
    mean: float, noise: tuple[float, float] | None, scale: float, num_seeds: int, tail: float = TAIL
) -> Estimate:
    """With the t interval of noise * scale."""
    if noise is None:
        return Estimate(mean, None, num_seeds)
    half = float(stats.t.ppf(1 - tail, noise[1])) * noise[0] * scale
    return Estimate(mean, (mean - half, mean + half), num_seeds)
