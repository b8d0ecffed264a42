"""Ending a worker that was given up while it still lives: on a host that was cut off, a training can go on alone.

The group that takes its place writes to the same folder. So every worker of Ray looks, twice a second, whether the
record that it registered with is still there and still its own; when it is not, the process ends. The driver removes
the records before it starts a new group, whose start takes longer than that look.

On a host that cannot reach the shared folder either, the worker's writes wait; the look does too, and is made as soon
as the folder is back. A file system that answers such a host from a cache for longer than a group takes to start is not
covered.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from genrec_dist.artifacts.files import read_json
from genrec_dist.errors import EXIT_HUNG

LOOK_SECONDS = 0.5


class Fence:
    """Context manager around a worker's work.

    Args:
        record: file that the worker registered with.
        nonce: what is in it if it is still this worker's.
        leave: ends the process.
    """

    def __init__(self, record: Path, nonce: str, *, leave: Callable[[int], None] = os._exit) -> None:
        self.record, self.nonce, self.leave = record, nonce, leave
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fence", daemon=True)

    def __enter__(self) -> Fence:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def superseded(self) -> bool:
        """Whether the record is gone or another's; False where it cannot be said."""
        try:
            return read_json(self.record)["nonce"] != self.nonce
        except FileNotFoundError:
            return True
        except (OSError, ValueError):  # the file system is in trouble, which is no reason to end
            return False

    def _watch(self) -> None:
        while not self._done.wait(LOOK_SECONDS):
            if self.superseded() and not self._done.is_set():
                print(f"given up by the driver ({self.record} is not this worker's any more): leaving", file=sys.stderr)
                self.leave(EXIT_HUNG)
                return
