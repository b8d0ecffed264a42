"""Checkpoints on disk: which are whole, how a new one takes its place, which go. Knows nothing of threads or workers.

`step-<n>/` holds the training state and checkpoint.json: loop state, fingerprint, bytes and SHA-256 of each file, and
name and digest of the best parameters that belong to it. These lie in `best-<n>/`, with a checkpoint.json of their own;
several steps share them. What is being written or removed is called `writing-...` and does not count.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from genrec_dist.artifacts.files import read_json, sha256_file, sync_folder, write_json
from genrec_dist.errors import CheckpointError, CheckpointSpaceError

MANIFEST = "checkpoint.json"
BEST = "best"
"""Part of an unfinished checkpoint that becomes a folder of its own."""
Files = dict[str, dict]
"""Bytes and SHA-256 of each file, by its name in the unfinished folder."""


class CheckpointFolder:
    """The checkpoints of one training.

    Args:
        path: where they live.
        keep: number of newest ones kept.
        fingerprint: of the training; checkpoints of another one are not used.
    """

    def __init__(self, path: Path, keep: int, fingerprint: str) -> None:
        self.path, self.keep, self.fingerprint = path, keep, fingerprint
        self.skipped: list[str] = []
        self._passed_over: set[str] = set()

    def start(self, step: int) -> Path:
        """An empty folder to fill. What a killed writer left goes."""
        for left in self.path.glob("writing-*"):
            shutil.rmtree(left, ignore_errors=True)
        work = self.work(step)
        work.mkdir(parents=True)
        return work

    def work(self, step: int) -> Path:
        """The folder that `start` makes."""
        return self.path / f"writing-{step}"

    def finish(
        self, step: int, loop: dict[str, Any], files: Files, best_step: int | None, known: dict | None
    ) -> dict | None:
        """Make the filled folder count, then remove what is not kept.

        Args:
            step: of the checkpoint.
            loop: JSON-ready state of the loop.
            files: everything in the folder; names under `best/` are the new best parameters.
            best_step: step of these, if there are any.
            known: the best parameters that the checkpoint belongs to, if they are on disk already.

        Returns:
            The best parameters that it belongs to: name, step and digest, `known` for the next checkpoint.
        """
        work, best = self.work(step), known
        inner = {name.removeprefix(f"{BEST}/"): entry for name, entry in files.items() if name.startswith(f"{BEST}/")}
        common = {"fingerprint": self.fingerprint}
        if inner:
            name = f"{BEST}-{best_step}"
            digest = self._place(work / BEST, name, {"step": best_step, **common, "files": inner})
            best = {"name": name, "step": best_step, "sha256": digest}
        outer = {name: entry for name, entry in files.items() if not name.startswith(f"{BEST}/")}
        self._place(work, f"step-{step}", {"step": step, **common, "loop": loop, "files": outer, "best": best})
        self._passed_over.discard(f"step-{step}")
        self._prune()
        return best

    def _place(self, work: Path, name: str, record: dict) -> str:
        """Write the manifest, flush, rename, flush; the SHA-256 of the manifest."""
        write_json(work / MANIFEST, record)
        sync_folder(work)
        digest, final = sha256_file(work / MANIFEST), self.path / name
        if final.exists():
            _remove(final)
        os.replace(work, final)
        sync_folder(self.path)
        return digest

    def _numbered(self, kind: str) -> list[Path]:
        found = [p for p in self.path.glob(f"{kind}-*") if p.name[len(kind) + 1 :].isdigit()]
        return sorted(found, key=lambda p: int(p.name[len(kind) + 1 :]))

    def _prune(self) -> None:
        """Keep the newest steps, and the best parameters that one of them names. A step found broken is not kept."""
        steps = self._numbered("step")
        kept = [path for path in steps if path.name not in self._passed_over][-self.keep :]
        named = {_best_name(path) for path in kept}
        for path in steps:
            if path not in kept:
                _remove(path)
        for path in self._numbered(BEST):
            if path.name not in named:
                _remove(path)
        self._passed_over.clear()

    def newest(self, needed: str) -> Path | None:
        """The newest checkpoint whose files, best parameters included, are all there and whole, `needed` among them.

        Those that are newer and not usable are named in `skipped`, and go when the next one has been written.
        """
        self.skipped, self._passed_over = [], set()
        for path in reversed(self._numbered("step")):
            problem = self._problem(path, needed)
            if problem is None:
                return path
            self.skipped.append(f"{path.name}: {problem}")
            self._passed_over.add(path.name)
        return None

    def _problem(self, path: Path, needed: str) -> str | None:
        try:
            record = read_json(path / MANIFEST)
            files, best, fingerprint = _entries(record), record["best"], record["fingerprint"]
            record["loop"].keys()
            named = None if best is None else (best["name"], best["sha256"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"no readable manifest ({type(error).__name__})"
        if fingerprint != self.fingerprint:
            return f"of other settings: fingerprint {fingerprint!r}, not {self.fingerprint!r}"
        if needed not in files:  # of a training whose tables are sharded, or are not
            return f"it has no {needed}"
        problem = _problem_of_files(path, files)
        if problem is None and named is not None:
            problem = _problem_of_best(self.path, *named)
        return problem


def _entries(record: dict) -> dict[str, tuple[int, str]]:
    return {name: (entry["bytes"], entry["sha256"]) for name, entry in record["files"].items()}


def _problem_of_files(path: Path, files: dict[str, tuple[int, str]]) -> str | None:
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing or truncated"
        if sha256_file(file) != digest:
            return f"{name} does not match its SHA-256"
    return None


def _problem_of_best(folder: Path, name: str, digest: str) -> str | None:
    path = folder / name
    try:
        files = _entries(read_json(path / MANIFEST))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{name} has no readable manifest ({type(error).__name__})"
    if sha256_file(path / MANIFEST) != digest:
        return f"{name} is not the one that it was saved with"
    problem = _problem_of_files(path, files)
    return problem and f"{name}/{problem}"


def _best_name(path: Path) -> str | None:
    """Name of the best parameters that a kept checkpoint belongs to; a broken one names none."""
    try:
        best = read_json(path / MANIFEST)["best"]
        return best and best["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a kill half-way leaves none that looks whole."""
    gone = path.with_name(f"writing-removed-{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def write_errors(path: Path, needed: int) -> Iterator[None]:
    """Turn errors of the file system into errors that say what to do.

    Args:
        path: of the checkpoints.
        needed: bytes that are being written; 0: a manifest alone.

    Raises:
        CheckpointSpaceError: no space, or no quota, is left.
        CheckpointError: any other error of the operating system.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointSpaceError(
                "no room for a checkpoint",
                where=path,
                got=f"{os.strerror(error.errno)}; {_free(path)}",
                expected=f"room for {needed:,} bytes beside what is kept" if needed else "room for a manifest",
                fix="free space and run the same command again: it continues from the last checkpoint",
            ) from error
        raise CheckpointError(
            "a checkpoint could not be written",
            where=error.filename or path,
            got=f"{type(error).__name__}: {os.strerror(error.errno) if error.errno else error}",
            expected="a folder that can be written to",
            fix="mend that and run the same command again: it continues from the last checkpoint",
        ) from error


def _free(path: Path) -> str:
    try:
        return f"{shutil.disk_usage(path).free:,} bytes free"
    except OSError:
        return "free space unknown"
