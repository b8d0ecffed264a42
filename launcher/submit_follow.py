"""Waiting for a submitted job: its log on the screen, its end as an exit code, through lost connections.

Whether a job succeeded is what its terminal status says; the text of the log is shown and never judged.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from genrec_dist.errors import (
    EXIT_CLUSTER,
    EXIT_DATA,
    EXIT_FAILED_ROWS,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_PREEMPTED,
    EXIT_TRAINING,
    EXIT_USAGE,
    ClusterError,
)
from launcher.failures import Failure, Stopped
from launcher.submit_jobs import JobServer, UnknownJob, Unreachable

POLL_SECONDS = 2.0
LOG_BYTES_A_SECOND = 200_000
"""The whole log comes with each answer: a long one is asked for less often."""
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 1.0, 30.0
CODES_OF_A_RUN = {
    1, EXIT_USAGE, EXIT_DATA, EXIT_CLUSTER, EXIT_TRAINING, EXIT_FAILED_ROWS, EXIT_PREEMPTED, EXIT_INTERRUPTED
}  # fmt: skip
TERMINAL = {"SUCCEEDED", "FAILED", "STOPPED"}


def commands(server: JobServer, job: str) -> dict[str, str]:
    """What to type next about a job."""
    return {
        "status": f"genrec job status {job} --address {server.address}",
        "logs": f"genrec job logs {job} --address {server.address} --follow",
        "stop": f"genrec job stop {job} --address {server.address}",
    }


def follow(
    server: JobServer,
    job: str,
    *,
    timeout: float,
    show: Callable[[str], None],
    note: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Wait for the end of a job; returns when it succeeded.

    Args:
        server: the cluster.
        job: submission id.
        timeout: seconds without an answer after which waiting ends.
        show: gets the job's log, piece by piece.
        note: gets what happens to the connection.
        sleep: waits; for tests.
        clock: seconds; for tests.

    Raises:
        Stopped: the job failed or was stopped, or Ctrl-C ended the waiting (the job goes on).
        ClusterError: no answer for `timeout` seconds, or another head that does not know the job.
    """
    again = commands(server, job)
    try:
        info = _wait(server, job, timeout, show, note, sleep, clock)
    except KeyboardInterrupt:
        text = f"no longer waiting; job {job} goes on\n  stop it: {again['stop']}\n  look again: {again['logs']}"
        raise Stopped(Failure(EXIT_INTERRUPTED, "interrupted", text)) from None
    failure = failure_of(info, job)
    if failure is not None:
        raise Stopped(failure)


def _wait(
    server: JobServer,
    job: str,
    timeout: float,
    show: Callable[[str], None],
    note: Callable[[str], None],
    sleep: Callable[[float], None],
    clock: Callable[[], float],
) -> Any:
    shown = ""
    lost_at: float | None = None
    delay = FIRST_RETRY_SECONDS
    while True:
        try:
            if lost_at is not None and server.session_now() != server.session:
                raise UnknownJob("the head has another session")
            info = server.info(job)
        except UnknownJob as error:
            raise head_restarted(server, job, str(error)) from error
        except Unreachable as error:
            now = clock()
            if lost_at is None:
                lost_at, delay = now, FIRST_RETRY_SECONDS
                note(f"connection lost ({error}); trying again for {timeout:g} s")
            if now - lost_at >= timeout:
                raise ClusterError(
                    "the connection to the cluster is lost",
                    where=server.address,
                    got=str(error),
                    expected=f"an answer within {timeout:g} s",
                    fix=f"the job may well go on; look again: {commands(server, job)['logs']}",
                ) from error
            sleep(min(delay, max(lost_at + timeout - now, 0.0)))
            delay = min(2 * delay, LAST_RETRY_SECONDS)
            continue
        if lost_at is not None:
            note("connected again")
            lost_at = None
        log = _log(server, job)
        if log is not None:
            show(log.removeprefix(shown))
            shown = log
        if str(info.status) in TERMINAL:
            if log is None:
                note("the end of the job's log cannot be read")
            return info
        sleep(max(POLL_SECONDS, len(shown) / LOG_BYTES_A_SECOND))


def _log(server: JobServer, job: str) -> str | None:
    """The log, or None: its node may be gone while the head still answers."""
    try:
        return server.logs(job)
    except (Unreachable, UnknownJob, ClusterError):
        return None


def head_restarted(server: JobServer, job: str, got: str) -> ClusterError:
    """The error for a job that the cluster does not know (any more)."""
    return ClusterError(
        "the cluster does not know the job",
        where=server.address,
        got=got,
        expected=job,
        fix="if the head was restarted, submit again: finished stages and checkpoints are in the store, so it resumes",
    )


def exit_code(info: Any) -> int:
    """Exit code of this process for a job that is over: of its status, and where it failed of the run itself."""
    status = str(info.status)
    if status == "SUCCEEDED":
        return EXIT_OK
    if status == "STOPPED":
        return EXIT_INTERRUPTED
    return info.driver_exit_code if info.driver_exit_code in CODES_OF_A_RUN else EXIT_TRAINING


def failure_of(info: Any, job: str) -> Failure | None:
    """What to say of a job that is over; None when it succeeded."""
    code = exit_code(info)
    if code == EXIT_OK:
        return None
    if str(info.status) == "STOPPED":
        return Failure(code, "stopped", f"job {job} was stopped\n  fix: submit again; it resumes")
    if info.driver_exit_code in CODES_OF_A_RUN:
        return Failure(code, "failed", f"job {job} failed with exit code {code} of its run\n  got: see the log above")
    ended = "no exit code" if info.driver_exit_code is None else f"exit code {info.driver_exit_code}"
    lines = [line for line in (info.message or "").strip().splitlines() if line.strip()]
    reason = ": ".join(part for part in (str(info.error_type or ""), lines[0] if lines else "") if part)
    return Failure(code, "failed", f"job {job} failed, {ended}\n  got: {reason or 'no reason given'}")
