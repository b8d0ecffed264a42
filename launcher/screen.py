"""What the user sees of a run: one line a stage, a bar on a terminal, plain lines elsewhere.

A thread reads `scratch/progress.json` of the stage in work, which the stage's own process or a Ray worker
writes; nothing is asked of the cluster.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from genrec_dist.artifacts.files import read_json
from genrec_dist.pipeline import Stage

POLL_SECONDS = 0.5
REFRESH_SECONDS = 2.0
HIDDEN = ("done", "total", "unit", "time")


def read_progress(folder: Path, since: float = 0.0) -> dict | None:
    """Progress record of a stage's work folder, None when there is none newer than `since`."""
    try:
        record = read_json(folder / "scratch" / "progress.json")
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("time", 0) >= since else None


def amount(record: dict) -> str:
    """'1,200 of 5,000 steps'."""
    return f"{record['done']:,.0f} of {record['total']:,.0f} {record['unit']}"


def details(record: dict) -> str:
    """'epoch 2.5, best 0.0512': whatever else the stage reports."""
    pairs = [(k, v) for k, v in record.items() if k not in HIDDEN and v is not None]
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in pairs)


def duration(seconds: float) -> str:
    """'8.1 s', '2 min 05 s' or '1 h 03 min'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def watch(
    frame: Callable[[], tuple[RenderableType, bool]], console: Console, wait: Callable[[float], None] = time.sleep
) -> None:
    """Show a status that refreshes until nothing is running any more; Ctrl-C only ends the display.

    Args:
        frame: (what to show, whether something is running).
        console: a terminal.
        wait: seconds to the next look.
    """
    shown, running = frame()
    with Live(shown, console=console, auto_refresh=False, vertical_overflow="visible") as live:
        try:
            while running:
                wait(REFRESH_SECONDS)
                shown, running = frame()
                live.update(shown, refresh=True)
        except KeyboardInterrupt:
            return


class StageScreen:
    """Display of the stages of one run; pass `on_stage` to `pipeline.execute`.

    Args:
        stream: where to write; a terminal gets a live bar.
        num_stages: stages of the run.
        interval: seconds between plain progress lines.
    """

    def __init__(self, stream: TextIO, num_stages: int, interval: float) -> None:
        self.console = Console(file=stream, highlight=False)
        self.live = self.console.is_terminal
        self.num_stages, self.interval = num_stages, interval
        self._number = 0
        self._current: _Watcher | None = None
        self._marks = ("✓", "✗") if self.console.encoding.startswith("utf") else ("+", "x")

    def note(self, text: str) -> None:
        """One line for the user."""
        self.console.print(escape(text), soft_wrap=True)

    def on_stage(self, stage: Stage, state: str, folder: Path) -> None:
        """Callback of `pipeline.execute`."""
        if state == "building":
            self._number += 1
            self._current = _Watcher(self, stage.title, folder)
            self._current.start()
        elif self._current is not None:
            seconds = self._stop()
            self._line(stage.title, f"built in {duration(seconds)}")
        else:
            self._number += 1
            self._line(stage.title, "reused" if state == "reused" else state)

    def close(self, failed: bool) -> None:
        """End the display; names the stage that was in work."""
        if self._current is not None:
            title = self._current.title
            seconds = self._stop()
            if failed:
                self._line(title, f"stopped after {duration(seconds)}", good=False)

    def count(self, title: str) -> str:
        return f"[{self._number}/{self.num_stages}] {title}"

    def _stop(self) -> float:
        assert self._current is not None
        seconds = self._current.finish()
        self._current = None
        return seconds

    def _line(self, title: str, text: str, good: bool = True) -> None:
        if self.live:
            mark = f"[green]{self._marks[0]}[/]" if good else f"[red]{self._marks[1]}[/]"
            self.console.print(f"{mark} {escape(f'{title:<24}')} [dim]{text}[/]")
        else:
            self.note(f"{self.count(title)}: {text}")


class _Watcher(threading.Thread):
    """Follows one stage until `finish`."""

    def __init__(self, screen: StageScreen, title: str, folder: Path) -> None:
        super().__init__(name="genrec-screen", daemon=True)
        self.screen, self.title, self.folder = screen, title, folder
        self.started, self.wall = time.monotonic(), time.time()
        self.continued = any(folder.iterdir())
        self._end = threading.Event()

    def finish(self) -> float:
        """Stop and return the seconds the stage took."""
        self._end.set()
        self.join()
        return time.monotonic() - self.started

    def run(self) -> None:
        if self.screen.live:
            self._run_bar()
        else:
            self._run_lines()

    def _run_lines(self) -> None:
        label = self.screen.count(self.title)
        self.screen.note(f"{label}: {'continuing an unfinished build' if self.continued else 'building'}")
        while not self._end.wait(self.screen.interval):
            parts = [duration(time.monotonic() - self.started)]
            if record := read_progress(self.folder, self.wall):
                parts = [f"{amount(record)} ({record['done'] / max(record['total'], 1):.0%})", details(record), *parts]
            self.screen.note(f"{label}: {', '.join(p for p in parts if p)}")

    def _run_bar(self) -> None:
        progress = Progress(
            TextColumn("  {task.description:<24}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            console=self.screen.console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        with progress:
            task: TaskID = progress.add_task(
                escape(self.title), total=None, text="[dim]continuing[/]" if self.continued else ""
            )
            while not self._end.wait(POLL_SECONDS):
                if record := read_progress(self.folder, self.wall):
                    text = escape(", ".join(p for p in (amount(record), details(record)) if p))
                    progress.update(task, completed=record["done"], total=record["total"], text=text)
