"""Stopping a training between two steps because the machine is about to be taken away.

SIGTERM in the training's own process (plain, or started by torchrun) sets a flag. Ray's workers get no signal: their
driver writes the stop file into the stage's scratch folder. The loop asks at every step boundary, saves a checkpoint
and leaves with exit code 75.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from genrec_dist.errors import Preempted
from genrec_dist.pipeline import StageContext
from genrec_dist.training.worker import Worker

LOOK_SECONDS = 0.5


def stop_file(context: StageContext) -> Path:
    """The file that asks the workers of this stage to stop."""
    return context.scratch / "stop"


def ask_to_stop(context: StageContext) -> None:
    """Write the stop file. A full disk must not keep the process from leaving."""
    with contextlib.suppress(OSError):
        stop_file(context).touch()


def stopped_file(context: StageContext) -> Path:
    """The file that says that the workers did stop: a Ray worker cannot say it with an exit code."""
    return context.scratch / "stopped"


def forget_stop(context: StageContext) -> None:
    """Remove both files of an earlier attempt; to be done before workers start."""
    stop_file(context).unlink(missing_ok=True)
    stopped_file(context).unlink(missing_ok=True)


class OnSigterm:
    """Context manager: the first SIGTERM calls `react`, the second raises `Preempted`, as does the end of the grace.

    Outside the main thread it does nothing: Python delivers signals there only.

    Args:
        grace_seconds: from the first SIGTERM to leaving anyway.
    """

    def __init__(self, grace_seconds: float) -> None:
        self.grace_seconds = grace_seconds
        self.received = False
        self._timer: threading.Timer | None = None
        self._old: object = None
        self._active = False

    def react(self) -> None:
        """What the first SIGTERM does."""

    def __enter__(self):
        self._active = threading.current_thread() is threading.main_thread()
        if self._active:
            self._old = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._active:
            signal.signal(signal.SIGTERM, self._old)  # type: ignore[arg-type]
            if self.received and exc[0] is None:  # too late for this work: whoever comes next has to leave
                os.kill(os.getpid(), signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise Preempted
        self.received = True
        self._timer = threading.Timer(self.grace_seconds, os.kill, (os.getpid(), signal.SIGTERM))
        self._timer.daemon = True
        self._timer.start()
        self.react()


class StopRequest(OnSigterm):
    """Whether this training has to stop; a context manager around its loop.

    Args:
        context: of the stage.
        worker: this process. Rank 0 decides for all; a signal to another rank reaches it as the stop file.
    """

    def __init__(self, context: StageContext, worker: Worker) -> None:
        super().__init__(context.runtime.grace_seconds)
        self.context, self.worker = context, worker
        self._looked, self._asked = 0.0, False

    def react(self) -> None:
        if not self.worker.is_main:
            ask_to_stop(self.context)

    def requested(self) -> bool:
        """True when a stop was asked for. To be called on rank 0 at each step boundary; cheap."""
        now = time.monotonic()
        if not self._asked and now - self._looked >= LOOK_SECONDS:
            self._looked = now
            self._asked = stop_file(self.context).exists()
        return self.received or self._asked

    def leave(self, step: int) -> NoReturn:
        """Leave the training; every rank has to, after the checkpoint of `step` is written.

        Raises:
            Preempted: always.
        """
        if self.worker.is_main:
            with contextlib.suppress(OSError):  # a full disk must not hide why the training ends
                self.context.event("training_stopped", step=step)
                stopped_file(self.context).touch()
        raise Preempted
