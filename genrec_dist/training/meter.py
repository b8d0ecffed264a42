"""What a training achieves: samples and tokens a second, model FLOPs utilisation, memory, and where the time goes.

Goodput is the share of the time since the training's first start that was spent in steps that still count: not waiting
for data, validating or saving, and not repeated after a restart. Time between processes counts as lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from genrec_dist.config import OptimConfig
from genrec_dist.training.engine import precision_of
from genrec_dist.training.worker import Worker

TIMES = ("data", "validation", "saving")
PEAK_SIZE = {"cuda": 4096, "cpu": 512}
PEAK_REPEATS = {"cuda": 20, "cpu": 3}


@dataclass
class _Sums:
    """Since the training began, over all processes that worked on it, and what of it was logged."""

    seconds: float = 0.0
    data: float = 0.0
    validation: float = 0.0
    saving: float = 0.0
    samples: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0


@dataclass
class Meter:
    """Times and counts of a training on this worker; counts are of global batches.

    Args:
        worker: this process.
        tokens: (indices) -> tokens of a global batch, None where the task does not say.
        flops: (indices) -> model FLOPs of a step on it, likewise.
        peak: FLOPs a second that this worker's products reach at most.
        started: wall clock of the training's first start.
    """

    worker: Worker
    tokens: Callable[[Any], int] | None = None
    flops: Callable[[Any], float] | None = None
    peak: float = 0.0
    started: float = field(default_factory=time.time)
    sums: _Sums = field(default_factory=_Sums)
    logged: _Sums = field(default_factory=_Sums)

    @classmethod
    def start(cls, task: Any, config: OptimConfig, worker: Worker, kept: dict[str, Any]) -> Meter:
        """A meter that goes on from what `state` gave."""
        flops = getattr(task, "flops", None)
        peak = peak_flops(worker.device, precision_of(config, worker.device)) if flops else 0.0
        meter = cls(worker, getattr(task, "tokens", None), flops, peak)
        if kept:
            meter.started = kept["started"]
            meter.sums, meter.logged = _Sums(**kept["sums"]), _Sums(**kept["logged"])
        meter._clock = time.perf_counter()
        return meter

    def __post_init__(self) -> None:
        self._clock = time.perf_counter()

    @contextmanager
    def _apart(self, kind: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        setattr(self.sums, kind, getattr(self.sums, kind) + time.perf_counter() - begun)

    def waiting(self) -> AbstractContextManager[None]:
        """Time spent on making or waiting for a batch."""
        return self._apart("data")

    def validating(self) -> AbstractContextManager[None]:
        """Time of a validation."""
        return self._apart("validation")

    def saving(self) -> AbstractContextManager[None]:
        """Time that a checkpoint holds the training up."""
        return self._apart("saving")

    def stepped(self, indices: Any) -> None:
        """A step on this global batch is on its way."""
        self.sums.samples += len(indices)
        self.sums.tokens += self.tokens(indices) if self.tokens else 0
        self.sums.flops += self.flops(indices) if self.flops else 0.0
        self._tick()

    def _tick(self) -> None:
        now = time.perf_counter()
        self.sums.seconds, self._clock = self.sums.seconds + now - self._clock, now

    def state(self) -> dict[str, Any]:
        """JSON-ready."""
        self._tick()
        return {"started": self.started, "sums": asdict(self.sums), "logged": asdict(self.logged)}

    def read(self) -> dict[str, float]:
        """Rates since the last reading, and the goodput since the beginning; waits for the device."""
        if self.worker.device.type == "cuda":
            torch.cuda.synchronize(self.worker.device)
        self._tick()
        since = {name: value - getattr(self.logged, name) for name, value in asdict(self.sums).items()}
        self.logged = _Sums(**asdict(self.sums))
        training = max(since["seconds"] - since["validation"] - since["saving"], 1e-9)
        found = {
            "samples_per_second": round(since["samples"] / training, 1),
            "data_wait_share": round(since["data"] / training, 4),
            "checkpoint_share": round(since["saving"] / max(since["seconds"], 1e-9), 4),
            "goodput": round(self.goodput(), 4),
            "memory_mib": round(memory_mib(self.worker.device), 1),
        }
        if self.tokens:
            found["tokens_per_second"] = round(since["tokens"] / training, 1)
        found |= self.spent()
        if self.flops:
            found["mfu"] = round(since["flops"] / training / (self.peak * self.worker.world_size), 4)
        return found

    def spent(self) -> dict[str, float]:
        """Model FLOPs of all steps so far, over all workers; empty where the task does not say."""
        return {"flops": self.sums.flops} if self.flops else {}

    def goodput(self) -> float:
        """Share of the time since the first start that was spent in steps that count."""
        useful = self.sums.seconds - sum(getattr(self.sums, kind) for kind in TIMES)
        return useful / max(time.time() - self.started, self.sums.seconds, 1e-9)

    def summary(self) -> dict[str, float]:
        """Of the whole training."""
        self._tick()
        return {
            "seconds": round(self.sums.seconds, 2),
            "validation_seconds": round(self.sums.validation, 2),
            "checkpoint_seconds": round(self.sums.saving, 2),
            "data_seconds": round(self.sums.data, 2),
            "goodput": round(self.goodput(), 4),
        }


MEASURED = frozenset(
    ("samples_per_second", "tokens_per_second", "mfu", "memory_mib", "data_wait_share", "checkpoint_share", "goodput")
    + ("seconds", "validation_seconds", "checkpoint_seconds", "data_seconds")
)
"""Entries of a curve and of a summary that differ from run to run."""


def memory_mib(device: torch.device) -> float:
    """Most memory so far: of the device's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large square product, measured: what utilisation is a share of."""
    size, repeats = PEAK_SIZE[device.type], PEAK_REPEATS[device.type]
    dtype = torch.float32 if device.type == "cpu" and dtype == torch.float16 else dtype
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        for _ in range(repeats):
            a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - begun) / repeats)
    return 2.0 * size**3 / best
