"""Several gloo processes on this machine, for tests of what must not depend on the number of workers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from genrec_dist.training.worker import Worker


def run_processes(function: Callable[..., None], world_size: int, *arguments) -> None:
    """Call `function(worker, *arguments)` in `world_size` fresh processes joined by gloo, and wait.

    Args:
        function: importable top-level function; leaves its results as files.
        world_size: processes.
        arguments: picklable.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one of them raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = Path(folder) / "rendezvous"
        mp.spawn(_entry, (world_size, str(rendezvous), function, arguments), nprocs=world_size)


def join_group(worker: Worker, rendezvous: str) -> None:
    """Join this process to a gloo group that meets at a file."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=worker.rank, world_size=worker.world_size)


def _entry(rank: int, world_size: int, rendezvous: str, function: Callable[..., None], arguments: tuple) -> None:
    torch.set_num_threads(1)
    worker = Worker(rank, world_size)
    join_group(worker, rendezvous)
    try:
        function(worker, *arguments)
    finally:
        dist.destroy_process_group()
