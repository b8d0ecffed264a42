"""Who is at work on which unit of a sweep: a file a unit with owner and heartbeat, on the file system that all see.

Several calls of the same sweep, on one host or several, share it by these files. A claim whose owner is gone is taken
over: at once where the owner was a process of this host, else when its heartbeat has not changed for `lease` seconds by
this host's own clock, so that clocks of hosts need not agree. Knows nothing of trials.

Every change is made under one file lock, so no two owners can take the same claim.
"""

from __future__ import annotations

import fcntl
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from genrec_dist.artifacts.files import read_json, write_json

LEASE_SECONDS = 60.0
BEAT_SECONDS = 10.0


@dataclass(frozen=True)
class Owner:
    """A process that takes claims."""

    id: str
    host: str
    pid: int
    created: float

    @classmethod
    def this_process(cls) -> Owner:
        """This process, under a name that no other has had."""
        return cls(uuid.uuid4().hex[:12], platform.node(), os.getpid(), psutil.Process().create_time())

    def is_gone(self) -> bool:
        """True when it was a process of this host and lives no more; False where that cannot be seen."""
        if self.host != platform.node():
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.created) > 1
        except psutil.Error:
            return True


class Leases:
    """Claims on units by one owner, in one folder.

    Args:
        folder: of all claims, made when missing.
        owner: who takes.
        lease: seconds that a silent claim of another host is respected.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        folder: Path,
        owner: Owner,
        lease: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.owner, self.lease, self.clock = folder, owner, lease, clock
        self.held: set[str] = set()
        self._seen: dict[str, tuple[object, float]] = {}
        self._beaten = clock()

    def take(self, name: str) -> bool:
        """Claim a unit; False when another owner holds it and seems to live."""
        with self._locked():
            holder = self._read(name)
            if holder is not None and holder.get("owner") != self.owner.id and not self._is_stale(name, holder):
                return False
            self._write(name)
        self.held.add(name)
        return True

    def beat(self) -> list[str]:
        """Renew every held claim, if it is time; names of those that another owner has taken over meanwhile."""
        if self.clock() - self._beaten < min(BEAT_SECONDS, self.lease / 6):
            return []
        self._beaten = self.clock()
        lost = []
        with self._locked():
            for name in sorted(self.held):
                holder = self._read(name)
                if holder is not None and holder.get("owner") != self.owner.id:
                    lost.append(name)
                else:
                    self._write(name)
        self.held -= set(lost)
        return lost

    def release(self, name: str) -> None:
        """Give a claim back; one that was taken over stays with its new owner."""
        self.held.discard(name)
        with self._locked():
            if (self._read(name) or {}).get("owner") == self.owner.id:
                self._file(name).unlink(missing_ok=True)

    def holder(self, name: str) -> dict | None:
        """The living claim on a unit: owner, host, pid, created, heartbeat."""
        found = self._read(name)
        return None if found is None or self._is_stale(name, found) else found

    def clear(self) -> None:
        """Remove the claims of owners that are gone."""
        with self._locked():
            for name in self.names():
                if self._is_stale(name, self._read(name) or {}):
                    self._file(name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """Everything that is claimed, by whoever."""
        return sorted(file.stem for file in self.folder.glob("*.json"))

    def _is_stale(self, name: str, holder: dict) -> bool:
        try:
            gone = Owner(holder["owner"], holder["host"], holder["pid"], holder["created"]).is_gone()
        except (KeyError, TypeError):
            return True
        beat = holder.get("owner"), holder.get("heartbeat")
        if self._seen.get(name, (None,))[0] != beat:
            self._seen[name] = beat, self.clock()
        return gone or self.clock() - self._seen[name][1] > self.lease

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _read(self, name: str) -> dict | None:
        try:
            found = read_json(self._file(name))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, name: str) -> None:
        owner = self.owner
        record = {"owner": owner.id, "host": owner.host, "pid": owner.pid, "created": owner.created}
        write_json(self._file(name), record | {"heartbeat": time.time()})

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
