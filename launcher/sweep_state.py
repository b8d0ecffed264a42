"""State of each unit of a sweep from files alone: its run folder, the store, and the claims."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from genrec_dist.runs import RunFolder
from launcher.status import END_STATES

FAILED = "run_failed"


def is_complete(run: RunFolder, keys: Iterable[tuple[str, str]]) -> bool:
    """True when the folder is of a finished run over these very artifacts."""
    end = last_end(run)
    if end is None or end["event"] != "run_finished" or not (run.path / "metrics.json").is_file():
        return False
    linked = {(link["stage"], link["key"]) for link in run.links().values()}
    return set(keys) <= linked


def has_artifacts(store: Path, keys: Iterable[tuple[str, str]]) -> bool:
    """True when the store holds all of them (their bytes are not checked)."""
    return all((store / stage / key / "MANIFEST.json").is_file() for stage, key in keys)


def failure_of(run: RunFolder, keys: Iterable[tuple[str, str]]) -> str | None:
    """Why the last attempt at these very artifacts failed, one line; None when it did not."""
    end = last_end(run)
    if end is None or end["event"] != FAILED:
        return None
    process: dict = next((e for e in reversed(run.events()) if e["event"] == "process"), {})
    tried = {stage["key"] for stage in process.get("stages", [])}
    if tried and not {key for _, key in keys} <= tried:
        return None
    return str(end.get("error") or "failed").splitlines()[0]


def last_end(run: RunFolder) -> dict | None:
    """The event that ended the last attempt; None while it goes on, and for one that was killed."""
    for event in reversed(run.events()):
        if event["event"] in END_STATES:
            return event
        if event["event"] == "run_started":
            return None
    return None


def note_failure(run: RunFolder, code: int, text: str) -> None:
    """Record the end of a child that could not do so itself."""
    run.event(FAILED, exit_code=code, type="ChildDied", error=text)


def note_restart(run: RunFolder, code: int | None, text: str) -> None:
    """Record that the end of an attempt is not the unit's: whatever the child wrote, it has not failed."""
    run.event("run_restarted", exit_code=code, error=text)
