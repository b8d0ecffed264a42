"""From any exception to an exit code and a message a user can act on."""

from __future__ import annotations

import errno
import signal
from dataclasses import dataclass
from pathlib import Path

from genrec_dist.errors import (
    EXIT_BUG,
    EXIT_CLUSTER,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    EXIT_TRAINING,
    error_chain,
    find_typed,
)


@dataclass
class Failure:
    """What the user sees of an error.

    Args:
        exit_code: of the process.
        kind: class name of the error, 'interrupted' or 'preempted'.
        text: message, first line a sentence, further lines details.
        log: file with the traceback, if one was written.
    """

    exit_code: int
    kind: str
    text: str
    log: Path | None = None


class Stopped(Exception):
    """A command that has already recorded its failure and only needs to be reported."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.failure = failure


def explain(error: BaseException, received: signal.Signals | None = None) -> Failure:
    """Classify an error.

    Args:
        error: what ended the work.
        received: signal that arrived meanwhile; it explains whatever the libraries made of it.
    """
    stopped = isinstance(error, SystemExit) and error.code == EXIT_PREEMPTED
    if received == signal.SIGTERM or (stopped and received is None):
        return Failure(EXIT_PREEMPTED, "preempted", "preempted by SIGTERM; the same command continues where it stopped")
    if received == signal.SIGINT or isinstance(error, KeyboardInterrupt):
        return Failure(EXIT_INTERRUPTED, "interrupted", "interrupted; the same command continues where it stopped")
    typed = find_typed(error)
    if typed is not None:
        return Failure(typed.exit_code, type(typed).__name__, str(typed))
    kind = type(error).__name__
    text = f"{kind}: {error}".strip()
    for one in error_chain(error):
        module, name = type(one).__module__, type(one).__name__
        if module.startswith("ray.train") and "Failed" in " ".join(c.__name__ for c in type(one).__mro__):
            return Failure(EXIT_TRAINING, kind, f"training failed after its retries\n  got: {_short(text)}")
        if _is_resource(one, module, name):
            return Failure(EXIT_CLUSTER, name, f"the cluster or a resource gave way\n  got: {_short(text)}")
    return Failure(EXIT_BUG, kind, f"unexpected error, most likely a bug\n  got: {_short(text)}")


def says_memory(text: str) -> bool:
    """Whether a message is of memory that ran out, of a host or a GPU."""
    return "out of memory" in text or "ALLOC_FAILED" in text  # the latter is cuBLAS's and cuDNN's


def _is_resource(error: BaseException, module: str, name: str) -> bool:
    lost_by_ray = module == "ray.exceptions" and not name.startswith("RayTaskError")
    # A GPU that is full may also say so as torch.AcceleratorError, or as a RuntimeError of Triton.
    full_gpu = isinstance(error, RuntimeError) and says_memory(str(error))
    out_of_memory = isinstance(error, MemoryError) or (module.startswith("torch") and name == "OutOfMemoryError")
    disk_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return lost_by_ray or out_of_memory or full_gpu or disk_full


def _short(text: str, limit: int = 600) -> str:
    text = text.strip()
    return text if len(text) <= limit else text[: limit // 2] + " ... " + text[-limit // 2 :]
