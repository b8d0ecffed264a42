"""Residual vector quantisation as a module: nearest codes, straight-through values, learning of the codes.

Single device: what a batch contributes is returned as sums, and whoever trains adds up the workers' before they count.
Shape legend: B rows, L levels, K codes of a level, D width.

Source: Zeghidour et al., SoundStream (2021); Lee et al., RQ-VAE (2022); CSJ-ID section 3.2.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from genrec_dist.config import RqvaeConfig
from genrec_dist.identifiers.kmeans import KMeansOptions
from genrec_dist.identifiers.residual import residual_kmeans
from genrec_dist.identifiers.rows import ArrayRows

START_OPTIONS = KMeansOptions(iterations=25)


@dataclass
class Quantized:
    """What a batch became.

    Shapes:
        codes: (B, L) int64.
        values: (B, D), sum of the codes; its gradient goes straight to the input.
        residuals: (B, L, D) what each level was given, without gradient.
        commit: (B,) squared error that pulls the input to its codes, mean over D, summed over the levels that count.
        codebook: (B,) squared error that pulls the codes to their residuals; 0 for moving averages.
    """

    codes: torch.Tensor
    values: torch.Tensor
    residuals: torch.Tensor
    commit: torch.Tensor
    codebook: torch.Tensor


def squared_distances(rows: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distances less the rows' own squares (which no choice depends on), (B, K)."""
    return codes.square().sum(1) - 2.0 * rows @ codes.T


def sinkhorn(
    distances: torch.Tensor,
    epsilon: float,
    iterations: int,
    total: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> torch.Tensor:
    """Entropy-regularised transport plan in which every row has the same mass, and so has every column.

    Args:
        distances: cost of giving a row to a column; only differences within a row matter.
        epsilon: entropy weight, relative to the mean cost above each row's least.
        iterations: of row and column scaling; ends with the rows.
        total: sum over all workers.

    Shapes:
        distances: (B, K). returns: (B, K) float64, rows add up to 1.

    Source: Cuturi (2013); used on codes by LC-Rec (Zheng et al., 2024).
    """
    cost = distances.double()
    cost = cost - cost.min(1, keepdim=True).values
    scale = total(torch.stack([cost.sum(), cost.new_tensor(float(cost.numel()))]))
    log_plan = -cost / (epsilon * (scale[0] / scale[1].clamp(min=1)).clamp(min=1e-12))
    log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
    for _ in range(iterations):
        column = total(log_plan.exp().sum(0)).clamp(min=1e-300)
        log_plan = log_plan - column.log()
        log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
    return log_plan.exp()


class ResidualQuantizer(nn.Module):
    """L codebooks; each level quantises what the levels above it left.

    c_l = argmin_k |r_{l-1} - e_k^l|^2,  r_l = r_{l-1} - e_{c_l}^l; ties go to the lower code.

    Args:
        config: codebook, commitment, Sinkhorn settings.
        num_levels, num_clusters, dim: L, K, D.

    `total` sums a tensor over all workers; whoever trains on several sets it.
    """

    codebooks: torch.Tensor
    usage: torch.Tensor
    sums: torch.Tensor

    def __init__(self, config: RqvaeConfig, num_levels: int, num_clusters: int, dim: int) -> None:
        super().__init__()
        self.config = config
        self.total: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
        codes = torch.randn(num_levels, num_clusters, dim) * 0.02
        if config.codebook == "gradient":
            self.codebooks = nn.Parameter(codes)
        else:
            self.register_buffer("codebooks", codes)
            self.register_buffer("sums", codes.clone())
        self.register_buffer("usage", torch.ones(num_levels, num_clusters))

    @torch.no_grad()
    def start(self, rows: np.ndarray, seed: int) -> None:
        """Codes become the centroids of k-means on these rows' residuals, level by level.

        Shapes:
            rows: (n, D) float32.
        """
        levels, clusters = self.codebooks.shape[:2]
        found = residual_kmeans(ArrayRows(rows), levels, clusters, seed=seed, options=START_OPTIONS)
        for level, codes in enumerate(found.codebooks):
            self._set(level, torch.arange(len(codes)), torch.from_numpy(codes))

    def forward(self, rows_BD: torch.Tensor) -> Quantized:
        """Quantise, with what a training step needs."""
        with torch.autocast(rows_BD.device.type, enabled=False):
            rows = rows_BD.float()
            left, chosen_so_far = rows, torch.zeros_like(rows)
            codes, residuals = [], []
            commit = codebook = rows.new_zeros(len(rows))
            last = len(self.codebooks) - 1
            for level, table in enumerate(self.codebooks):
                residual = left.detach()
                code = self._choose(residual, table, level == last)
                chosen = F.embedding(code, table)
                codes.append(code)
                residuals.append(residual)
                if self.config.commitment == "levels" or level == last:
                    commit = commit + (left - chosen.detach()).square().mean(1)
                if self.config.codebook == "gradient":
                    codebook = codebook + (residual - chosen).square().mean(1)
                left = left - chosen.detach()
                chosen_so_far = chosen_so_far + chosen.detach()
            values = rows + (chosen_so_far - rows).detach()
        return Quantized(torch.stack(codes, 1), values, torch.stack(residuals, 1), commit, codebook)

    def _choose(self, residual: torch.Tensor, table: torch.Tensor, is_last: bool) -> torch.Tensor:
        distances = squared_distances(residual, table.detach())
        if self.training and is_last and self.config.sinkhorn_epsilon:
            plan = sinkhorn(distances, self.config.sinkhorn_epsilon, self.config.sinkhorn_iterations, self.total)
            return plan.argmax(1)
        return distances.argmin(1)

    # Learning

    @torch.no_grad()
    def moments(self, found: Quantized) -> torch.Tensor:
        """How often each code was taken, and the sum of the residuals that took it, (L, K, 1 + D)."""
        levels, clusters, dim = self.codebooks.shape
        out = self.codebooks.new_zeros(levels, clusters, 1 + dim)
        for level in range(levels):
            code = found.codes[:, level]
            out[level, :, 0].index_add_(0, code, torch.ones_like(code, dtype=out.dtype))
            out[level, :, 1:].index_add_(0, code, found.residuals[:, level])
        return out

    @torch.no_grad()
    def learn(self, moments: torch.Tensor) -> None:
        """Take the whole batch's moments into the moving averages, and (codebook 'ema') move the codes there."""
        decay = self.config.ema_decay
        self.usage.mul_(decay).add_(moments[..., 0], alpha=1 - decay)
        if self.config.codebook == "ema":
            self.sums.mul_(decay).add_(moments[..., 1:], alpha=1 - decay)
            self.codebooks.copy_(self.sums / self.usage.clamp(min=1e-5)[..., None])

    def dead(self) -> torch.Tensor:
        """(level, code) of each code that is used less than the configured share of an equal use, (n, 2) int64."""
        equal = self.usage.sum(1, keepdim=True) / self.usage.shape[1]
        return (self.usage < self.config.revive_below * equal).nonzero()

    @torch.no_grad()
    def revive(self, dead: torch.Tensor, rows: torch.Tensor) -> None:
        """Put codes where residuals are; each counts as equally used again.

        Shapes:
            dead: (n, 2) int64. rows: (n, D).
        """
        equal = self.usage.sum(1) / self.usage.shape[1]
        for level in dead[:, 0].unique().tolist():
            here = dead[:, 0] == level
            self._set(level, dead[here, 1], rows[here], float(equal[level]))

    def _set(self, level: int, codes: torch.Tensor, rows: torch.Tensor, usage: float = 1.0) -> None:
        rows = rows.to(self.codebooks)
        self.codebooks.data[level, codes] = rows
        self.usage[level, codes] = usage
        if self.config.codebook == "ema":
            self.sums[level, codes] = usage * rows
