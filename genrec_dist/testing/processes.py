"""Several gloo processes on this machine, for tests of what must not depend on the number of workers."""

from __future__ import annotations

import faulthandler
import os
import sys
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
        torch.multiprocessing.ProcessRaisedException: one of them raised; torch.multiprocessing.ProcessExitedException:
            one died. Their error output is noted.
    """
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = Path(folder) / "rendezvous"
        try:
            mp.spawn(_entry, (world_size, str(rendezvous), function, arguments), nprocs=world_size)
        except Exception as error:  # a process that aborts leaves its reason in its error output only
            for file in sorted(Path(folder).glob("*.stderr")):
                error.add_note(f"{file.name}, its end:\n{file.read_text(errors='replace')[-4000:]}")
            raise


def join_group(worker: Worker, rendezvous: str) -> None:
    """Join this process to a gloo group that meets at a file."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=worker.rank, world_size=worker.world_size)


def _entry(rank: int, world_size: int, rendezvous: str, function: Callable[..., None], arguments: tuple) -> None:
    with open(f"{rendezvous}-{rank}.stderr", "wb") as file:
        os.dup2(file.fileno(), 2)
    faulthandler.enable()
    torch.set_num_threads(1)
    worker = Worker(rank, world_size)
    join_group(worker, rendezvous)
    try:
        function(worker, *arguments)
    finally:
        dist.destroy_process_group()
    # Its work is done and in files. The interpreter's end is left out: native threads of the libraries that are loaded
    # can abort it there, as seen on a busy machine ("terminate called without an active exception").
    sys.stdout.flush()
    os._exit(0)
