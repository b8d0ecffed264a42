"""Several runs of a study at once, each a child `genrec run`: for GPUs that small runs share.

A run that fails is reported and the others go on. The store's locks keep two from building one artifact; so that none
waits there with a place taken, a run starts when what it would build first is in no hands. Where there are several
GPUs, each run gets the one that the fewest others have. Knows nothing of clusters.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from genrec_dist.errors import EXIT_BUG, ConfigError
from genrec_dist.pipeline import Stage, closure
from launcher.failures import Failure, Stopped, explain
from launcher.run import is_finished
from launcher.screen import duration
from launcher.signals import SignalWatch

if TYPE_CHECKING:
    from launcher.study_plan import Planned

POLL_SECONDS = 0.2
LEAVE_SECONDS = 60
"""How long a child may take to save and leave, beyond its own grace."""


@dataclass
class Job:
    """One run as a child process.

    Args:
        name: of the run.
        command: that makes it.
        stages: what it executes.
        log: gets what it prints.
        grace: seconds it is given to leave.
        one_gpu: it works on one GPU, where there are any.
    """

    name: str
    command: list[str]
    stages: list[Stage]
    log: Path
    grace: float = LEAVE_SECONDS
    one_gpu: bool = False
    gpu: str | None = field(default=None, repr=False)
    process: subprocess.Popen | None = field(default=None, repr=False)
    started: float = 0.0

    def missing(self, store: Path) -> list[tuple[str, str]]:
        """Stages that it still has to build, in order."""
        needed = closure(self.stages, lambda stage: is_finished(stage, store))
        return [(stage.name, stage.key) for stage in needed if not is_finished(stage, store)]

    def start(self, gpu: str | None = None) -> None:
        """Start the child in a process group of its own: a Ctrl-C reaches it once, through this process.

        Args:
            gpu: the one that it sees; None: all.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.gpu = gpu
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {})
        self.started = time.monotonic()
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                process_group=0,
            )


def refuse_cluster(runs: Sequence[Planned]) -> None:
    """Children that would each start a Ray of their own, or share a cluster's resources unasked.

    Raises:
        ConfigError: `runtime.backend` is not local.
    """
    backends = {planned.config.runtime.backend for planned in runs}
    if backends != {"local"}:
        raise ConfigError(
            "several runs at once are plain processes",
            where="--parallel",
            got=f"runtime.backend = {', '.join(sorted(backends - {'local'}))}",
            expected="runtime.backend = local",
            fix="add --set runtime.backend=local",
        )


def make_job(planned: Planned, store: Path, runs: Path, folder: Path, parallel: int) -> Job:
    """The child `genrec run` of a planned run; it gets its share of the cores where nothing else is asked for."""
    overrides = list(planned.overrides)
    if not planned.config.runtime.num_threads:
        overrides.append(f"runtime.num_threads={max(1, (os.cpu_count() or 1) // parallel)}")
    command = [sys.executable, "-m", "launcher.cli", "run", str(planned.source)]
    for text in overrides:
        command += ["--set", text]
    command += ["--store", str(store), "--runs", str(runs)]
    command += ["--until", planned.until] if planned.until else []
    name = planned.config.name
    runtime = planned.config.runtime
    one_gpu = runtime.num_workers * runtime.vllm.tensor_parallel_size == 1 and runtime.device != "cpu"
    grace = runtime.grace_seconds + LEAVE_SECONDS
    return Job(name, command, planned.stages, folder / "logs" / f"{name}.log", grace, one_gpu)


def run_jobs(
    jobs: Sequence[Job], limit: int, store: Path, console: Console, gpus: Sequence[str] = ()
) -> Failure | None:
    """Run all jobs, at most `limit` at once.

    Args:
        gpus: what CUDA_VISIBLE_DEVICES calls those that the jobs share.

    Returns:
        None when all went well, else a failure with the exit code of the first that did not.

    Raises:
        Stopped: a signal arrived, and all children have saved and ended.
    """
    waiting = list(jobs)
    active: list[Job] = []
    failed: list[Job] = []
    with SignalWatch() as signals:
        try:
            while waiting or active:
                for job in [job for job in active if job.process and job.process.poll() is not None]:
                    active.remove(job)
                    if not _ended_well(job, console):
                        failed.append(job)
                while len(active) < limit and (found := _next(waiting, active, store)) is not None:
                    waiting.remove(found)
                    active.append(found)
                    text = f"run {len(jobs) - len(waiting)} of {len(jobs)}: {found.name}"
                    console.print(f"[bold]{escape(text)}[/]", soft_wrap=True)
                    found.start(_least_used(gpus, active) if found.one_gpu else None)
                time.sleep(POLL_SECONDS)
        except BaseException as error:
            seen = signals.seen()
            _stop(active)
            raise Stopped(explain(error, seen)) from error
    if not failed:
        return None
    names = ", ".join(f"{job.name} ({_ending(job)})" for job in failed)
    logs = ", ".join(str(job.log) for job in failed[:3])
    text = f"{len(failed)} of {len(jobs)} runs failed; the others are complete\n  got: {names}\n  logs: {logs}"
    return Failure(_code(failed[0]), "RunsFailed", f"{text}\n  fix: the same command goes on with these")


def _next(waiting: list[Job], active: list[Job], store: Path) -> Job | None:
    """The first job whose first stage to build no running child has before it."""
    taken = {stage for job in active for stage in job.missing(store)}
    for job in waiting:
        missing = job.missing(store)
        if not missing or missing[0] not in taken:
            return job
    return None


def _least_used(gpus: Sequence[str], active: list[Job]) -> str | None:
    return min(gpus, key=[job.gpu for job in active].count) if len(gpus) > 1 else None


def _ended_well(job: Job, console: Console) -> bool:
    took = duration(time.monotonic() - job.started)
    if _code(job) == 0:
        console.print(escape(f"{job.name}: finished in {took}"), soft_wrap=True)
        return True
    said = job.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-4:]
    last = "\n".join(f"  {line}" for line in said)
    console.print(escape(f"{job.name}: {_ending(job)} after {took}\n{last}"), soft_wrap=True)
    return False


def _ending(job: Job) -> str:
    code = job.process.returncode if job.process else EXIT_BUG
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def _code(job: Job) -> int:
    """Exit code of a job that ended; one that a signal killed counts as a bug, like any other surprise."""
    code = job.process.returncode if job.process else EXIT_BUG
    return code if code >= 0 else EXIT_BUG


def _stop(active: list[Job]) -> None:
    """Have the children save and leave, and wait for them; one that does not leave in time is killed with its group."""
    running = [job for job in active if job.process and job.process.poll() is None]
    for job in running:
        assert job.process is not None
        job.process.send_signal(signal.SIGTERM)
    end = time.monotonic() + max((job.grace for job in running), default=0)
    for job in running:
        assert job.process is not None
        try:
            job.process.wait(max(0.0, end - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt, SystemExit):  # or the user asked a second time
            os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()
