"""Checkpoints of the train loop: safetensors plus a JSON manifest written last.

`<folder>/step-<n>/` holds state.safetensors (parameters, Adam moments), best.safetensors (parameters of the
best validation so far, when there is one) and checkpoint.json (loop state, sizes and SHA-256). The newest
valid one is used; a corrupt one is named and skipped. No pickle.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from genrec_dist.artifacts.files import read_json, sha256_file, write_json

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
        final = self.folder / f"step-{step}"
        work = self.folder / f"writing-{step}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        save_file(state, work / "state.safetensors")
        if best is not None:
            save_file(best, work / "best.safetensors")
        files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in work.iterdir()}
        write_json(work / MANIFEST, {"step": step, "loop": loop, "files": files})
        shutil.rmtree(final, ignore_errors=True)
        os.replace(work, final)
        for old in self._steps()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def latest(self) -> tuple[dict[str, Any], State, State | None] | None:
        """Loop state, training state and best parameters of the newest valid checkpoint, or None."""
        self.skipped = []
        for path in reversed(self._steps()):
            problem = _problem(path)
            if problem:
                self.skipped.append(f"{path.name}: {problem}")
                continue
            best = path / "best.safetensors"
            return (
                read_json(path / MANIFEST)["loop"],
                load_file(path / "state.safetensors"),
                load_file(best) if best.exists() else None,
            )
        return None


def _problem(path: Path) -> str | None:
    try:
        record = read_json(path / MANIFEST)
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in record["files"].items()}
        record["loop"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"no readable manifest ({type(error).__name__})"
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing or truncated"
        if sha256_file(file) != digest:
            return f"{name} does not match its SHA-256"
    return None
