"""Carrying out the units of a sweep: what is ready is claimed and started, and no failure stops the rest.

All state is files: killed at any point, the same command goes on. Knows nothing of where units run (`Pool`).
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from genrec_dist.errors import EXIT_CLUSTER, EXIT_INTERRUPTED, EXIT_PREEMPTED
from genrec_dist.runs import RunFolder
from genrec_dist.studies.scaling.leases import Leases
from genrec_dist.studies.scaling.plan import Unit
from genrec_dist.studies.scaling.sweep_folder import SweepFolder
from launcher.failures import Failure, Stopped, explain, says_memory
from launcher.screen import duration
from launcher.sweep_pool import Pool
from launcher.sweep_state import FAILED, failure_of, has_artifacts, is_complete, last_end, note_failure, note_restart

POLL_SECONDS = 0.2
LEAVE_SECONDS = 30.0
"""Beyond `runtime.grace_seconds`, for children to write their last words."""


class StopSignals:
    """Context manager: remembers SIGINT and SIGTERM instead of raising, so that children can be told first."""

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []

    def __enter__(self) -> StopSignals:
        self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received.append(signal.Signals(number))


@dataclass
class Outcome:
    """How the units of a sweep ended.

    Args:
        finished: built or found complete.
        failed: why, by name.
        blocked: units whose shared stages failed: the shared unit, by name.
    """

    finished: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    blocked: dict[str, str] = field(default_factory=dict)


@dataclass
class Scheduler:
    """Runs the units of a sweep.

    Args:
        folder: of the sweep.
        store: artifact store.
        units: shared ones before those that need them; started in this order where they can be.
        pool: where they run.
        leases: who else is at work.
        say: one line for the user.
        keys: artifacts of each unit, by name.
    """

    folder: SweepFolder
    store: Path
    units: Sequence[Unit]
    pool: Pool
    leases: Leases
    say: Callable[[str], None]
    keys: dict[str, set[tuple[str, str]]]
    outcome: Outcome = field(default_factory=Outcome)
    _restarts: Counter[tuple[str, str]] = field(default_factory=Counter)
    _started: dict[str, float] = field(default_factory=dict)
    _ends: dict[str, dict | None] = field(default_factory=dict)
    """How a unit's last attempt had ended when this call began, or started the unit."""

    def run(self, retry_failed: bool) -> Outcome:
        """Until every unit has ended.

        Args:
            retry_failed: units that failed in an earlier call are tried again.

        Raises:
            Stopped: SIGINT or SIGTERM came; children were told, and have left.
        """
        self._ends = {unit.name: last_end(self._run(unit)) for unit in self.units}
        waiting = [unit for unit in self.units if not self._settled(unit, retry_failed)]
        self.leases.clear()
        self.leases.take(f"call-{self.leases.owner.id}")
        with StopSignals() as signals:
            try:
                while (waiting or self.pool.running) and not signals.received:
                    self._start(waiting)
                    time.sleep(POLL_SECONDS)
                    self._collect(waiting)
                    for name in self.leases.beat():
                        self.say(f"{name}: its claim was silent for too long and was taken over by another call")
                if signals.received:
                    self._stop(signals)
            finally:
                self.pool.close()
                for name in list(self.leases.held):
                    self.leases.release(name)
        return self.outcome

    def _run(self, unit: Unit) -> RunFolder:
        return self.folder.run(unit.name, unit.shared)

    def _is_done(self, unit: Unit) -> bool:
        if unit.shared:
            return has_artifacts(self.store, self.keys[unit.name])
        return is_complete(self._run(unit), self.keys[unit.name])

    def _settled(self, unit: Unit, retry_failed: bool) -> bool:
        """True when nothing is to be done for the unit in this call; says so."""
        if self._is_done(unit):
            self.outcome.finished.add(unit.name)
            if not unit.shared:
                self.say(f"{unit.name}: already complete, {self._run(unit).path}")
            return True
        why = failure_of(self._run(unit), self.keys[unit.name])
        if why is None or retry_failed:
            return False
        self.outcome.failed[unit.name] = why
        self.say(f"{unit.name}: failed in an earlier call ({why}); --retry-failed tries again")
        return True

    def _start(self, waiting: list[Unit]) -> None:
        """Start what is ready, in order. The first that has no room holds back those after it, so that none starves."""
        for unit in list(waiting):
            broken = next((n for n in unit.needs if n in self.outcome.failed or n in self.outcome.blocked), None)
            if broken is not None:
                waiting.remove(unit)
                self.outcome.blocked[unit.name] = self.outcome.blocked.get(broken, broken)
                self.say(f"{unit.name}: not started, its shared stages failed ({self.outcome.blocked[unit.name]})")
                continue
            if not set(unit.needs) <= self.outcome.finished:
                continue
            if not self.pool.has_room(unit):
                return
            if not self.leases.take(unit.name):
                continue
            waiting.remove(unit)
            if self._ended_elsewhere(unit):
                continue
            self._started[unit.name] = time.monotonic()
            self._ends[unit.name] = last_end(self._run(unit))
            self.say(f"{unit.name}: started")
            self.pool.start(unit)

    def _ended_elsewhere(self, unit: Unit) -> bool:
        """True when another call has finished the unit since this one began, or failed at it."""
        if self._is_done(unit):
            self._finish(unit)
            return True
        run = self._run(unit)
        why = failure_of(run, self.keys[unit.name])
        if why is None or last_end(run) == self._ends[unit.name]:
            return False
        self.leases.release(unit.name)
        self.outcome.failed[unit.name] = why
        self.say(f"{unit.name}: failed in another call, {why}")
        return True

    def _collect(self, waiting: list[Unit]) -> None:
        for unit, code in self.pool.ended():
            if self._is_done(unit):
                self._finish(unit)
                continue
            again = self._again(unit, code)
            if again:  # whatever it still wrote is no end that another call came to
                note_restart(self._run(unit), code, again)
                self._ends[unit.name] = last_end(self._run(unit))
            self.leases.release(unit.name)
            if again:
                self.say(f"{unit.name}: {again}")
                waiting.insert(0, unit)
            else:
                self._fail(unit, code)

    def _finish(self, unit: Unit) -> None:
        self.leases.release(unit.name)
        self.outcome.finished.add(unit.name)
        begun = self._started.get(unit.name)
        self.say(f"{unit.name}: finished" + (f" in {duration(time.monotonic() - begun)}" if begun else ""))

    def _again(self, unit: Unit, code: int | None) -> str | None:
        """Why and how a unit that ended so starts again; None: it has failed.

        A killed child is a failure, one that was told to stop or lost its node is not; each has its budget. One that
        ran out of memory on a GPU that it shared gets more of one, and is a failure once it has had it to itself.
        """
        runtime, again = unit.config.runtime, "started again from its last checkpoint"
        if code == EXIT_CLUSTER:
            said = self._failure(unit)
            share = self.pool.grow(unit) if said is None or says_memory(said["error"]) else 0.0
            why = "out of memory" if said else "a resource gave way"
            return f"{why} on a GPU that it shared, {again} with {share:.2f} of one" if share else None
        if code is None or code in (EXIT_PREEMPTED, EXIT_INTERRUPTED):
            kind, budget = "preempted", runtime.max_preemptions
        elif code < 0:
            kind, budget = "killed", runtime.max_failures
        else:
            return None
        self._restarts[unit.name, kind] += 1
        return f"{_how(code)}, {again}" if self._restarts[unit.name, kind] <= budget else None

    def _failure(self, unit: Unit) -> dict | None:
        """The failure that the unit's latest attempt recorded itself."""
        end = last_end(self._run(unit))
        return end if end is not None and end["event"] == FAILED and end != self._ends[unit.name] else None

    def _fail(self, unit: Unit, code: int | None) -> None:
        run = self._run(unit)
        if self._failure(unit) is None:
            log = self.folder.path / "logs" / f"{unit.name}.log"
            note_failure(run, code if code is not None else 1, f"{_how(code)}; see {log}")
        why = failure_of(run, self.keys[unit.name]) or _how(code)
        self.outcome.failed[unit.name] = why
        self.say(f"{unit.name}: failed, {why}")

    def _stop(self, signals: StopSignals) -> None:
        """Have the children save and leave, and wait for them; a second signal does not wait."""
        number = signals.received[0]
        running = self.pool.running
        self.say(f"{number.name}: {len(running)} running units are told to stop")
        self.pool.tell(signal.SIGTERM)
        grace = max((u.config.runtime.grace_seconds for u in self.units if u.name in running), default=0.0)
        deadline = time.monotonic() + grace + LEAVE_SECONDS
        while self.pool.running and len(signals.received) < 2 and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            self.leases.beat()
            self.pool.ended()
        failure = explain(KeyboardInterrupt(), number)
        raise Stopped(Failure(failure.exit_code, failure.kind, failure.text))


def _how(code: int | None) -> str:
    """How a child ended."""
    if code is None:
        return "its node was lost"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"left with exit code {code}"
