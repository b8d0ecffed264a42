"""Executing stages for the command line: run folder, clean screen, events, exit codes.

Reads the configuration, writes `runs/<name>/` and the artifact store. It knows nothing of what a stage does.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TextIO

import psutil

from genrec_dist.artifacts.cached_store import CachedStore, open_store
from genrec_dist.artifacts.store import ArtifactStore
from genrec_dist.cluster import leave_ray
from genrec_dist.config import Config
from genrec_dist.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, EXIT_TRAINING, CheckpointError, ConfigError
from genrec_dist.pipeline import Stage, closure, execute
from genrec_dist.run_mirror import Mirroring
from genrec_dist.runs import RunFolder
from launcher.failures import Stopped, explain
from launcher.screen import StageScreen
from launcher.signals import SignalWatch
from launcher.streams import captured
from launcher.trackers import check_tracking
from launcher.tracking import Tracking

EVENT_OF_EXIT = {EXIT_PREEMPTED: "preempted", EXIT_INTERRUPTED: "interrupted"}


def check_batches(config: Config) -> None:
    """Refuse global batches that the workers cannot share evenly, in any number that may take part.

    Raises:
        ConfigError: some `optim.batch_size` in use is not divisible by `runtime.num_workers`, or by a number between
            it and `runtime.min_workers`; or the method's stages cannot do with another number.
    """
    runtime = config.runtime
    by_owner = {"lightgcn", "fusion"} if runtime.shard_tables else {"lightgcn"}
    sections = trained_sections(config)
    if runtime.min_workers:
        check_elastic(config, by_owner & set(sections))
    counts = range(runtime.min_workers or runtime.num_workers, runtime.num_workers + 1)
    for section in sections:
        if section in by_owner:  # a worker takes what its users have in the batch
            continue
        size, even = getattr(config, section).optim.batch_size, math.lcm(*counts)
        if size % even:
            raise ConfigError(
                "batch cannot be shared evenly by the workers",
                where=f"{section}.optim.batch_size",
                got=f"{size} samples for {counts[0]} to {counts[-1]} workers"
                if len(counts) > 1
                else f"{size} samples for runtime.num_workers = {counts[0]}",
                expected=f"a multiple of {even}",
                fix=f"use {size - size % even or even} or {size + even - size % even}",
            )


def check_elastic(config: Config, by_owner: set[str]) -> None:
    """Refuse `runtime.min_workers` where the number of workers cannot change.

    Raises:
        ConfigError: without Ray, above `runtime.num_workers`, or with tables divided among the workers.
    """
    runtime = config.runtime
    wrong: tuple[object, str, str] | None = None
    if runtime.backend != "ray":
        wrong = f"runtime.backend = {runtime.backend}", "ray", "leave runtime.min_workers out"
    elif runtime.min_workers > runtime.num_workers:
        wrong = runtime.min_workers, f"at most runtime.num_workers = {runtime.num_workers}", "lower it"
    elif by_owner:
        wrong = (
            f"{sorted(by_owner)}, whose tables belong to one worker each",
            "stages that any number of workers can train",
            "leave runtime.min_workers out",
        )
    if wrong is not None:
        got, expected, fix = wrong
        raise ConfigError(
            "the number of training workers cannot change here",
            where="runtime.min_workers",
            got=got,
            expected=expected,
            fix=fix,
        )


def trained_sections(config: Config) -> list[str]:
    """Configuration sections with a gradient loop that the method or a reference uses."""
    sections = {
        "prorec": ["fusion", "generator"] if config.fusion.mode != "semantic" else ["generator"],
        "csj_id": ["lightgcn", "gpt"],
        "semantic_id": ["gpt"],
        "lightgcn": ["lightgcn"],
    }.get(config.method, [])
    if config.method == "sasrec" or any(name.startswith("sasrec") for name in config.active_references):
        sections.append("sasrec")
    if config.method == "hstu" or "hstu" in config.active_references:
        sections.append("hstu")
    return sections


def last_stage(stages: list[Stage], name: str | None) -> list[Stage]:
    """The stages up to those of one name, and nothing of what stands beside them; None: all of them.

    Raises:
        ConfigError: the method has no such stage.
    """
    if name is None:
        return stages
    found = [stage for stage in stages if stage.name == name]
    if not found:
        raise ConfigError(
            "the method has no such stage",
            where="--until",
            got=name,
            expected=f"one of {', '.join(dict.fromkeys(stage.name for stage in stages))}",
        )
    return found


def perform(
    config: Config,
    stages: list[Stage],
    *,
    store: str | Path,
    runs: str | Path,
    command: list[str],
    resume: str = "auto",
    finish: Callable[[RunFolder], None] | None = None,
    to_stderr: bool = False,
) -> RunFolder:
    """Build or reuse the stages in the run folder `runs/<config.name>`.

    Args:
        config: resolved configuration; its name is the folder's.
        stages: what to execute.
        store: artifact store, a folder or s3://BUCKET/PREFIX.
        runs: folder of all runs, likewise.
        command: for the provenance.
        resume: 'auto', 'require' or 'never', see `prepare_resume`.
        finish: called with the run folder after the last stage, screen still kept clean.
        to_stderr: progress goes to stderr, so that stdout stays free for a result.

    Returns:
        The finished run folder.

    Raises:
        Stopped: anything went wrong or a signal arrived; events.jsonl and the log already say so.
        ConfigError: another process is at work in this run folder, or a tracker's package is not installed.
        CheckpointError: resume='require' and there is nothing to continue from.
    """
    from genrec_dist.training import watchdog

    check_tracking(config.tracking)
    if resume == "require":
        require_progress(stages, store)
    run, artifacts = RunFolder(runs, config.name), open_store(store)
    if isinstance(artifacts, CachedStore):
        artifacts.tell = run.event
    needed = closure(stages, lambda stage: is_finished(stage, store))
    log = run.path / "logs" / "driver.log"
    with _exclusive(run):
        if run.mirror is not None:
            run.mirror.pull_locked()
        run.create(config, command)
        run.event(
            "process",
            pid=os.getpid(),
            created=psutil.Process().create_time(),
            host=platform.node(),
            store=os.path.relpath(artifacts.root, run.path),
            stages=[{"stage": s.title, "key": s.key} for s in needed],
        )
        started = time.time()
        with (
            SignalWatch() as signals,
            captured(log, to_stderr=to_stderr) as stream,
            Mirroring(run.mirror, artifacts, config.runtime.mirror_seconds, run.event) as mirroring,
        ):
            screen = StageScreen(stream, len(needed), config.runtime.progress_seconds)
            run.say = screen.note
            tracking = Tracking(config, run)
            watchdog.last_words = partial(_hung, run, screen, stream)
            try:
                if resume == "never":
                    discard_unfinished(stages, artifacts)
                with tracking:
                    told = _all(screen.on_stage, tracking.on_stage, lambda *_: mirroring.soon())
                    execute(stages, artifacts, run, config.runtime, on_stage=told)
                if finish is not None:
                    finish(run)
                screen.close(failed=False)
                run.event("run_finished", exit_code=0, seconds=round(time.time() - started, 2))
                mirroring.push()
            except BaseException as error:
                failure = explain(error, signals.seen())
                failure.log = log
                kind = EVENT_OF_EXIT.get(failure.exit_code, "run_failed")
                with contextlib.suppress(OSError):  # a full disk must not hide the failure and its code
                    run.event(kind, exit_code=failure.exit_code, type=failure.kind, error=failure.text)
                traceback.print_exc(file=sys.stderr)
                screen.close(failed=True)
                _push_last(mirroring)
                raise Stopped(failure) from error
            finally:
                watchdog.last_words = None
                _leave()
    return run


def _all(*callbacks: Callable[[Stage, str, Path], None]) -> Callable[[Stage, str, Path], None]:
    def call(stage: Stage, state: str, folder: Path) -> None:
        for callback in callbacks:
            callback(stage, state, folder)

    return call


def _hung(run: RunFolder, screen: StageScreen, stream: TextIO, text: str) -> None:
    """What is left to say of a training that its watchdog ends together with this process."""
    run.event("run_failed", exit_code=EXIT_TRAINING, type="WorkerHung", error=text)
    screen.close(failed=True)
    stream.write(f"error: {text}\n  fix: the same command continues from the last checkpoint\n")
    stream.flush()


def _push_last(mirroring: Mirroring) -> None:
    """How a run failed, for who looks into the bucket; the failure itself must not be hidden by another."""
    try:
        mirroring.push()
    except Exception:
        traceback.print_exc(file=sys.stderr)


def _leave() -> None:
    try:
        leave_ray()
    except Exception:  # the work is done or its failure recorded; a clumsy shutdown changes neither
        traceback.print_exc(file=sys.stderr)


@contextmanager
def _exclusive(run: RunFolder) -> Iterator[None]:
    """Hold the run folder; the lock goes with the process, however it ends."""
    run.path.mkdir(parents=True, exist_ok=True)
    with open(run.path / ".lock", "w", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                "another process is at work in this run",
                where=run.path,
                fix=f"wait for it (`genrec status {run.path.name}`), or choose another --name",
            ) from None
        yield


def require_progress(stages: list[Stage], store: str | Path) -> None:
    """Check that there is something to continue from: what `--resume require` asks.

    Raises:
        CheckpointError: no stage after the catalog is finished, and none at all has an unfinished build.
    """
    for stage in closure(stages):
        if has_unfinished(stage, store) or (stage.inputs and is_finished(stage, store)):
            return
    raise CheckpointError(
        "nothing to continue from",
        where=store,
        got="no finished stage after the catalog and no unfinished build of this configuration",
        expected="work that an earlier call of the same configuration left",
        fix="use --resume auto, or check --store and the settings (any other setting gives another content hash)",
    )


def is_finished(stage: Stage, store: str | Path) -> bool:
    """True when the store holds the stage's artifact (its bytes are not checked)."""
    return open_store(store).exists(stage.name, stage.key)


def has_unfinished(stage: Stage, store: str | Path) -> bool:
    """True when a killed build of the stage left something to continue from."""
    return open_store(store).has_unfinished(stage.name, stage.key)


def discard_unfinished(stages: list[Stage], store: ArtifactStore) -> None:
    """Throw away unfinished builds and their checkpoints; finished artifacts stay."""
    for stage in closure(stages):
        if store.has_unfinished(stage.name, stage.key):
            with store.building(stage.name, stage.key):  # waits for a process that builds it just now
                store.discard_building(stage.name, stage.key)
