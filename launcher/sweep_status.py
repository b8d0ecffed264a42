"""`genrec status SWEEP`: state of all trials and shared stages, from files alone; a live table on a terminal."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from genrec_dist.studies.scaling.leases import Leases, Owner
from genrec_dist.studies.scaling.sweep_folder import SweepFolder
from launcher.results import result_rows
from launcher.screen import amount, details, duration, watch
from launcher.status import COLORS, gather
from launcher.sweep_state import has_artifacts

STATE_COLORS = COLORS | {"waiting": "dim", "blocked": "red"}
SHOWN_METRICS = ("recall@10", "ndcg@10")


class SweepStatus:
    """Reads one sweep again and again; finished trials only once."""

    def __init__(self, folder: SweepFolder) -> None:
        self.folder = folder
        self._leases = Leases(folder.path / "claims", Owner.this_process())
        self._settled: dict[str, dict] = {}

    def gather(self) -> dict[str, Any]:
        """Everything `genrec status` shows, JSON-ready.

        Returns:
            name, path, title, state ('finished', 'running', 'failed' when only failures are left, 'interrupted'),
            counts of trials by state, report (path or None), shared and trials: [{name, state, error, seconds, owner,
            progress, metrics, ...}].
        """
        record = self.folder.read()
        store = Path(record["store"])
        shared = [self._unit(unit, store) for unit in record["units"] if unit["shared"]]
        broken = {unit["name"] for unit in shared if unit["state"] == "failed"}
        trials = [self._unit(unit, store) for unit in record["units"] if not unit["shared"]]
        needs = {unit["name"]: set(unit["needs"]) for unit in record["units"]}
        for trial in trials:
            if trial["state"] == "waiting" and needs[trial["name"]] & broken:
                trial |= {"state": "blocked", "error": f"{min(needs[trial['name']] & broken)} failed"}
        counts = Counter(trial["state"] for trial in trials)
        report = self.folder.path / "report.html"
        return {
            "name": record["name"],
            "path": str(self.folder.path),
            "title": record["title"],
            "state": _overall(counts, self._called()),
            "counts": dict(counts),
            "report": str(report) if report.exists() else None,
            "shared": shared,
            "trials": trials,
        }

    def _called(self) -> bool:
        """True while a process is at work on the sweep, even between two units."""
        return any(self._leases.holder(name) for name in self._leases.names())

    def _unit(self, unit: dict, store: Path) -> dict[str, Any]:
        name = unit["name"]
        if name in self._settled:
            return dict(self._settled[name])
        found = {key: unit[key] for key in ("name", "arm", "depth", "seed") if key in unit}
        found |= {"state": "waiting", "error": None, "seconds": None, "owner": None, "progress": None, "metrics": None}
        run = self.folder.run(name, unit["shared"])
        if (run.path / "config.yaml").is_file():
            status = gather(run)
            found |= {"state": status["state"], "error": _first_line(status["error"]), "seconds": status["seconds"]}
            found["progress"] = _progress(status)
            if (status["metrics"] or {}).get("main"):
                found["metrics"] = next(iter(result_rows(status["metrics"]).values()))
        keys = [(stage["stage"], stage["key"]) for stage in unit["stages"]]
        if unit["shared"] and found["state"] != "finished" and has_artifacts(store, keys):
            found |= {"state": "finished", "error": None}
        holder = self._leases.holder(name)
        if holder is not None and found["state"] not in ("finished", "failed"):
            found |= {"state": "running", "error": None, "owner": holder["host"]}
        elif found["state"] == "finished":
            self._settled[name] = dict(found)
        return found


def _overall(counts: Counter[str], called: bool) -> str:
    if counts["running"] or called:
        return "running"
    if counts["waiting"] or counts["interrupted"]:
        return "interrupted"
    return "failed" if counts["failed"] or counts["blocked"] else "finished"


def _first_line(text: str | None) -> str | None:
    return text.splitlines()[0] if text else None


def _progress(status: dict) -> str | None:
    """'generator: 120 of 480 steps, epoch 2' of the stage in work."""
    current = next((s for s in status["stages"] if s["state"] == "building" and s.get("progress")), None)
    if current is None:
        return None
    parts = amount(current["progress"]), details(current["progress"])
    return f"{current['stage']}: " + ", ".join(part for part in parts if part)


def as_renderable(found: dict[str, Any]) -> RenderableType:
    """The status for people."""
    counts = ", ".join(f"{number} {state}" for state, number in sorted(found["counts"].items()))
    overall, path = (found["state"], STATE_COLORS[found["state"]]), (found["path"], "dim")
    head = Text.assemble((found["name"], "bold"), ": ", overall, f", {counts}  ", path)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("run", "state", "time", "R@10", "N@10", ""):
        table.add_column(name, justify="right" if name in ("time", "R@10", "N@10") else "left", no_wrap=name != "")
    for unit in found["shared"] + found["trials"]:
        metrics = unit["metrics"] or {}
        numbers = [f"{metrics[m]:.4f}" if m in metrics else "" for m in SHOWN_METRICS]
        seconds = duration(unit["seconds"]) if unit["seconds"] is not None else ""
        state = Text(unit["state"], STATE_COLORS[unit["state"]])
        rest = unit["error"] or unit["progress"] or (f"on {unit['owner']}" if unit["owner"] else "")
        table.add_row(Text(unit["name"]), state, seconds, *numbers, Text(rest))
    parts: list[RenderableType] = [head, table]
    return Group(*parts, *([Text(f"report: {found['report']}")] if found["report"] else []))


def show_status(folder: SweepFolder, console: Console, watching: bool | None) -> None:
    """Print the status of a sweep; live where it is watched.

    Args:
        folder: of the sweep.
        console: where to.
        watching: None: on a terminal.
    """
    status = SweepStatus(folder)

    def frame() -> tuple[RenderableType, bool]:
        found = status.gather()
        return as_renderable(found), found["state"] == "running"

    if console.is_terminal if watching is None else watching:
        watch(frame, console)
    else:
        console.print(frame()[0], soft_wrap=True)
