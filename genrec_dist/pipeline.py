"""Stages and their execution: each reads finished artifacts and writes exactly one.

`execute` walks the stages in order, reuses what the store holds, builds the rest, and records everything in
the run folder. It knows nothing of what a stage does.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from genrec_dist.artifacts.files import read_jsonl, write_json
from genrec_dist.artifacts.store import SCRATCH, ArtifactStore, content_key
from genrec_dist.config import RuntimeConfig
from genrec_dist.errors import ArtifactError
from genrec_dist.runs import RunFolder, append_event


@dataclass
class StageContext:
    """What a stage's build function may use.

    Args:
        out: work folder; what is in it after the build becomes the artifact. `out/scratch` is kept over a
            kill and dropped at the end.
        inputs: folder of each finished input artifact.
        runtime: where and how fast; never decides the content that later stages read.
        key: content hash of the stage.
        title: what the user reads.
        events_file: the run's events.jsonl; None drops events. A path and not a callable, so that a context
            can travel to a Ray worker.
    """

    out: Path
    inputs: dict[str, Path]
    runtime: RuntimeConfig
    key: str = ""
    title: str = ""
    events_file: Path | None = None
    _last: float = field(default=0.0, repr=False)

    @property
    def scratch(self) -> Path:
        path = self.out / SCRATCH
        path.mkdir(exist_ok=True)
        return path

    def event(self, kind: str, /, **fields: Any) -> None:
        """Record an event of the run."""
        if self.events_file is not None:
            append_event(self.events_file, kind, stage=self.title, **fields)

    def progress(self, done: float, total: float, unit: str, **info: Any) -> None:
        """Say how far the stage is; at most twice a second reaches the disk. Without room for it nothing is said."""
        now = time.monotonic()
        if now - self._last < 0.5 and done < total:
            return
        self._last = now
        with contextlib.suppress(OSError):
            write_json(
                self.scratch / "progress.json",
                {"done": done, "total": total, "unit": unit, "time": time.time(), **info},
            )


@dataclass(frozen=True, eq=False)
class Stage:
    """One step of a method.

    Args:
        name: folder name in the store.
        version: number of the stage's code; raise it when the same settings give other bytes.
        settings: resolved configuration that decides the content, JSON-ready.
        inputs: stages whose artifacts this one reads, by role.
        build: writes the artifact into the context's `out`.
        label: what the user reads; default the name.
        placement: stages that say where the work is done and not what comes out, such as a graph's partitions: read
            like inputs, not part of the key, built only when this stage has to be.
    """

    name: str
    version: int
    settings: dict
    inputs: dict[str, Stage]
    build: Callable[[StageContext], None]
    label: str = ""
    placement: dict[str, Stage] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """Content hash: settings, code version and the hashes of all inputs."""
        return content_key(self.name, self.version, self.settings, {r: s.key for r, s in self.inputs.items()})

    @property
    def title(self) -> str:
        return self.label or self.name


def closure(stages: list[Stage], finished: Callable[[Stage], bool] = lambda _: False) -> list[Stage]:
    """The stages and everything they read, inputs first, each content hash once.

    Args:
        stages: what is wanted.
        finished: stages that need no placement any more.
    """
    ordered: dict[tuple[str, str], Stage] = {}

    def visit(stage: Stage) -> None:
        for upstream in stage.inputs.values():
            visit(upstream)
        if stage.placement and not finished(stage):
            for upstream in stage.placement.values():
                visit(upstream)
        ordered.setdefault((stage.name, stage.key), stage)

    for stage in stages:
        visit(stage)
    return list(ordered.values())


def execute(
    stages: list[Stage],
    store: ArtifactStore,
    run: RunFolder,
    runtime: RuntimeConfig,
    *,
    on_stage: Callable[[Stage, str, Path], None] | None = None,
) -> dict[str, Path]:
    """Build or reuse every stage in order.

    Args:
        stages: the method's stages; what they read is added.
        store: artifacts.
        run: run folder that receives events, metrics and links.
        runtime: passed to the builds.
        on_stage: called with (stage, 'reused' | 'building' | 'built', folder) for display.

    Returns:
        Artifact folder by stage title.
    """
    notify = on_stage or (lambda *_: None)
    done: dict[str, Path] = {}
    for stage in closure(stages, lambda stage: _reuse(stage, store, run) is not None):
        folder = _reuse(stage, store, run)
        built = None
        if folder is None:
            folder, built = _build(stage, store, run, runtime, notify)
        if built is None:
            store.keep(stage.name, stage.key)
            run.event("stage_reused", stage=stage.title, key=stage.key)
            notify(stage, "reused", folder)
        else:
            run.event("stage_built", stage=stage.title, key=stage.key, seconds=built)
            notify(stage, "built", folder)
        run.link(stage.title, stage.name, stage.key, folder)
        for record in read_jsonl(folder / "curves.jsonl"):
            run.metric(stage=stage.title, **record)
        done[stage.title] = folder
    return done


def _reuse(stage: Stage, store: ArtifactStore, run: RunFolder) -> Path | None:
    if not store.exists(stage.name, stage.key):
        return None
    try:
        return store.open(stage.name, stage.key)
    except ArtifactError as error:  # named, quarantined, and rebuilt below
        run.event("artifact_corrupt", stage=stage.title, key=stage.key, detail=str(error))
        run.say(f"{stage.title}: stored artifact is corrupt, moved to quarantine, building it again")
        return None


def _build(
    stage: Stage, store: ArtifactStore, run: RunFolder, runtime: RuntimeConfig, notify: Callable
) -> tuple[Path, float | None]:
    """Build a stage: its folder and the seconds, None where another process did it while this one waited."""

    def waiting(holder: str) -> None:
        run.event("stage_waiting", stage=stage.title, key=stage.key, holder=holder)
        run.say(f"{stage.title}: waiting for {holder}, which builds it")

    with store.building(stage.name, stage.key, waiting) as out:
        folder = _reuse(stage, store, run)
        if folder is not None:
            return folder, None
        started = time.time()
        notify(stage, "building", out)
        resumed = any(out.iterdir())
        run.event("stage_started", stage=stage.title, key=stage.key, resumed=resumed)
        context = StageContext(
            out=out,
            inputs={role: store.open(s.name, s.key) for role, s in (stage.inputs | stage.placement).items()},
            runtime=runtime,
            key=stage.key,
            title=stage.title,
            events_file=run.path / "events.jsonl",
        )
        stage.build(context)
        folder = store.finish(
            stage.name,
            stage.key,
            {
                "version": stage.version,
                "settings": stage.settings,
                "inputs": {role: {"stage": s.name, "key": s.key} for role, s in stage.inputs.items()},
            },
        )
        return folder, round(time.time() - started, 2)
