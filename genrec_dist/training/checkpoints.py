"""Checkpoints of the train loop: written by a thread, one at a time, while the loop goes on. No pickle.

A save takes tensors that nobody changes any more and returns; the next one waits for it. Parameters of the best
validation so far are written once, when they are new. The newest checkpoint that is whole is used, and worker 0 decides
which one for all. The layout on disk is `checkpoint_folder`'s.

Where tables are sharded by owner, each worker writes `state-<rank>.safetensors` and `model-<rank>.safetensors` with its
rows and their names, and any number of workers can read them.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch
from safetensors.torch import load_file

from genrec_dist.artifacts.files import read_json, write_json
from genrec_dist.artifacts.tensors import save_tensors
from genrec_dist.training.agreement import agree_on_error
from genrec_dist.training.checkpoint_folder import BEST, MANIFEST, CheckpointFolder, Files, write_errors
from genrec_dist.training.worker import Worker

State = dict[str, torch.Tensor]
POLL_SECONDS = 0.02
PATIENCE_SECONDS = 20.0
"""How long a worker that leaves by an error waits for the other workers' parts."""


@dataclass(frozen=True)
class _Save:
    """What one save writes; `best` only where it is new."""

    step: int
    loop: dict[str, Any]
    state: State
    best: State | None
    best_step: int
    known: dict | None

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for tensors in (self.state, self.best or {}) for t in tensors.values())


class Checkpoints:
    """Checkpoints of one training under one folder. A context manager: leaving it waits for the write in flight.

    Args:
        folder: where they live.
        keep: number of newest ones kept, with the best parameters that they belong to.
        fingerprint: content hash of the training; checkpoints of another one are named and skipped.
        background: False waits for every write.

    Attributes:
        skipped: what `latest` passed over, and why.
        stalled_seconds: how long `save` and `wait` kept their callers, in all.
    """

    def __init__(self, folder: Path, keep: int = 2, *, fingerprint: str = "", background: bool = True) -> None:
        self.folder, self.background = folder, background
        self.stalled_seconds = 0.0
        self._disk = CheckpointFolder(folder, keep, fingerprint)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._flight: list[Future] = []
        self._worker = Worker()
        self._stop = Event()
        self._leaving = Event()
        self._best_step: int | None = None  # of the best parameters that are on disk; the same on all workers
        self._new_best: int | None = None  # of those in flight
        self._best: dict | None = None  # their name and digest, known to the writer of manifests

    @property
    def skipped(self) -> list[str]:
        return self._disk.skipped

    # Writing

    def save(self, step: int, loop: dict[str, Any], state: State, best: State | None, best_step: int) -> float:
        """Hand a checkpoint to the writer, once it has finished the one before.

        Args:
            step: of the checkpoint.
            loop: JSON-ready state of the loop; the caller keeps no hold on what is inside.
            state: on the CPU, not changed any more.
            best: best parameters so far, likewise; written only if `best_step` is not the one on disk.
            best_step: the step that they are of.

        Returns:
            Seconds that the caller waited.

        Raises:
            CheckpointError: the write before could not be finished (without `background`: this one).
        """
        with self._stalling() as stalled:
            self._settle()
            save = self._next(step, loop, state, best, best_step)
            with write_errors(self.folder, save.bytes):
                work = self._disk.start(step)
            self._flight = [self._thread.submit(self._write_whole, save, work)]
            del save
            if not self.background:
                self._settle()
        return stalled[0]

    def save_sharded(
        self, step: int, loop: dict[str, Any], state: State, best: State | None, best_step: int, worker: Worker
    ) -> float:
        """Hand a checkpoint to the writers, of which every worker has a part. All workers have to call this together.

        It counts when the last part is there. Arguments, result and errors as of `save`; one worker's error is raised
        on all.
        """
        with self._stalling() as stalled:
            self._settle()
            self._worker = worker
            save, work = self._next(step, loop, state, best, best_step), self._disk.work(step)
            with write_errors(self.folder, save.bytes):
                if worker.is_main:
                    self._disk.start(step)
                worker.barrier()
            self._stop.clear()
            self._flight = [self._thread.submit(self._write_part, save, work)]
            if worker.is_main:
                own = self._flight[0]
                join = self._thread.submit(self._join_parts, own, step, save.loop, best_step, save.known)
                self._flight.append(join)
            del save
            if not self.background:
                self._settle()
        return stalled[0]

    def wait(self) -> float:
        """Wait for the write in flight; before a copy of the state is made, so that there is one at a time.

        Sharded checkpoints: all workers have to call this together. Returns and raises as `save` does.
        """
        with self._stalling() as stalled:
            self._settle()
        return stalled[0]

    def close(self) -> None:
        """Wait for the write in flight and end the writer. Raises as `save` does, and works as `wait`."""
        try:
            self.wait()
        except BaseException:
            self._leaving.set()
            raise
        finally:
            self._thread.shutdown()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
            return
        self._leaving.set()  # the other workers may be gone: no collectives
        for future in self._flight:
            if (problem := future.exception()) is not None:
                error.add_note(f"besides, the checkpoint in flight was not written: {problem}")
        self._flight = []
        self._thread.shutdown()

    @contextmanager
    def _stalling(self) -> Iterator[list[float]]:
        started, seconds = time.monotonic(), [0.0]
        try:
            yield seconds
        finally:
            seconds[0] = time.monotonic() - started
            self.stalled_seconds += seconds[0]

    def _next(self, step: int, loop: dict[str, Any], state: State, best: State | None, best_step: int) -> _Save:
        if best is None:
            return _Save(step, loop, state, None, 0, None)
        if best_step == self._best_step:
            return _Save(step, loop, state, None, best_step, self._best)
        self._new_best = best_step
        return _Save(step, loop, state, best, best_step, None)

    def _settle(self) -> None:
        """Wait for the write in flight, on all workers that take part in it, and raise its error on all of them."""
        if not self._flight:
            return
        flight, self._flight = self._flight, []
        error = agree_on_error(flight[0].exception(), self._worker)
        if error is not None:
            self._stop.set()
        joined = [future.exception() for future in flight[1:]]
        error = error or agree_on_error(next(iter(joined), None), self._worker)
        if error is not None:
            raise error
        if self._new_best is not None:
            self._best_step, self._new_best = self._new_best, None

    def _write_whole(self, save: _Save, work: Path) -> None:
        try:
            with write_errors(self.folder, save.bytes):
                self._finish(save.step, save.loop, _write(work, "", save), save.best_step, save.known)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise

    def _write_part(self, save: _Save, work: Path) -> None:
        rank = self._worker.rank
        with write_errors(self.folder, save.bytes):
            write_json(work / f"{rank}.part.json", _write(work, f"-{rank}", save))

    def _join_parts(self, own: Future, step: int, loop: dict[str, Any], best_step: int, known: dict | None) -> None:
        work, files = self._disk.work(step), Files()
        try:
            for part in self._await_parts(work) if own.exception() is None else ():
                files |= read_json(part)
                part.unlink()
            with write_errors(self.folder, 0):
                if files:
                    self._finish(step, loop, files, best_step, known)
        finally:  # finished, it has another name
            shutil.rmtree(work, ignore_errors=True)

    def _await_parts(self, work: Path) -> list[Path]:
        """The workers' descriptions of their parts, once all are there; none if they will not come."""
        parts, waited = [work / f"{rank}.part.json" for rank in range(self._worker.world_size)], 0.0
        while not all(part.exists() for part in parts):
            waited += POLL_SECONDS if self._leaving.is_set() else 0.0
            if self._stop.wait(POLL_SECONDS) or waited > PATIENCE_SECONDS:
                return []
        return parts

    def _finish(self, step: int, loop: dict[str, Any], files: Files, best_step: int, known: dict | None) -> None:
        self._best = self._disk.finish(step, loop, files, best_step, known)

    # Reading

    def latest(self, worker: Worker) -> tuple[dict[str, Any], State, State | None] | None:
        """Loop state, training state and best parameters of the newest whole checkpoint, or None.

        All workers have to call this together: worker 0 chooses, by reading every byte, and all read what it chose.
        """
        found = self._chosen("state.safetensors", worker)
        if found is None:
            return None
        path, record, best = found
        # Loaded tensors are views into the file: a copy outlives it.
        copies = {name: t.clone() for name, t in load_file(best / "model.safetensors").items()} if best else None
        return record["loop"], load_file(path / "state.safetensors"), copies

    def latest_sharded(self, worker: Worker) -> tuple[dict[str, Any], list[Path], list[Path]] | None:
        """Loop state, and the files of all parts: state and best (none yet: empty). As `latest` otherwise."""
        found = self._chosen("state-0.safetensors", worker)
        if found is None:
            return None
        path, record, best = found
        return record["loop"], sorted(path.glob("state-*")), sorted(best.glob("model-*")) if best else []

    def _chosen(self, needed: str, worker: Worker) -> tuple[Path, dict, Path | None] | None:
        step = -1
        if worker.is_main:
            path = self._disk.newest(needed)
            step = -1 if path is None else int(path.name.removeprefix("step-"))
        step = int(worker.broadcast(torch.tensor(step, device=worker.device)).item())
        if step < 0:
            return None
        path = self.folder / f"step-{step}"
        record = read_json(path / MANIFEST)
        best = self._best = record["best"]
        self._best_step = best["step"] if best else None
        return path, record, self.folder / best["name"] if best else None


def _write(work: Path, suffix: str, save: _Save) -> Files:
    """Write state and new best parameters; what was written."""
    name = f"state{suffix}.safetensors"
    files = {name: save_tensors(save.state, work / name)}
    if save.best is not None:
        (work / BEST).mkdir(exist_ok=True)
        name = f"{BEST}/model{suffix}.safetensors"
        files[name] = save_tensors(save.best, work / name)
    return files
