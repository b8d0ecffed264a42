"""Which signal ended the work. Ray replaces the handlers of a process; this still knows.

The wake-up descriptor of Python's signal module gets the number of every signal that arrives, whoever handles
it. So a Ctrl-C that Ray Train turns into exit code 0 is still reported as interrupted.
"""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType

from genrec_dist.errors import EXIT_PREEMPTED


class SignalWatch:
    """Context manager: SIGINT raises KeyboardInterrupt, SIGTERM raises SystemExit(75); both are remembered.

    Use it in the main thread.
    """

    def __enter__(self) -> SignalWatch:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._seen = b""
        self._old = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, _preempted)
        return self

    def __exit__(self, *exc: object) -> None:
        signal.set_wakeup_fd(self._old_fd)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        os.close(self._read)
        os.close(self._write)

    def seen(self) -> signal.Signals | None:
        """SIGTERM or SIGINT if one has arrived, else None."""
        with contextlib.suppress(BlockingIOError):
            self._seen += os.read(self._read, 4096)
        return next((s for s in (signal.SIGTERM, signal.SIGINT) if s in self._seen), None)


def _preempted(number: int, frame: FrameType | None) -> None:
    raise SystemExit(EXIT_PREEMPTED)
