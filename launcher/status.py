"""State of a run from its folder alone: no cluster is asked, nothing heavy is imported."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import psutil
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from genrec_dist.artifacts.files import read_json, read_jsonl
from genrec_dist.runs import RunFolder
from launcher.console import metrics_table
from launcher.results import result_rows
from launcher.screen import amount, details, duration, read_progress, watch

END_STATES = {
    "run_finished": "finished",
    "run_failed": "failed",
    "preempted": "interrupted",
    "interrupted": "interrupted",
    "run_restarted": "interrupted",
}
COLORS = {"finished": "green", "running": "cyan", "failed": "red", "interrupted": "yellow"}


def gather(run: RunFolder) -> dict:
    """Everything `genrec status` shows, JSON-ready.

    Returns:
        name, path, state ('running', 'finished', 'failed', 'interrupted'), exit_code, error, log, host, pid,
        started, seconds, stages [{stage, state, key, seconds, ...}], metrics (metrics.json or None),
        latest (last training or validation record), report (path or None).
    """
    events = _last_attempt(run.events())
    process: dict = next((e for e in events if e["event"] == "process"), {})
    end: dict = next((e for e in reversed(events) if e["event"] in END_STATES), {})
    state = END_STATES.get(end.get("event", ""), "running" if _alive(process) else "interrupted")
    started = events[0]["time"] if events else None
    last = end.get("time") or (time.time() if state == "running" else events[-1]["time"] if events else None)
    stages = _stages(run, events, process, state)
    error = end.get("error")
    if state == "interrupted" and not end:
        elsewhere = process.get("host", platform.node()) != platform.node()
        error = "its process is gone" if not elsewhere else f"started on {process['host']}, not visible from here"
    metrics_file, report = run.path / "metrics.json", run.path / "report.html"
    return {
        "name": run.path.name,
        "path": str(run.path),
        "state": state,
        "exit_code": end.get("exit_code"),
        "error": error,
        "log": str(run.path / "logs" / "driver.log"),
        "host": process.get("host"),
        "pid": process.get("pid"),
        "started": started,
        "seconds": round(last - started, 2) if started and last else None,
        "stages": stages,
        "metrics": read_json(metrics_file) if state == "finished" and metrics_file.exists() else None,
        "latest": _latest(run, stages),
        "report": str(report) if report.exists() else None,
    }


def _last_attempt(events: list[dict]) -> list[dict]:
    starts = [i for i, event in enumerate(events) if event["event"] == "run_started"]
    return events[starts[-1] :] if starts else events


def _alive(process: dict) -> bool:
    """True when the recorded process lives on this host; a reused process id does not count."""
    if process.get("host") != platform.node():
        return False
    try:
        return abs(psutil.Process(process["pid"]).create_time() - process["created"]) < 1
    except psutil.Error:
        return False


def _stages(run: RunFolder, events: list[dict], process: dict, state: str) -> list[dict]:
    """One record a stage, in order; the one in work carries its progress."""
    found = {s["key"]: {"stage": s["stage"], "key": s["key"], "state": "waiting"} for s in process.get("stages", [])}
    for event in events:
        key = event.get("key")
        if key not in found:
            continue
        record = found[key]
        if event["event"] == "stage_reused":
            record["state"] = "reused"
        elif event["event"] == "stage_built":
            record |= {"state": "built", "seconds": event["seconds"]}
        elif event["event"] == "stage_started":
            record |= {"state": "building", "continued": event["resumed"], "since": event["time"]}
    for record in found.values():
        if record["state"] != "building":
            record.pop("since", None)
            continue
        if state != "running":
            record["state"] = "stopped"
        folder = _building(run, process, record["key"])
        if folder is not None:
            record["progress"] = read_progress(folder)
            curve = read_jsonl(folder / "curves.jsonl")
            record["latest"] = curve[-1] if curve else None
    return list(found.values())


def _building(run: RunFolder, process: dict, key: str) -> Path | None:
    store = run.path / process.get("store", "")
    return next(iter(store.glob(f"*/{key}.building")), None)


def _latest(run: RunFolder, stages: list[dict]) -> dict | None:
    current = next((s for s in stages if s.get("latest")), None)
    if current is not None:
        return {"stage": current["stage"], **current["latest"]}
    records = run.metrics()
    return records[-1] if records else None


def show(status: dict, console: Console) -> None:
    """Print a status for people."""
    took = f", {duration(status['seconds'])}" if status["seconds"] is not None else ""
    color = COLORS[status["state"]]
    console.print(
        f"[bold]{escape(status['name'])}[/]: [{color}]{status['state']}[/]{took}  [dim]{escape(status['path'])}[/]",
        soft_wrap=True,
    )
    for record in status["stages"]:
        progress = record.get("progress")
        text = ", ".join(t for t in (amount(progress), details(progress)) if t) if progress else ""
        if "seconds" in record:
            text = duration(record["seconds"])
        console.print(escape(f"  {record['stage']:<26}{record['state']:<10}{text}".rstrip()), soft_wrap=True)
    if status["latest"] and status["state"] != "finished":
        console.print("latest: " + escape(details(status["latest"])), soft_wrap=True)
    if status["error"]:
        console.print(escape(f"{status['error']}\n  log: {status['log']}"), soft_wrap=True)
    if status["report"]:
        console.print(f"report: {escape(status['report'])}", soft_wrap=True)


def show_run(status: dict, console: Console) -> None:
    """Print a status and, of a finished run, its metrics."""
    show(status, console)
    if (status["metrics"] or {}).get("main"):
        console.print(metrics_table(result_rows(status["metrics"])))


def watch_run(run: RunFolder, console: Console) -> None:
    """Show the status of a run and refresh it until it runs no more."""

    def frame() -> tuple[Text, bool]:
        found = gather(run)
        with console.capture() as text:
            show_run(found, console)
        return Text.from_ansi(text.get()), found["state"] == "running"

    watch(frame, console)
