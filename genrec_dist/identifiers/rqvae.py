"""Residual-quantised autoencoder over one embedding table (TIGER) or two (CSJ-ID). Single device.

    h = lambda Encoder(z_sem) + (1 - lambda) Encoder(P z_cf),   q = quantised h
    L = lambda |z_sem - D_sem(q)|^2 + (1 - lambda) |z_cf - D_cf(q)|^2 + w L_commit (+ L_codebook)

Every squared error is a mean over its dimensions. What is reconstructed is the standardised table as it came in: the
projection P of the narrower table is learned, and a learned target could be made small instead of being met.

Source: CSJ-ID section 3.2; Rajput et al., TIGER (2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from genrec_dist.config import RqvaeConfig
from genrec_dist.identifiers.quantizer import Quantized, ResidualQuantizer


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class RqVae(nn.Module):
    """Shared encoder, residual quantiser, one decoder an input.

    Args:
        config: rqvae section.
        num_levels, num_clusters: L, K.
        widths: width of each input by name, one or two; the first has weight lambda (1 if it is alone), the second
            1 - lambda. With lambda = 1 the first input's part is the model of that input alone, value for value.
        scales: mean and standard deviation of each input's columns.

    Shapes:
        scales: name -> (2, width) float32.
    """

    def __init__(
        self,
        config: RqvaeConfig,
        num_levels: int,
        num_clusters: int,
        widths: dict[str, int],
        scales: dict[str, torch.Tensor],
    ) -> None:
        super().__init__()
        self.config, self.names = config, list(widths)
        first = self.names[0]
        weight = config.semantic_weight if len(widths) > 1 else 1.0
        self.weights = dict(zip(self.names, (weight, 1.0 - weight)))
        middle = [*config.hidden, config.latent_dim]
        self.encoder = mlp([widths[first], *middle])
        self.quantizer = ResidualQuantizer(config, num_levels, num_clusters, config.latent_dim)
        self.decoders = nn.ModuleDict()
        self.project = nn.ModuleDict()
        for name in self.names:  # the second input's modules last: they draw no number before the first's
            if name != first:
                self.project[name] = nn.Linear(widths[name], widths[first])
            self.decoders[name] = mlp([*middle[::-1], widths[name]])
            self.register_buffer(f"scale_{name}", scales[name].clone())

    def standardise(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Inputs with mean 0 and standard deviation 1 in every column."""
        scales = {name: getattr(self, f"scale_{name}") for name in self.names}
        return {name: (inputs[name] - scales[name][0]) / scales[name][1] for name in self.names}

    def encode(self, standardised: dict[str, torch.Tensor]) -> torch.Tensor:
        """h_joint, (B, D)."""
        parts = []
        for name in self.names:
            rows = standardised[name]
            rows = self.project[name](rows) if name in self.project else rows
            parts.append(self.weights[name] * self.encoder(rows))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def errors(self, values: torch.Tensor, standardised: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Squared error of each decoder, (B, width) of its input."""
        return {name: (self.decoders[name](values) - standardised[name]).square() for name in self.names}

    def forward(self, batch: dict) -> dict:
        """Losses of a batch.

        Args:
            batch: an entry an input, (B, width) float32 as stored, and `count`, rows of the global batch over the
                number of workers.

        Returns:
            'loss' and its parts, each over `count`.
        """
        standardised = self.standardise(batch)
        found = self.quantizer(self.encode(standardised))
        self.last: Quantized = found
        count = batch["count"]
        losses = {
            f"loss_{name}": error.mean(1).sum() / count
            for name, error in self.errors(found.values, standardised).items()
        }
        losses["loss_commit"] = found.commit.sum() / count
        reconstruction = [self.weights[name] * losses[f"loss_{name}"] for name in self.names]
        losses["loss"] = sum(reconstruction[1:], reconstruction[0]) + self.config.commit_weight * losses["loss_commit"]
        if self.config.codebook == "gradient":
            losses["loss_codebook"] = found.codebook.sum() / count
            losses["loss"] = losses["loss"] + losses["loss_codebook"]
        return losses
