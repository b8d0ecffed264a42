"""When a checkpoint is due: so many minutes or so many steps after the last one, whichever comes first."""

from __future__ import annotations

import time
from collections.abc import Callable


class Cadence:
    """Time and steps since the last checkpoint.

    Args:
        minutes: between checkpoints at most; 0: the clock does not count.
        steps: between checkpoints at most; 0: steps do not count.
        clock: seconds, rising.
    """

    def __init__(self, minutes: float, steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.minutes, self.steps, self.clock = minutes, steps, clock
        self._step, self._time = 0, clock()

    @property
    def by_clock(self) -> bool:
        """Workers' clocks differ: one has to decide for all. Steps alone are the same everywhere."""
        return self.minutes > 0

    def due(self, step: int) -> bool:
        """True when a checkpoint should follow this many steps."""
        if self.steps and step - self._step >= self.steps:
            return True
        return self.by_clock and self.clock() - self._time >= 60 * self.minutes

    def saved(self, step: int) -> None:
        """A checkpoint of this step was written, or read: the next one counts from here."""
        self._step, self._time = step, self.clock()
