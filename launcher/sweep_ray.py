"""Units of a sweep on a Ray cluster.

A trial of one worker is a Ray task around a child process, placed by cores, memory and shares of GPUs. What uses Ray
itself (shared stages, trials of several workers) is a child of this process that joins the same cluster.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from genrec_dist.errors import EXIT_BUG
from genrec_dist.studies.scaling.plan import Unit
from launcher.sweep_machine import Machine, Need, this_machine
from launcher.sweep_pool import LocalPool, end_group, grow

POLL_SECONDS = 0.3
INVENTORY_SECONDS = 60.0


class RayPool:
    """See `sweep_pool.Pool`.

    Args:
        ray: the module, connected.
        folder: of the sweep; a file in it tells tasks to stop.
        needs: by unit.
        machines: of the cluster.
        parallel: most units at once; 0: as many as fit.
        here: children of this process.
        owner: name of this call, part of the stop file's.
    """

    def __init__(
        self,
        ray: Any,
        folder: Path,
        needs: dict[str, Need],
        machines: list[Machine],
        parallel: int,
        here: LocalPool,
        owner: str,
    ) -> None:
        self.ray, self.folder, self.needs, self.parallel, self.here = ray, folder, needs, parallel, here
        self.stop_file = folder / "claims" / f"{owner}.stop"
        self.cores = sum(machine.cores for machine in machines)
        self.gpus = sum(len(machine.gpus) for machine in machines)
        self.memory = max(machine.memory for machine in machines)
        self._tasks: dict[Any, Unit] = {}

    @property
    def running(self) -> set[str]:
        return {unit.name for unit in self._tasks.values()} | self.here.running

    def has_room(self, unit: Unit) -> bool:
        """Whether the cluster's totals have room; which node takes the task is Ray's to say."""
        running = self.running
        if not running:
            return True
        if self.parallel and len(running) >= self.parallel:
            return False
        needs = [self.needs[name] for name in running | {unit.name}]
        return (
            sum(n.cores * n.workers for n in needs) <= max(self.cores, self.parallel)
            and sum(n.gpu * n.workers for n in needs) <= self.gpus + 1e-9
        )

    def start(self, unit: Unit) -> None:
        if uses_ray(unit):
            self.here.start(unit)
            return
        need = self.needs[unit.name]
        task = self.ray.remote(run_child).options(
            num_cpus=need.cores,
            num_gpus=need.gpu,
            memory=int(min(need.memory, self.memory / 2)),
            max_retries=0,
            name=unit.name,
        )
        runtime = {"backend": "local", "ray_address": None, "num_threads": need.cores}
        self._tasks[task.remote(str(self.folder), unit.name, json.dumps(runtime), str(self.stop_file))] = unit

    def ended(self) -> list[tuple[Unit, int | None]]:
        done, _ = self.ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=0) if self._tasks else ([], [])
        return [(self._tasks.pop(ref), self._code(ref)) for ref in done] + self.here.ended()

    def _code(self, ref: Any) -> int | None:
        from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

        try:
            return self.ray.get(ref)
        except OutOfMemoryError:
            return -signal.SIGKILL
        except RayTaskError as error:  # a full or stale disk where the child was to start; the others go on
            logging.getLogger(__name__).warning("a unit could not be started: %s", error)
            return EXIT_BUG
        except RayError:  # its worker or node is gone
            return None

    def grow(self, unit: Unit) -> float:
        return grow(self.needs, unit)

    def tell(self, number: signal.Signals) -> None:
        self.stop_file.parent.mkdir(parents=True, exist_ok=True)
        self.stop_file.write_text(str(int(number)), encoding="ascii")
        self.here.tell(number)

    def close(self) -> None:
        for ref in self._tasks:
            self.ray.cancel(ref, force=True)
        self._tasks.clear()
        self.here.close()
        self.stop_file.unlink(missing_ok=True)


def uses_ray(unit: Unit) -> bool:
    """True for units that spread their own work over the cluster."""
    return unit.shared or unit.config.runtime.num_workers > 1


def run_child(folder: str, name: str, runtime: str, stop_file: str) -> int:
    """A unit's child process on whichever node Ray chose; its exit code.

    Args:
        folder: of the sweep.
        name: of the unit.
        runtime: settings of the runtime section, JSON.
        stop_file: holds the number of a signal once the children are to get it.
    """
    stop, told = Path(stop_file), False
    log = Path(folder) / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as out:
        process = subprocess.Popen(
            child_command(folder, name, json.loads(runtime)),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while process.poll() is None:
            if not told and stop.exists():
                told = True
                process.send_signal(int(stop.read_text(encoding="ascii") or signal.SIGTERM))
            time.sleep(POLL_SECONDS)
        return process.returncode
    finally:
        if process.poll() is None:
            end_group(process)


def child_command(folder: str, name: str, runtime: dict[str, Any]) -> list[str]:
    """Command line of a unit's child process; to be called by the process that will be its parent."""
    return [sys.executable, "-m", "launcher.sweep_child", folder, name, str(os.getpid()), json.dumps(runtime)]


def cluster_machines(ray: Any, device: str) -> list[Machine]:
    """What each living node of the cluster has; each looks at itself."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(this_machine)
    refs, cores = [], []
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("CPU"):
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            refs.append(look.options(num_cpus=0, scheduling_strategy=strategy).remote(device))
            cores.append(int(node["Resources"]["CPU"]))
    found = ray.get(refs, timeout=INVENTORY_SECONDS)
    return [Machine(count, machine.memory, machine.gpus) for count, machine in zip(cores, found)]
