"""Keeping the user's screen clean: everything that libraries print goes to a log file.

File descriptors 1 and 2 are redirected at the level of the operating system, so that C++ code, child
processes and Ray's drivers are caught as well as Python's `print`, `warnings` and `logging`.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def captured(log: Path, *, to_stderr: bool = False) -> Iterator[TextIO]:
    """Send stdout, stderr and Python logging to `log`; yield a stream that still reaches the screen.

    Args:
        log: file that is appended to.
        to_stderr: the yielded stream writes to the old stderr, so that stdout stays free for a result.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    python_streams = sys.stdout, sys.stderr
    with (
        open(log, "a", encoding="utf-8", errors="backslashreplace", buffering=1) as sink,
        os.fdopen(os.dup(saved[to_stderr]), "w", encoding="utf-8", errors="replace") as screen,
    ):
        sink.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()}: {' '.join(sys.argv)}\n")
        handler = logging.StreamHandler(sink)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(handler)
        own_faulthandler = not faulthandler.is_enabled()
        if own_faulthandler:  # the stack of a crash in C code belongs in the log too
            faulthandler.enable(sink)
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        sys.stdout = sys.stderr = sink
        try:
            yield screen
        finally:
            screen.flush()
            sys.stdout, sys.stderr = python_streams
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            if own_faulthandler:
                faulthandler.disable()
            logging.getLogger().removeHandler(handler)
            for descriptor in saved:
                os.close(descriptor)
