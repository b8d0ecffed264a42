"""Moving average of a model's weights, which is validated and kept; training goes on with the weights themselves.

Works on what an engine holds here of the parameters, whole or sharded, and needs nothing of it but `Engine.weights` and
`Engine.weights_changed`. The average is part of every checkpoint.

Source: Polyak and Juditsky (1992); the warm-up of the decay as in most public code, min(decay, (1 + t) / (10 + t)).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PREFIX = "average/"
State = dict[str, torch.Tensor]


class WeightAverage:
    """The average of an engine's weights.

    Args:
        engine: its weights at this moment are the first average.
        decay: share of the old average in the new one, after the warm-up.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.engine, self.decay = engine, decay
        self._average = [weight.detach().clone() for weight in engine.weights()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step.

        Args:
            step: steps done, from 1.
        """
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, [weight.detach() for weight in self.engine.weights()], share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While it is open the engine's model has the averaged weights; all workers open it together."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for held, weight in zip(self._average, self.engine.weights()):
            kept = weight.detach().clone()
            weight.copy_(held)
            held.copy_(kept)
        self.engine.weights_changed()

    def state(self) -> State:
        """Whole averages by name, on the CPU."""
        with self.applied():
            return {PREFIX + name: tensor for name, tensor in self.engine.best().items()}

    def load(self, state: State) -> None:
        """What `state` gave, given the whole state of the checkpoint, which is loaded into the engine as well."""
        names = [name for name in state if name.startswith(PREFIX)]
        self.engine.load(state | {"model/" + name.removeprefix(PREFIX): state[name] for name in names})
        self._average = [weight.detach().clone() for weight in self.engine.weights()]
        self.engine.load({name: tensor for name, tensor in state.items() if name not in names})
