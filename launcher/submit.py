"""`genrec submit` and `genrec job`: sending a run to a Ray cluster, and looking after it from outside.

Everything that can be wrong with the configuration, the folders and the package is found before anything is sent. The
run itself is `genrec run` in the cluster, on the same store and run folders, so that submitting again resumes it.
"""

from __future__ import annotations

import math
import re
import shlex
import tempfile
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from genrec_dist.artifacts.places import is_url, parse_url
from genrec_dist.config import Config, load_config
from genrec_dist.errors import ClusterError, ConfigError
from launcher import torchrun
from launcher.console import print_json
from launcher.run import check_batches
from launcher.submit_follow import TERMINAL, commands, exit_code, follow, head_restarted
from launcher.submit_jobs import FOLDER_KEY, RUN_KEY, JobServer, UnknownJob, Unreachable
from launcher.submit_package import CONFIG_FILE, for_cluster, make_package

STOP_MARGIN_SECONDS = 15
"""Between the end of a run's grace time and the SIGKILL that Ray sends to a job that was stopped."""


def resolve(config: Path, settings: list[str] | None, name: str | None) -> Config:
    """The configuration of a submitted run, checked as far as it can be without the cluster's files.

    Raises:
        ConfigError: any key or value is wrong, the batch cannot be shared, or the run would not use Ray.
    """
    torchrun.refuse("submit")
    resolved = load_config(config, [*(settings or []), *([f"name={name!r}"] if name else [])])
    check_batches(resolved)
    if resolved.runtime.backend != "ray":
        raise ConfigError(
            "a submitted run works through Ray",
            where="runtime.backend",
            got=resolved.runtime.backend,
            expected="ray",
            fix="leave the setting out",
        )
    return for_cluster(resolved)


def shared_place(value: str | None, option: str) -> str:
    """Check a folder that the cluster's nodes see, or a place in a bucket.

    Raises:
        ConfigError: none given, a path that means another folder on every machine, or no S3 URL.
    """
    if value and is_url(value):
        return str(parse_url(value, option))
    if value and PurePosixPath(value).is_absolute():
        return value
    raise ConfigError(
        "the cluster's nodes need a folder that all of them see",
        where=option,
        got=value or "nothing",
        expected="an absolute path on the cluster's shared file system, or s3://BUCKET/PREFIX",
        fix=f"give {option}, or set GENREC_{option.strip('-').upper()}",
    )


def command_of(config: Config, store: str, runs: str, file: str = CONFIG_FILE) -> list[str]:
    """The options of `genrec run` for this job."""
    return ["run", file, "--name", config.name, "--store", store, "--runs", runs]


def submit(
    config: Config, *, store: str, runs: str, address: str, wait: bool, timeout: float, console: Console
) -> None:
    """Send a run to a cluster, and wait for its end.

    Raises:
        ConfigError: the run is at work already, or the package is too large.
        ClusterError: the cluster cannot be reached, refuses the token, or lost the job.
        Stopped: the job failed or was stopped.
    """
    if config.catalog.path and not PurePosixPath(config.catalog.path).is_absolute():
        _say(console, f"note: catalog.path '{config.catalog.path}' is looked for in the nodes' $GENREC_DATA")
    with tempfile.TemporaryDirectory(prefix="genrec-") as folder:
        package = make_package(config, Path(folder))
        server = JobServer(address)
        _say(console, f"package: {package.num_files} files, {package.num_bytes / 1024:,.0f} KiB")
        try:
            job = free_id(server, config.name, runs)
            server.submit(
                job=job,
                entrypoint="exec python -m launcher.cli " + shlex.join(command_of(config, store, runs)),
                package=package.path,
                env={"RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(config.runtime.grace_seconds) + STOP_MARGIN_SECONDS)},
                metadata={RUN_KEY: config.name, FOLDER_KEY: runs},
            )
        except (Unreachable, UnknownJob) as error:
            raise ClusterError(
                "the connection broke while submitting",
                where=server.address,
                got=str(error),
                fix="submit again: a run that is at work already is refused",
            ) from error
    _say(console, f"job: {job}")
    for what, text in commands(server, job).items():
        _say(console, f"  {what + ':':<8}{text}")
    if wait:
        _follow(server, job, timeout, console)


def free_id(server: JobServer, name: str, runs: str) -> str:
    """Submission id of the next attempt: NAME-1, NAME-2, ... Two submitters at once get the same, and Ray takes one.

    Raises:
        ConfigError: a job of this run is not over yet.
    """
    jobs = server.jobs()
    mine = {RUN_KEY: name, FOLDER_KEY: runs}
    for job in jobs:
        if mine.items() <= (job.metadata or {}).items() and str(job.status) not in TERMINAL:
            raise ConfigError(
                "the run is at work already",
                where=server.address,
                got=f"job {job.submission_id}, {job.status}",
                fix=f"follow it ({commands(server, job.submission_id)['logs']}), stop it, or choose another --name",
            )
    attempts = [re.fullmatch(re.escape(name) + r"-(\d+)", job.submission_id) for job in jobs]
    return f"{name}-{1 + max((int(match[1]) for match in attempts if match), default=0)}"


def job_status(address: str, job: str, json: bool, console: Console) -> None:
    """Print the state of a job.

    Raises:
        ClusterError: the cluster cannot be asked, or does not know the job.
    """
    server, info = _ask(address, job, JobServer.info)
    over = str(info.status) in TERMINAL
    metadata = info.metadata or {}
    found = {
        "job": job,
        "status": str(info.status),
        "exit_code": exit_code(info) if over else None,
        "driver_exit_code": info.driver_exit_code,
        "run": metadata.get(RUN_KEY),
        "runs": metadata.get(FOLDER_KEY),
        "started": _time(info.start_time),
        "ended": _time(info.end_time),
        "message": (info.message or "").strip().split("\n")[0],
    }
    if json:
        print_json(found)
        return
    ended = f", exit code {found['exit_code']}" if over else ""
    _say(console, f"{job}: {found['status']}{ended}")
    for key in ("run", "runs", "started", "ended", "message"):
        if found[key]:
            _say(console, f"  {key + ':':<9}{found[key]}")
    if not over:
        _say(console, f"  {'stop:':<9}{commands(server, job)['stop']}")


def job_logs(address: str, job: str, wait: bool, timeout: float, console: Console) -> None:
    """Print what a job has printed; with `wait`, until it is over, and end as it did.

    Raises:
        ClusterError: the cluster cannot be asked, or does not know the job.
        Stopped: with `wait`, the job failed or was stopped.
    """
    if wait:
        _follow(JobServer(address), job, timeout, console)
    else:
        typer.echo(_ask(address, job, JobServer.logs)[1], nl=False)


def job_stop(address: str, job: str, console: Console) -> None:
    """Ask a job to stop: its run saves a checkpoint within `runtime.grace_seconds` and leaves.

    Raises:
        ClusterError: the cluster cannot be asked, or does not know the job.
    """
    server, running = _ask(address, job, JobServer.stop)
    if running:
        _say(console, f"{job} is asked to stop\n  see when it is over: {commands(server, job)['status']}")
    else:
        _say(console, f"{job} is over already")


def _ask(address: str, job: str, question: Callable[[JobServer, str], Any]) -> tuple[JobServer, Any]:
    server = JobServer(address)
    try:
        return server, question(server, job)
    except UnknownJob as error:
        raise head_restarted(server, job, str(error)) from error
    except Unreachable as error:
        raise ClusterError("the cluster cannot answer", where=server.address, got=str(error)) from error


def _follow(server: JobServer, job: str, timeout: float, console: Console) -> None:
    follow(
        server,
        job,
        timeout=timeout,
        show=lambda text: typer.echo(text, nl=False),
        note=lambda text: typer.echo(f"note: {text}", err=True),
    )
    _say(console, f"job {job} succeeded")


def _say(console: Console, text: str) -> None:
    console.print(escape(text), soft_wrap=True)


def _time(milliseconds: int | None) -> str | None:
    if not milliseconds:
        return None
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(milliseconds / 1000))
