"""Following the curves of a run's trainings, and handing them to trackers, in a thread beside the work.

Reads `curves.jsonl` of the stage in work, which rank 0 of the training writes, wherever it runs: no training knows of
it, waits for it, or fails with it. A tracker that fails becomes an event and a warning, once, and is dropped.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from genrec_dist.artifacts.files import read_json, read_jsonl, write_json
from genrec_dist.config import Config
from genrec_dist.pipeline import Stage
from genrec_dist.runs import RunFolder
from launcher.trackers import Tracker, make_trackers

POLL_SECONDS = 2.0
CLOSE_SECONDS = 30.0
"""Time that trackers have at the end of a run; one that is still busy then is left behind."""
KEYS = ("step", "split")


@dataclass
class _Followed:
    """A training's curve, as far as it has been handed on."""

    title: str
    folder: Path
    last: dict[str, int] = field(default_factory=dict)


class Tracking(threading.Thread):
    """Context manager around the stages of a run; pass `on_stage` to `pipeline.execute`.

    Args:
        config: of the run; its `tracking` section names the trackers.
        run: run folder; gets `tracker_failed` events and, in tracking/steps.json, how far each curve was handed on.
        trackers: makes them; by default those of the configuration.
    """

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        trackers: Callable[[Config, Path, Callable[[str, BaseException], None]], Sequence[Tracker]] = make_trackers,
    ) -> None:
        super().__init__(name="genrec-tracking", daemon=True)
        self.config, self.run_folder, self._make = config, run, trackers
        self.file = run.path / "tracking" / "steps.json"
        self._stages: queue.Queue[tuple[Stage, Path] | bool] = queue.Queue()

    def __enter__(self) -> Tracking:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._stages.put(kind is None)
        self.join(CLOSE_SECONDS)
        if self.is_alive():
            self._warn("all trackers", TimeoutError(f"still busy {CLOSE_SECONDS:.0f} s after the run's end"))

    def on_stage(self, stage: Stage, state: str, folder: Path) -> None:
        """Callback of `pipeline.execute`."""
        self._stages.put((stage, folder))

    def run(self) -> None:
        try:
            self._follow()
        except Exception as error:
            self._warn("all trackers", error)

    def _follow(self) -> None:
        self._trackers = list(self._make(self.config, self.run_folder.path, self._warn))
        if not self._trackers:
            return
        steps: dict[str, dict[str, int]] = read_json(self.file) if self.file.is_file() else {}
        current: _Followed | None = None
        while True:
            try:
                found = self._stages.get(timeout=POLL_SECONDS)
            except queue.Empty:
                found = None
            if isinstance(found, tuple):
                stage, folder = found
                if current is not None and stage.title != current.title:
                    self._hand_on(current)
                current = _Followed(stage.title, folder, steps.setdefault(stage.key, {}))
            if current is not None and self._hand_on(current):
                write_json(self.file, steps)
            if isinstance(found, bool):
                break
        for tracker in list(self._trackers):
            self._guard(tracker, tracker.close, found)

    def _hand_on(self, curve: _Followed) -> bool:
        """New records of a curve to every tracker; a training that went back to a checkpoint repeats no step."""
        new = False
        for record in read_jsonl(curve.folder / "curves.jsonl"):
            split, step = str(record.get("split", "train")), record.get("step")
            if not isinstance(step, int) or step <= curve.last.get(split, -1):
                continue
            scalars = {f"{split}/{name}": float(v) for name, v in record.items() if name not in KEYS and _is_scalar(v)}
            for tracker in list(self._trackers):
                self._guard(tracker, tracker.log, curve.title, step, scalars)
            curve.last[split] = step
            new = True
        return new

    def _guard(self, tracker: Tracker, act: Callable[..., None], *arguments: object) -> None:
        try:
            act(*arguments)
        except Exception as error:
            self._trackers.remove(tracker)
            self._warn(tracker.name, error)

    def _warn(self, name: str, error: BaseException) -> None:
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        try:
            self.run_folder.event("tracker_failed", tracker=name, error=text)
            self.run_folder.say(f"tracking: {name} failed and is left out; the run goes on ({text})")
        except OSError:  # a full disk is the run's to tell
            return


def _is_scalar(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
