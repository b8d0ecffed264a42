"""Several processes on this host under torchrun's launcher, started again as the budgets allow.

torchrun's own restarts are not used: they count every end alike. What an end means: a worker that left with code 75 or
died of SIGTERM was told to stop from outside (a preemption); any other signal, the kernel's SIGKILL for lack of memory
among them, an exit code or an exception is a failure.
"""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from genrec_dist.cluster import worker_threads
from genrec_dist.errors import EXIT_PREEMPTED, Preempted
from genrec_dist.pipeline import StageContext
from genrec_dist.training import attempts
from genrec_dist.training.attempts import Cause, Retries
from genrec_dist.training.entry import WorkerFunction, exhausted, run_reporting
from genrec_dist.training.worker import plain_worker, setup_torch

TORCHRUN_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def launch_processes(function: WorkerFunction, context: StageContext, settings: dict) -> None:
    """Run the function in `runtime.num_workers` processes and wait.

    Raises:
        GenrecError: of a worker.
        TrainingError: a budget is spent.
        Preempted: this process got SIGTERM; it was passed on, and the workers had their grace.
    """
    retries = Retries(context)
    while True:
        attempts.prepare(context)
        cause = _attempt(function, context, settings)
        if cause is None:
            return
        typed = attempts.typed_failure(context)
        if typed is not None:
            raise typed
        if not retries.spend(cause):
            raise exhausted(context, cause)


def _attempt(function: WorkerFunction, context: StageContext, settings: dict) -> Cause | None:
    """One group of processes, to its end. None: all is done."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    launcher = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=context.runtime.num_workers,
        run_id=context.key or "genrec",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.5,
        shutdown_timeout=math.ceil(context.runtime.grace_seconds) + 5,  # the workers' own grace ends before
    )
    with _handlers_kept(), ExitWatch(context.runtime.num_workers) as watch:
        try:
            elastic_launch(launcher, _process_entry)(function, context, settings)
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            return _explain(context, watch.first() or (failure.pid, failure.exitcode))
        except SignalException as error:
            if error.sigval == signal.SIGTERM:
                raise Preempted from error
            raise KeyboardInterrupt from error
    return None


def _process_entry(function: WorkerFunction, context: StageContext, settings: dict) -> None:
    worker = plain_worker(context.runtime)
    setup_torch(worker, worker_threads(context.runtime))
    run_reporting(function, worker, context, settings)


def _explain(context: StageContext, end: tuple[int, int]) -> Cause:
    """What the end of the process that ended first means.

    Args:
        context: of the stage.
        end: its pid and its exit code; negative is a signal.
    """
    pid, code = end
    rank = next((record["rank"] for record in attempts.workers(context) if record["pid"] == pid), None)
    details: dict[str, Any] = {} if rank is None else {"rank": rank}
    hung = attempts.hung(context)
    if hung is not None:  # whichever of them ended first
        return hung
    if code < 0:
        name = signal.Signals(-code).name
        stopped = -code == signal.SIGTERM
        return Cause("worker_stopped" if stopped else "worker_died", f"died of {name}", details | {"signal": name})
    if code == EXIT_PREEMPTED:
        return Cause("worker_stopped", "was told to stop", details | {"exit_code": code})
    said = attempts.failures(context).get(-1 if rank is None else rank)
    if said is not None:
        return Cause("error", said, details | {"exit_code": code})
    return Cause("worker_died", f"left with exit code {code}", details | {"exit_code": code})


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Put back the handlers that torchrun's launcher replaces: its SIGTERM would be an ordinary exception later on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.getsignal(number) for number in TORCHRUN_SIGNALS}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class ExitWatch:
    """Context manager: which of the processes that are started meanwhile ends first, and how.

    The launcher reports whichever failed process it finds first, often one that only lost its peer.

    Args:
        count: processes to find.
    """

    def __init__(self, count: int, seconds: float = 0.02) -> None:
        self.count, self.seconds = count, seconds
        self._before = {child.pid for child in psutil.Process().children()}
        self._pids: set[int] = set()
        self._ends: list[tuple[int, int]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="exit-watch", daemon=True)

    def __enter__(self) -> ExitWatch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def first(self) -> tuple[int, int] | None:
        """Pid and exit code of the first that failed; of several found together, one that a signal ended."""
        return self._ends[0] if self._ends else None

    def _watch(self) -> None:
        while not self._done.wait(self.seconds):
            if len(self._pids) < self.count:
                self._find()
            failed = []
            for pid in self._pids - {pid for pid, _ in self._ends}:
                code = _peek(pid)
                if code:
                    failed.append((pid, code))
            self._ends += sorted(failed, key=lambda end: end[1])

    def _find(self) -> None:
        for child in psutil.Process().children():
            if child.pid not in self._before:
                try:
                    if any("spawn_main" in word for word in child.cmdline()):
                        self._pids.add(child.pid)
                except psutil.Error:  # gone before it could be asked
                    continue


def _peek(pid: int) -> int | None:
    """Exit code of a child that has ended, which stays to be collected by its owner; negative is a signal."""
    try:
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # collected already
        return None
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
