"""What a training or evaluation function knows of its worker: rank, world size, device, collectives.

Ray Train, torchrun or a plain call can supply it, so the same loop runs in all three. Knows nothing of models.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from genrec_dist.config import RuntimeConfig
from genrec_dist.errors import ClusterError

BESIDE_GPU = 4
"""Threads of a worker whose work is on a GPU, at most: more of them spin for a few rows, in the way of others."""


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Worker:
    """One process of a distributed job.

    Args:
        rank: 0..world_size-1.
        world_size: number of processes.
        device: where this process computes.
        alive: to be called between the parts of long work, so that a watchdog does not take it for a hang.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    alive: Callable[[], None] = field(default=_nothing, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all workers, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Worker 0's values everywhere, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def tell(self, flags: list[bool]) -> list[bool]:
        """Worker 0's flags everywhere, host to host: no worker waits for its GPU."""
        if self.world_size == 1:
            return flags
        values = torch.tensor([float(flag) for flag in flags])
        dist.broadcast(values, 0, group=_host_group())
        return [bool(value) for value in values.tolist()]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def _host_group() -> dist.ProcessGroup | None:
    """A gloo group of all workers, made at the first call, which all make together; None: the default one is gloo."""
    if dist.get_backend() == "gloo":
        return None
    default = dist.distributed_c10d._get_default_group()
    if _host_groups.get("of") is not default:
        _host_groups.update({"of": default, "group": dist.new_group(backend="gloo")})
    return _host_groups["group"]


_host_groups: dict[str, Any] = {}


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """'auto', 'cpu' or 'cuda' -> device.

    Raises:
        ClusterError: cuda is asked for and not there.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ClusterError(
            "no CUDA device", where="runtime.device", got=name, expected="a visible GPU", fix="use device=cpu"
        )
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def plain_worker(runtime: RuntimeConfig, group: str = "group") -> Worker:
    """Worker of a plain process, or of torchrun when its environment variables are set.

    Args:
        runtime: says on which device.
        group: name of the process group, unlike that of any earlier group that met in the same store.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    device = pick_device(runtime.device, int(os.environ.get("LOCAL_RANK", "0")))
    if world_size > 1 and not dist.is_initialized():
        _join_group("nccl" if device.type == "cuda" else "gloo", group)
    return Worker(int(os.environ.get("RANK", "0")), world_size, device)


def _join_group(backend: str, name: str) -> None:
    """Join torchrun's group; its store outlives a restart, with dead processes' addresses in it: keys get a prefix."""
    store, rank, world_size = next(rendezvous("env://"))
    dist.init_process_group(backend, store=dist.PrefixStore(name, store), rank=rank, world_size=world_size)


def setup_torch(worker: Worker, threads: int) -> None:
    """Deterministic CPU kernels, TF32 on GPUs, a fixed thread count (results on CPU depend on it)."""
    on_gpu = worker.device.type == "cuda"
    torch.set_num_threads(min(threads, BESIDE_GPU) if on_gpu else threads)
    if on_gpu:
        torch.cuda.set_device(worker.device)
        torch.set_float32_matmul_precision("high")


@contextmanager
def exact_products() -> Iterator[None]:
    """Matrix products in full float32: TF32 has too few digits to rank a catalog or to choose between near codes."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
