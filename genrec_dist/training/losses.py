"""Losses of a training: their sums on the device, the first that is not finite, and the scale of float16 gradients.

The sums are float64 of float32 losses, exact in practice, so a curve does not depend on when it was written or where a
run was resumed. Everything is updated in place: a captured CUDA graph can hold it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from genrec_dist.training.worker import Worker


class LossMeter:
    """Mean losses since the last reading.

    Args:
        worker: this process; readings are means over all.

    Attributes:
        bad: 1.0 on the device once a loss of any worker was not finite, else 0.0.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.names: list[str] = []
        self.bad = torch.zeros((), device=worker.device)
        self._sums = torch.zeros(0, dtype=torch.float64, device=worker.device)
        self._kept: dict[str, Any] = {}
        self.steps = torch.zeros((), dtype=torch.int64, device=worker.device)
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=worker.device)
        self.step_offset = 0

    def prepare(self, names: Sequence[str]) -> None:
        """Make room for these losses; `add` does it at the first step."""
        if not self.names:
            self.names = sorted(names)
            kept = [self._kept.get("sums", {}).get(name, 0.0) for name in self.names]
            self._sums = torch.tensor(kept, dtype=torch.float64, device=self.worker.device)

    def add(self, parts: Sequence[dict[str, torch.Tensor]]) -> None:
        """Add a step's losses, the mean over its parts on this worker; nothing waits for the device."""
        self.prepare(list(parts[0]))
        stacked = torch.stack([torch.stack([part[name].float() for name in self.names]) for part in parts])
        values = stacked.mean(0) if len(parts) > 1 else stacked[0]
        bad = 1.0 - torch.isfinite(values).all().float()
        if self.worker.world_size > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        self._first_bad.copy_(torch.where((self._first_bad < 0) & (bad > 0), self.steps, self._first_bad))
        torch.maximum(self.bad, bad, out=self.bad)
        self._sums += values
        self.steps += 1

    def start(self, step: int, kept: dict[str, Any]) -> None:
        """Begin or go on at a global step, with what `state` gave."""
        self._kept, self.step_offset, self.names = kept, step - kept.get("steps", 0), []
        self.steps.fill_(kept.get("steps", 0))

    def state(self) -> dict[str, Any]:
        """Sums so far, the same on every worker; JSON-ready."""
        sums = self.worker.sum(self._sums.clone()) / self.worker.world_size
        return {"steps": int(self.steps), "sums": dict(zip(self.names, sums.tolist()))}

    def read(self) -> dict[str, float]:
        """Mean losses since the last reading, the same on every worker.

        Raises:
            NonFinite: see `refuse`.
        """
        self.refuse()
        state = self.state()
        self._sums.zero_()
        self.step_offset += state["steps"]
        self.steps.zero_()
        return {name: total / state["steps"] for name, total in state["sums"].items()}

    def refuse(self) -> None:
        """Wait for the device, and raise where a loss was not finite.

        Raises:
            NonFinite: with the number of the first such step.
        """
        if float(self.bad):
            wrong = {n: total for n, total in zip(self.names, self._sums.tolist()) if not math.isfinite(total)}
            raise NonFinite(self.step_offset + int(self._first_bad), wrong)


class NonFinite(Exception):
    """A loss was not finite; the parameters are those before that step.

    Args:
        step: global number of the first such step.
        found: the losses at fault; empty where they are another worker's.
    """

    def __init__(self, step: int, found: dict[str, float]) -> None:
        self.step, self.found = step, found
        super().__init__(f"step {step}: {found}")


@dataclass
class LossScale:
    """Dynamic loss scale of float16: halved at an overflow, whose step is left out, doubled after a long time without.

    Source: Micikevicius et al. (2018), Mixed Precision Training, section 3.2.
    """

    value: float = 2.0**16
    good: int = 0
    interval: int = 2000

    @classmethod
    def of(cls, dtype: torch.dtype) -> LossScale | None:
        """A scale where the type of products needs one."""
        return cls() if dtype == torch.float16 else None

    def unscale(self, gradients: list[torch.Tensor]) -> bool:
        """Take the scale out of gradients, in place; False where they overflowed and the step has to be left out."""
        torch._foreach_mul_(gradients, 1 / self.value)
        return self.update(bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients)).sum())))

    def update(self, finite: bool) -> bool:
        """Take note of a step's gradients; returns `finite`."""
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self.good == self.interval:
            self.value, self.good = self.value * 2, 0
        return finite

    def state(self) -> dict[str, torch.Tensor]:
        """As tensors of a checkpoint."""
        return {"loss_scale": torch.tensor([self.value, float(self.good)], dtype=torch.float64)}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """What `state` gave; a checkpoint of another precision has none."""
        if "loss_scale" in state:
            self.value, self.good = float(state["loss_scale"][0]), int(state["loss_scale"][1])
