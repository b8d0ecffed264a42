"""One unit of a sweep in a process of its own: an ordinary run, into its folder below the sweep's.

    python -m launcher.sweep_child SWEEP_FOLDER UNIT PARENT_PID RUNTIME_JSON

The process leaves, with a checkpoint, when the one that started it is gone.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

from genrec_dist.errors import EXIT_OK, EXIT_PREEMPTED

PR_SET_PDEATHSIG = 1
BUSY_SECONDS = 90.0
"""Time that an orphan of an earlier call has to save its checkpoint and leave."""


def main(arguments: list[str]) -> int:
    """Execute the unit; the exit code."""
    folder, name, parent, runtime = Path(arguments[0]), arguments[1], int(arguments[2]), json.loads(arguments[3])
    die_with(parent)
    from genrec_dist import methods
    from genrec_dist.studies.scaling.sweep_folder import SweepFolder
    from launcher.console import show_failure
    from launcher.failures import Stopped, explain
    from launcher.run import perform

    try:
        sweep = SweepFolder(folder.parent, folder.name)
        unit = sweep.unit(name, methods.build_stages, runtime)
        run = sweep.run(name, unit.shared)
        if not wait_until_free(run.path):
            print(f"{run.path} still belongs to another process", file=sys.stderr)
            return EXIT_PREEMPTED
        finish = None
        if not unit.shared:
            from launcher.results import finish_run

            finish = partial(finish_run, unit.config)
        perform(
            unit.config,
            unit.stages,
            store=Path(sweep.read()["store"]),
            runs=run.path.parent,
            command=["genrec", "sweep", sweep.path.name, name],
            finish=finish,
        )
    except Stopped as stopped:
        show_failure(stopped.failure)
        return stopped.failure.exit_code
    except Exception as error:
        failure = explain(error)
        show_failure(failure)
        return failure.exit_code
    return EXIT_OK


def die_with(parent: int) -> None:
    """Ask the kernel for a SIGTERM when the parent ends; leave at once if it has ended already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(EXIT_PREEMPTED)


def wait_until_free(folder: Path, seconds: float = BUSY_SECONDS) -> bool:
    """Wait until no process holds the run folder; False: it is still held."""
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    with open(folder / ".lock", "w", encoding="ascii") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
