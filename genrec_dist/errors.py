"""Typed errors of the project, each with the exit code of the command line.

Every error says what went wrong, where, what was found, what was expected and how to mend it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

EXIT_OK = 0
EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_DATA = 3
EXIT_CLUSTER = 4
EXIT_TRAINING = 5
EXIT_FAILED_ROWS = 6
EXIT_HUNG = 70  # of a worker process that its watchdog ended; never of the command
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130


class GenrecError(Exception):
    """Base of all errors that a user can mend.

    Args:
        what: one sentence saying what went wrong.
        where: dotted config key, file path or line.
        got: the value found.
        expected: what would have been right.
        fix: what to do about it.
    """

    exit_code = EXIT_BUG

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.where, self.got, self.expected, self.fix = what, where, got, expected, fix
        super().__init__(self.__str__())

    def __str__(self) -> str:
        lines = [self.what]
        for label, value in (
            ("where", self.where),
            ("got", self.got),
            ("expected", self.expected),
            ("fix", self.fix),
        ):
            if value is not None:
                lines.append(f"  {label}: {value}")
        return "\n".join(lines)

    def __reduce__(self):  # keyword-only arguments survive the trip through a Ray worker
        return _rebuild, (type(self), self.what, self.where, self.got, self.expected, self.fix)


def _rebuild(cls, what, where, got, expected, fix):
    return cls(what, where=where, got=got, expected=expected, fix=fix)


class ConfigError(GenrecError):
    """A setting is unknown, malformed or contradicts another."""

    exit_code = EXIT_USAGE


class DataError(GenrecError):
    """Input data are missing, broken beyond the configured fraction or of the wrong shape."""

    exit_code = EXIT_DATA


class ArtifactError(GenrecError):
    """A stored artifact is missing or does not match its manifest."""

    exit_code = EXIT_DATA


class ClusterError(GenrecError):
    """Ray, a worker or a resource is not available."""

    exit_code = EXIT_CLUSTER


class TrainingError(GenrecError):
    """Training cannot go on: non-finite loss, or retries exhausted."""

    exit_code = EXIT_TRAINING


class CheckpointError(GenrecError):
    """No valid checkpoint where one is required, one does not fit the model, or one could not be written."""

    exit_code = EXIT_TRAINING


class CheckpointSpaceError(CheckpointError):
    """The disk of the checkpoints is full: a resource, as for every other stage."""

    exit_code = EXIT_CLUSTER


class FailedRowsError(GenrecError):
    """The work finished, with more failed rows than the configuration allows."""

    exit_code = EXIT_FAILED_ROWS


class Preempted(SystemExit):
    """A training that was asked to stop, and has saved its state."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


def find_typed(error: BaseException) -> GenrecError | None:
    """The GenrecError that an error is, or that Ray or Ray Train wrapped."""
    for one in error_chain(error):
        # A RayTaskError is an instance of its cause's class as well, but its text is a remote traceback.
        cause = getattr(one, "cause", None)
        if isinstance(cause, GenrecError):
            return cause
        if isinstance(one, GenrecError):
            return one
    return None


def error_chain(error: BaseException) -> Iterator[BaseException]:
    """The error and everything inside it, nearest first."""
    todo, seen = deque([error]), set()
    while todo:
        one = todo.popleft()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        failures = getattr(one, "worker_failures", None)  # ray.train WorkerGroupError
        inner = [
            getattr(one, "cause", None),  # ray.exceptions.RayTaskError
            getattr(one, "_base_exc", None),  # ray.train's wrapper of user exceptions
            getattr(one, "controller_failure", None),
            *(failures.values() if isinstance(failures, dict) else ()),
            one.__cause__,
            None if one.__suppress_context__ else one.__context__,
        ]
        todo.extend(e for e in inner if isinstance(e, BaseException))
