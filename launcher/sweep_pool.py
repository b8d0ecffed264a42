"""Child processes of a sweep on this machine: how many fit, which GPU they get, how they end, telling them to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from genrec_dist.studies.scaling.plan import Unit
from launcher.sweep_machine import Machine, Need

Command = Callable[[Unit, dict[str, Any]], list[str]]
"""(unit, settings of the runtime section) -> command line of its child process."""
FULL = 1.0 + 1e-9


class Pool(Protocol):
    """Where units run."""

    @property
    def running(self) -> set[str]: ...

    def has_room(self, unit: Unit) -> bool:
        """True when the unit can start now."""

    def start(self, unit: Unit) -> None: ...

    def ended(self) -> list[tuple[Unit, int | None]]:
        """Units that have ended since the last call, with exit codes; negative: a signal; None: lost with its node."""

    def grow(self, unit: Unit) -> float:
        """Give a unit twice its share of a GPU, up to a whole one, for its next start.

        Returns:
            The new share; 0 where it had no GPU, or its GPUs to itself.
        """

    def tell(self, number: signal.Signals) -> None:
        """Send every unit a signal."""

    def close(self) -> None:
        """Kill what still runs and let go of everything."""


@dataclass
class _Child:
    unit: Unit
    process: subprocess.Popen
    need: Need
    gpus: tuple[int, ...]


@dataclass
class LocalPool:
    """Children of this process; use it in one thread that lives as long as they do.

    Args:
        machine: this host.
        needs: by unit.
        parallel: most units at once; 0: as many as fit.
        command: makes command lines.
        logs: folder of what children print.
        runtime: settings of the runtime section for all of them.
    """

    machine: Machine
    needs: dict[str, Need]
    parallel: int
    command: Command
    logs: Path
    runtime: dict[str, Any] = field(default_factory=dict)
    _children: dict[str, _Child] = field(default_factory=dict)

    @property
    def running(self) -> set[str]:
        return set(self._children)

    def has_room(self, unit: Unit) -> bool:
        """One unit always has room."""
        if not self._children:
            return True
        if self.parallel and len(self._children) >= self.parallel:
            return False
        need = self.needs[unit.name]
        held = [child.need for child in self._children.values()]
        if sum(n.cores * n.workers for n in [*held, need]) > max(self.machine.cores, self.parallel):
            return False
        if sum(n.memory for n in [*held, need]) > self.machine.memory:
            return False
        return need.gpu == 0 or self._free_gpus(need) is not None

    def start(self, unit: Unit) -> None:
        need = self.needs[unit.name]
        gpus = (self._free_gpus(need) or tuple(range(len(self.machine.gpus)))) if need.gpu else ()
        environment = dict(os.environ)
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.machine.gpu_names[i] for i in gpus)
        self.logs.mkdir(parents=True, exist_ok=True)
        with open(self.logs / f"{unit.name}.log", "ab") as log:
            process = subprocess.Popen(
                self.command(unit, self.runtime | {"num_threads": need.cores}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches this process alone, which tells them
            )
        self._children[unit.name] = _Child(unit, process, need, gpus)

    def ended(self) -> list[tuple[Unit, int | None]]:
        done = [child for child in self._children.values() if child.process.poll() is not None]
        for child in done:
            del self._children[child.unit.name]
        return [(child.unit, child.process.returncode) for child in done]

    def grow(self, unit: Unit) -> float:
        return grow(self.needs, unit)

    def tell(self, number: signal.Signals) -> None:
        for child in self._children.values():
            child.process.send_signal(number)

    def close(self) -> None:
        for child in self._children.values():
            end_group(child.process)
        self._children.clear()

    def _free_gpus(self, need: Need) -> tuple[int, ...] | None:
        """A GPU with room for each worker, the least used ones; None: there are not as many."""
        used = [0.0] * len(self.machine.gpus)
        for child in self._children.values():
            for gpu in child.gpus:
                used[gpu] += child.need.gpu
        free = sorted((load, i) for i, load in enumerate(used) if load + need.gpu <= FULL)
        return tuple(sorted(i for _, i in free[: need.workers])) if len(free) >= need.workers else None


def grow(needs: dict[str, Need], unit: Unit) -> float:
    """See `Pool.grow`; changes `needs`."""
    need = needs[unit.name]
    if not 0 < need.gpu < 1:
        return 0.0
    needs[unit.name] = replace(need, gpu=min(1.0, 2 * need.gpu))
    return needs[unit.name].gpu


def end_group(process: subprocess.Popen) -> None:
    """Kill a child that leads a session, with whatever it has started."""
    deadline = time.monotonic() + 5
    while process.poll() is None and time.monotonic() < deadline:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    process.wait()
