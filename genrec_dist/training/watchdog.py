"""Ending a worker that hangs, so that its group can be started again.

A thread waits for a sign of life after each step, batch of validation, or checkpoint. Without one for
`runtime.hang_seconds` it writes the stacks of all threads and an event, and ends the process: nothing milder gets a
main thread out of a collective whose peer is stuck. Every rank of a group that waits for a stuck one is silent too, so
all of them end, and the stacks tell which one was the cause.

In a plain process nobody starts anything again: the command itself ends, with the code of a failed training.

It does not see code that keeps Python's global lock; Ray asks such a worker for its health in vain and ends it.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from genrec_dist.artifacts.files import write_json
from genrec_dist.errors import EXIT_HUNG, EXIT_TRAINING
from genrec_dist.pipeline import StageContext
from genrec_dist.training.attempts import hung_file
from genrec_dist.training.worker import Worker

# Of a plain process; set by the command line, which tells the user and the run's events.
last_words: Callable[[str], None] | None = None


def stacks_file(context: StageContext, rank: int) -> Path:
    """Where the stacks of a rank that hung are: with the run's logs, for the scratch folder goes when all is well."""
    logs = context.scratch if context.events_file is None else context.events_file.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    return logs / f"stacks-{context.title or 'training'}-{rank}.txt"


class Watchdog:
    """Context manager around a training; armed by the first finished step.

    Args:
        context: of the stage; gets the event `worker_hung`, the stacks, and a record for whoever launched this worker.
        worker: this process.
        leave: ends the process.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        context: StageContext,
        worker: Worker,
        *,
        leave: Callable[[int], None] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.context, self.rank, self.leave, self.clock = context, worker.rank, leave, clock
        self.alone = worker.world_size == 1 and context.runtime.backend == "local"
        self.limit = context.runtime.hang_seconds
        self._poll = min(1.0, self.limit / 10)
        self.worker = replace(worker, alive=self.beat)
        self.phase, self.step = "step", 0
        self._last = clock()
        self._armed = False
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self.limit:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def beat(self, phase: str | None = None) -> None:
        """A sign of life.

        Args:
            phase: what begins now, such as 'step', 'validation' or 'checkpoint'; None: the same goes on.
        """
        self._last = self.clock()
        if phase is not None:
            self.phase = phase

    def step_done(self, step: int) -> None:
        """A step is finished: `step` of them so far. From the first on, silence counts."""
        self.step, self._armed = step, True
        self.beat("step")

    def silent_for(self) -> float:
        """Seconds since the last sign of life; 0 before the first finished step."""
        return self.clock() - self._last if self._armed else 0.0

    def _watch(self) -> None:
        while not self._done.wait(self._poll):
            silence = self.silent_for()
            if silence > self.limit:
                self._give_up(silence)
                return

    def _give_up(self, silence: float) -> None:
        file = stacks_file(self.context, self.rank)
        try:
            with open(file, "w", encoding="utf-8") as out:
                faulthandler.dump_traceback(out, all_threads=True)
            record = {
                "rank": self.rank,
                "step": self.step,
                "seconds": round(silence, 2),
                "phase": self.phase,
                "stacks": str(file),
            }
            write_json(hung_file(self.context, self.rank), record)
            self.context.event("worker_hung", **record)
            print(f"rank {self.rank} is silent for {silence:.0f} s in {self.phase} {self.step}", file=sys.stderr)
            faulthandler.dump_traceback(2, all_threads=True)
            if self.alone and last_words is not None:
                last_words(f"training hung: no sign of life for {silence:.0f} s; stacks: {file}")
            time.sleep(3 * self._poll)  # so that the others find their own silence before this end fails them
        finally:  # whatever could not be written, a worker that hangs must not stay
            self.leave(EXIT_TRAINING if self.alone else EXIT_HUNG)
