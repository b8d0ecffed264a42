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
        skip_history: leave out what stands in the history, and share its probability among the other items.
    """

    def __init__(self, model: FusionModel, temperature: float = 1.0, skip_history: bool = False) -> None:
        self.model = model.eval().requires_grad_(False)
        with torch.no_grad():
            self.table = model.items()[2]
        self.scale = scale_of(model.config.similarity, model.config.temperature) / temperature
        self.skip_history = skip_history

    @property
    def reads_times(self) -> bool:
        """Whether its histories come with times."""
        return self.model.config.time_bumps > 0

    @torch.no_grad()
    def __call__(self, history: torch.Tensor, mask: torch.Tensor, times: torch.Tensor | None = None) -> torch.Tensor:
        """Probability of each item to be the next; all zero where the history, left out, holds the whole catalog.

        Shapes:
            history, mask, times: (B, S). Returns (B, num_items) float32.
        """
        with torch.autocast(history.device.type, enabled=False):
            probs = (self.model.score_catalog(history, mask, times, self.table) * self.scale).softmax(1)
        if not self.skip_history:
            return probs
        items = torch.where(mask, history, history[:, :1])  # padding repeats the first item
        probs.scatter_(1, items, 0.0)
        return probs.div_(probs.sum(1, keepdim=True).clamp(min=torch.finfo(probs.dtype).tiny))
