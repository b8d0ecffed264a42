"""What machines have and what units of a sweep need: cores, memory, GPUs. Estimates say how many run side by side."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import psutil

from genrec_dist.config import Config
from genrec_dist.errors import ClusterError

GIB = 1 << 30
PROCESS_BYTES = 1.0 * GIB
"""What a process takes beside its model: interpreter, libraries, tables of the catalog."""
GPU_PROCESS_BYTES = 1.0 * GIB
"""What a process has of a GPU beside PyTorch's allocator: context, kernels, libraries. On an H100 .95 GiB, measured."""
MARGIN = 1.25
"""What an allocator reserves over what is in use: blocks of sizes that do not fit each other, workspaces, tables."""
CORES_BESIDE_GPU = 8
"""Of stages for several trials, some of which work on the CPU."""
GPU_STEP = 0.05


@dataclass(frozen=True)
class Machine:
    """One host.

    Args:
        cores: that this process may use.
        memory: bytes.
        gpus: bytes of each visible GPU.
        names: what CUDA_VISIBLE_DEVICES calls them; none: their places.
    """

    cores: int
    memory: float
    gpus: tuple[float, ...] = ()
    names: tuple[str, ...] = ()

    @property
    def gpu_names(self) -> tuple[str, ...]:
        """One for each GPU."""
        return self.names or tuple(str(place) for place in range(len(self.gpus)))


@dataclass(frozen=True)
class Need:
    """What a unit takes while it runs.

    Args:
        cores: CPU cores, also its threads.
        memory: bytes of the host.
        gpu: share of a GPU of each worker; 0: none.
        workers: processes; each takes cores and a share of a GPU of its own.
    """

    cores: int
    memory: float
    gpu: float = 0.0
    workers: int = 1


def this_machine(device: str) -> Machine:
    """This host, without its GPUs where `runtime.device` is the CPU."""
    found = [] if device == "cpu" else _visible_gpus()
    sizes, names = tuple(size for _, size in found), tuple(name for name, _ in found)
    return Machine(len(os.sched_getaffinity(0)), _memory(), sizes, names)


def _memory() -> float:
    """Memory of this host, or of the control group that this process is confined to."""
    total = float(psutil.virtual_memory().total)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, float(limit)) if limit.isdecimal() else total


def _visible_gpus() -> list[tuple[str, float]]:
    """Name and bytes of each visible GPU, up to the first entry that is none, as CUDA reads the variable."""
    try:
        out = subprocess.run(
            ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout  # fmt: skip
        rows = [[part.strip() for part in line.split(",")] for line in out.splitlines() if line.strip()]
        by_name = {name: float(mib) * (1 << 20) for index, uuid, mib in rows for name in (index, uuid)}
    except (OSError, subprocess.SubprocessError, ValueError):  # a GPU that shares the host's memory has no figure
        return []
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [index for index, _, _ in rows] if asked is None else [name.strip() for name in asked.split(",")]
    return [(name, by_name[name]) for name in takewhile(by_name.__contains__, names)]


def need_of(config: Config, estimate: float | None, machines: Sequence[Machine], parallel: int) -> Need:
    """What a trial takes: a core, or an equal part of them where the user says how many run at once.

    Args:
        config: its configuration.
        estimate: bytes of a worker's training, None where they are not known before the catalog is there.
        machines: where it may run.
        parallel: trials at once that the user asks for; 0: as many as fit.
    """
    runtime = config.runtime
    workers = runtime.num_workers
    most = max(machine.cores for machine in machines)
    cores = min(runtime.num_threads or (max(1, most // (parallel * workers)) if parallel else 1), most)
    needed = (estimate or 0.0) * MARGIN
    if not wants_gpu(config, machines):
        return Need(cores, (needed + PROCESS_BYTES) * workers, 0.0, workers)
    share = 1.0
    if workers == 1 and estimate is not None:
        smallest = min(size for machine in machines for size in machine.gpus)
        share = min(1.0, math.ceil((needed + GPU_PROCESS_BYTES) / (GPU_STEP * smallest)) * GPU_STEP)
    return Need(cores, PROCESS_BYTES * workers, share, workers)


def shared_need(config: Config, machine: Machine) -> Need:
    """What stages for several trials take: all cores; on GPUs half a one, so that trials that need other stages go on
    beside, or a whole one for each of several workers."""
    workers = config.runtime.num_workers
    share, cores = 0.0, machine.cores // workers
    if wants_gpu(config, [machine]):
        share = 0.5 if workers == 1 else 1.0
        cores = min(CORES_BESIDE_GPU, machine.cores // max(workers, len(machine.gpus)))
    return Need(config.runtime.num_threads or max(1, cores), PROCESS_BYTES * workers, share, workers)


def wants_gpu(config: Config, machines: Sequence[Machine]) -> bool:
    """True when a run takes a GPU for each worker: asked for, or there."""
    return config.runtime.device != "cpu" and any(len(m.gpus) >= config.runtime.num_workers for m in machines)


def refuse_too_large(estimates: dict[str, float | None], on_gpu: bool, machines: Sequence[Machine]) -> None:
    """Refuse a sweep whose largest trial fits nowhere, before any trial starts.

    Args:
        estimates: bytes of a worker's training, by trial.
        on_gpu: trials run on GPUs.
        machines: where they may run.

    Raises:
        ClusterError: with the largest trial and what there is.
    """
    known = {name: value for name, value in estimates.items() if value is not None}
    if not known:
        return
    room = max((size for m in machines for size in m.gpus), default=0.0) if on_gpu else max(m.memory for m in machines)
    base = GPU_PROCESS_BYTES if on_gpu else PROCESS_BYTES
    too_large = sorted((name for name, value in known.items() if value + base > room), key=lambda name: -known[name])
    if too_large:
        raise ClusterError(
            "the largest trial of the sweep fits on no machine",
            where=too_large[0],
            got=f"about {(known[too_large[0]] + base) / GIB:.1f} GiB a worker ({len(too_large)} trials are too large)",
            expected=f"at most {room / GIB:.1f} GiB, the largest {'GPU' if on_gpu else 'machine'}",
            fix="leave the largest depths out, lower optim.batch_size or raise runtime.num_workers with "
            "runtime.zero_stage, or set runtime.activation_checkpointing=true",
        )
