"""What a device can do, measured: the ceilings that benchmarks beside this file give shares of."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from genrec_dist.training.worker import exact_products


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    """Median seconds of a piece of device work, after two calls of warm-up."""
    times = []
    for turn in range(repeats + 2):
        synchronize()
        began = time.perf_counter()
        work()
        synchronize()
        if turn > 1:
            times.append(time.perf_counter() - began)
    return float(np.median(times))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a device copy, reads and writes counted."""
    source = torch.empty(1 << 30, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of an 8192 x 8192 x 8192 product of random matrices; float32 without TF32."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=dtype) for _ in range(2))
    with exact_products():
        return 2 * 8192**3 / seconds(lambda: a @ b, 20)
