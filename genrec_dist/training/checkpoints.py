"""Checkpoints of the train loop: safetensors plus a JSON manifest written last.

`<folder>/step-<n>/` holds state.safetensors (parameters, Adam moments), best.safetensors (parameters of the
best validation so far, when there is one) and checkpoint.json (loop state, sizes and SHA-256). The newest
valid one is used; a corrupt one is named and skipped. No pickle.

Where tables are sharded by owner, each worker writes `state-<rank>.safetensors` and `best-<rank>.safetensors` with its
rows and their names, and any number of workers can read them.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from genrec_dist.artifacts.files import read_json, sha256_file, write_json
from genrec_dist.training.worker import Worker

MANIFEST = "checkpoint.json"
State = dict[str, torch.Tensor]


class Checkpoints:
    """Checkpoints of one training under one folder.

    Args:
        folder: where they live.
        keep: number of newest ones kept.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self.skipped: list[str] = []

    def _steps(self) -> list[Path]:
        found = [p for p in self.folder.glob("step-*") if p.name[5:].isdigit()]
        return sorted(found, key=lambda p: int(p.name[5:]))

    def save(self, step: int, loop: dict[str, Any], state: State, best: State | None) -> Path:
        """Write a checkpoint; it counts only once its manifest is there. Older ones beyond `keep` go."""
        work = self._start(step)
        _write(work, "", state, best)
        return self._finish(step, loop, work, _described(work))

    def save_sharded(self, step: int, loop: dict[str, Any], state: State, best: State | None, worker: Worker) -> None:
        """Write a checkpoint of which every worker has a part. All workers have to call this together."""
        if worker.is_main:
            self._start(step)
        worker.barrier()
        work = self.folder / f"writing-{step}"
        names = _write(work, f"-{worker.rank}", state, best)
        write_json(work / f"{worker.rank}.part.json", {name: _entry(work / name) for name in names})
        worker.barrier()
        if worker.is_main:
            files: dict[str, dict] = {}
            for part in list(work.glob("*.part.json")):
                files |= read_json(part)
                part.unlink()
            self._finish(step, loop, work, files)
        worker.barrier()

    def _start(self, step: int) -> Path:
        work = self.folder / f"writing-{step}"
        for left in self.folder.glob("writing-*"):  # by a killed writer
            shutil.rmtree(left, ignore_errors=True)
        work.mkdir(parents=True)
        return work

    def _finish(self, step: int, loop: dict[str, Any], work: Path, files: dict[str, dict]) -> Path:
        final = self.folder / f"step-{step}"
        write_json(work / MANIFEST, {"step": step, "loop": loop, "files": files})
        shutil.rmtree(final, ignore_errors=True)
        os.replace(work, final)
        for old in self._steps()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def latest_sharded(self, worker: Worker) -> tuple[dict[str, Any], list[Path], list[Path]] | None:
        """Loop state, and the files of all parts: state and best. Worker 0 checks them, for all."""
        found = -1
        if worker.is_main:
            path = self._newest("state-0.safetensors")
            found = -1 if path is None else int(path.name[5:])
        found = int(worker.broadcast(torch.tensor(found, device=worker.device)).item())
        if found < 0:
            return None
        path = self.folder / f"step-{found}"
        parts = (sorted(path.glob(f"{kind}-*.safetensors")) for kind in ("state", "best"))
        return read_json(path / MANIFEST)["loop"], *parts

    def latest(self) -> tuple[dict[str, Any], State, State | None] | None:
        """Loop state, training state and best parameters of the newest valid checkpoint, or None."""
        path = self._newest("state.safetensors")
        if path is None:
            return None
        best = path / "best.safetensors"
        return (
            read_json(path / MANIFEST)["loop"],
            load_file(path / "state.safetensors"),
            load_file(best) if best.exists() else None,
        )

    def _newest(self, needed: str) -> Path | None:
        """The newest checkpoint whose files are all there and whole, `needed` among them."""
        self.skipped = []
        for path in reversed(self._steps()):
            problem = _problem(path, needed)
            if problem is None:
                return path
            self.skipped.append(f"{path.name}: {problem}")
        return None


def _write(work: Path, suffix: str, state: State, best: State | None) -> list[str]:
    """Write state and best; the names of the files."""
    names = [f"state{suffix}.safetensors"]
    save_file(state, work / names[0])
    if best is not None:
        names.append(f"best{suffix}.safetensors")
        save_file(best, work / names[1])
    return names


def _entry(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _described(work: Path) -> dict[str, dict]:
    return {path.name: _entry(path) for path in work.iterdir()}


def _problem(path: Path, needed: str) -> str | None:
    try:
        record = read_json(path / MANIFEST)
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in record["files"].items()}
        record["loop"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"no readable manifest ({type(error).__name__})"
    if needed not in files:  # of a training whose tables are sharded, or are not
        return f"it has no {needed}"
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing or truncated"
        if sha256_file(file) != digest:
            return f"{name} does not match its SHA-256"
    return None
