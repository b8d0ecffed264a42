"""`genrec run` under `torchrun`: rank 0 does the work of the command, the others follow it into the trainings."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from genrec_dist.config import Config
from genrec_dist.errors import EXIT_OK, ConfigError, Preempted
from genrec_dist.training.company import company, rank, world_size
from launcher.failures import Stopped, explain
from launcher.streams import captured


def shared(config: Config) -> Config:
    """The configuration with torchrun's ranks as its workers; as it is without torchrun.

    Raises:
        ConfigError: Ray is asked for, or another number of workers than there are ranks.
    """
    ranks = world_size()
    if ranks == 1:
        return config
    runtime = config.runtime
    if runtime.backend != "local":
        raise ConfigError(
            "torchrun and Ray would both start the workers",
            where="runtime.backend",
            got=runtime.backend,
            expected="local under torchrun",
            fix="add --set runtime.backend=local, or call `genrec run` without torchrun",
        )
    if runtime.num_workers not in (1, ranks):
        raise ConfigError(
            "another number of workers than torchrun has started",
            where="runtime.num_workers",
            got=runtime.num_workers,
            expected=f"{ranks}, or nothing",
            fix="leave it out: every rank is one worker",
        )
    return config.model_copy(update={"runtime": runtime.model_copy(update={"num_workers": ranks})})


def refuse(command: str) -> None:
    """For commands that several processes cannot share.

    Raises:
        ConfigError: several ranks of torchrun each started the command.
    """
    if world_size() > 1:
        raise ConfigError(
            "every rank of torchrun would do the whole work",
            where="WORLD_SIZE",
            got=world_size(),
            expected="one process",
            fix=f"call `genrec {command}` without torchrun; `genrec run` can be under it",
        )


@contextmanager
def leading() -> Iterator[None]:
    """Around the work of rank 0: however it ends, the others leave with the same exit code."""
    if world_size() == 1:
        yield
        return
    met = company()
    code = EXIT_OK
    try:
        yield
    except BaseException as error:
        code = error.failure.exit_code if isinstance(error, Stopped) else explain(error).exit_code
        raise
    finally:
        met.dismiss(code)


def follows() -> bool:
    """True on every rank but the first."""
    return rank() > 0


def follow(run: Path) -> int:
    """Take part in the leader's trainings; the exit code of this process.

    Args:
        run: the run's folder; logs/rank-<rank>.log in it gets everything that is printed meanwhile.
    """
    old = signal.signal(signal.SIGTERM, _leave)
    try:
        with captured(run / "logs" / f"rank-{rank()}.log"):
            try:
                return company().follow()
            except BaseException as error:
                traceback.print_exc(file=sys.stderr)
                return explain(error).exit_code
    finally:
        signal.signal(signal.SIGTERM, old)


def _leave(number: int, frame: FrameType | None) -> None:
    raise Preempted
