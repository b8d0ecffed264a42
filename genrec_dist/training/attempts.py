"""One attempt of a group of workers: what it leaves in the stage's scratch folder, and why it ended.

Workers say who they are when they start and how they failed; the process that launched them reads it and decides, with
two budgets, whether the group starts again: `runtime.max_preemptions` for what was taken from outside (a lost node, a
worker told to stop), `runtime.max_failures` for crashes and hangs.
"""

from __future__ import annotations

import os
import platform
import secrets
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from genrec_dist import errors
from genrec_dist.artifacts.files import read_json, write_json
from genrec_dist.errors import GenrecError
from genrec_dist.pipeline import StageContext
from genrec_dist.training.stopping import forget_stop
from genrec_dist.training.worker import Worker

CauseName = Literal["worker_died", "worker_hung", "worker_stopped", "node_lost", "error"]
PREEMPTIONS = ("worker_stopped", "node_lost")


@dataclass(frozen=True)
class Cause:
    """Why an attempt ended.

    Args:
        name: worker_died (with exit code or signal), worker_hung, worker_stopped (told to, from outside), node_lost,
            or error (an exception, or nothing better is known).
        text: for people.
        details: fields of the event: rank, exit_code, signal, node ...
    """

    name: CauseName
    text: str
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Literal["preemption", "failure"]:
        return "preemption" if self.name in PREEMPTIONS else "failure"


class Retries:
    """Both budgets of one training.

    Args:
        context: of the stage; every restart becomes an event.
    """

    def __init__(self, context: StageContext) -> None:
        self.context, self.attempt = context, 1
        self.left = {"preemption": context.runtime.max_preemptions, "failure": context.runtime.max_failures}

    def spend(self, cause: Cause) -> bool:
        """Take one from the cause's budget; False when nothing is left of it."""
        if not self.left[cause.kind]:
            return False
        self.left[cause.kind] -= 1
        self.attempt += 1
        self.context.event(
            "training_restarted",
            cause=cause.name,
            kind=cause.kind,
            attempt=self.attempt,
            left=self.left[cause.kind],
            error=cause.text,
            **cause.details,
        )
        return True


def prepare(context: StageContext) -> None:
    """Remove what an earlier attempt left; to be done before the workers start."""
    forget_stop(context)
    shutil.rmtree(_folder(context), ignore_errors=True)


def register(worker: Worker, context: StageContext, node: str = "") -> tuple[Path, str]:
    """Say that this worker takes part.

    Args:
        worker: this process.
        context: of the stage.
        node: Ray's id of the node.

    Returns:
        The file that says so, and the nonce in it: as long as both are there, nobody has taken this worker's place.
    """
    file, nonce = _folder(context, create=True) / f"worker-{worker.rank}.json", secrets.token_hex(8)
    record = {"rank": worker.rank, "world_size": worker.world_size, "pid": os.getpid(), "host": platform.node()}
    write_json(file, record | {"node": node, "nonce": nonce})
    if worker.is_main:
        context.event("workers_started", world_size=worker.world_size)
    return file, nonce


def workers(context: StageContext) -> list[dict]:
    """Records of the workers that registered in this attempt, by rank."""
    records = _read(context, "worker-*.json")
    latest = max((r["world_size"] for r in records if r["rank"] == 0), default=len(records))
    return [record for record in records if record["rank"] < latest]  # a group of another size may have been before


def hung_file(context: StageContext, rank: int) -> Path:
    """Where a rank's watchdog says that it gave up."""
    return _folder(context, create=True) / f"hung-{rank}.json"


def hung(context: StageContext) -> Cause | None:
    """The hang of this attempt, if there was one; the ranks that waited for the stuck one were silent like it."""
    records = _read(context, "hung-*.json")
    if not records:
        return None
    first = records[0]
    text = f"no sign of life for {first['seconds']:.0f} s in {first['phase']} after step {first['step']}"
    return Cause("worker_hung", text, {"ranks": [r["rank"] for r in records], "stacks": [r["stacks"] for r in records]})


def note_failure(context: StageContext, rank: int, error: BaseException) -> None:
    """Leave an exception for the process that launched this worker."""
    record = {"rank": rank, "error": f"{type(error).__name__}: {last_line(error)}"}
    if isinstance(error, GenrecError):
        record["typed"] = describe_error(error)  # type: ignore[assignment]
    write_json(_folder(context, create=True) / f"failed-{rank}.json", record)


def failures(context: StageContext) -> dict[int, str]:
    """What each rank that raised said, by rank."""
    return {record["rank"]: record["error"] for record in _read(context, "failed-*.json")}


def typed_failure(context: StageContext) -> GenrecError | None:
    """The typed error of a worker; it would only come again."""
    typed = [record["typed"] for record in _read(context, "failed-*.json") if "typed" in record]
    return rebuild_error(typed[0]) if typed else None


def last_line(error: BaseException) -> str:
    """Last non-empty line of an error's text: what is left of a remote traceback that matters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""


def describe_error(error: GenrecError) -> dict:
    """A typed error as JSON."""
    return {"type": type(error).__name__, "what": error.what} | {
        name: None if getattr(error, name) is None else str(getattr(error, name))
        for name in ("where", "got", "expected", "fix")
    }


def rebuild_error(record: dict) -> GenrecError:
    """The typed error that `describe_error` described."""
    kind = getattr(errors, record["type"], GenrecError)
    what = record["what"]
    return kind(what, **{k: record[k] for k in ("where", "got", "expected", "fix")})


def _folder(context: StageContext, create: bool = False) -> Path:
    folder = context.scratch / "attempt"
    if create:
        folder.mkdir(exist_ok=True)
    return folder


def _read(context: StageContext, pattern: str) -> list[dict]:
    records = [read_json(path) for path in _folder(context).glob(pattern)]
    return sorted(records, key=lambda record: record["rank"])
