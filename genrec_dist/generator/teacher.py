"""Stage I as the teacher of a generator: its probabilities of all items."""

from __future__ import annotations

import torch

from genrec_dist.collaborative.fusion import FusionModel
from genrec_dist.collaborative.losses import scale_of


class Teacher:
    """A trained Stage I, frozen. It is no module: no state, no count of parameters and no optimiser knows of it.

    Args:
        model: on the generator's device.
        temperature: divides its logits.
    """

    def __init__(self, model: FusionModel, temperature: float = 1.0) -> None:
        self.model = model.eval().requires_grad_(False)
        with torch.no_grad():
            self.table = model.items()[2]
        self.scale = scale_of(model.config.similarity, model.config.temperature) / temperature

    @property
    def reads_times(self) -> bool:
        """Whether its histories come with times."""
        return self.model.config.time_bumps > 0

    @torch.no_grad()
    def __call__(self, history: torch.Tensor, mask: torch.Tensor, times: torch.Tensor | None = None) -> torch.Tensor:
        """Probability of each item to be the next.

        Shapes:
            history, mask, times: (B, S). Returns (B, num_items) float32.
        """
        with torch.autocast(history.device.type, enabled=False):
            return (self.model.score_catalog(history, mask, times, self.table) * self.scale).softmax(1)
