"""Artifact store: `<store>/<stage>/<content hash>/` with a MANIFEST.json written last.

An artifact is built in `<hash>.building/`, which survives a kill so that the stage can continue, and is
renamed when its manifest is complete. A folder without a manifest does not exist for readers. A corrupt
artifact is named, moved to `quarantine/` and rebuilt.

Processes that want the same artifact take turns at `.<hash>.lock`, held by `flock`: the kernel gives it back however
its holder ends, so there is no stale lock to take over. The file says who holds it, for those who wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from genrec_dist.artifacts.files import canonical_json, read_json, sha256_file, write_json
from genrec_dist.config import check_name
from genrec_dist.errors import ArtifactError

MANIFEST, SCRATCH = "MANIFEST.json", "scratch"


def content_key(name: str, version: int, settings: dict, inputs: dict[str, str]) -> str:
    """Content hash (16 hex digits) of a stage: code version, resolved settings, hashes of its inputs."""
    text = canonical_json({"stage": name, "version": version, "settings": settings, "inputs": inputs})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _files(folder: Path, besides: Path | None = None) -> list[Path]:
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return sorted(p for p in found if besides is None or not p.is_relative_to(besides))


def _checksums(files: list[Path]) -> list[str]:
    """SHA-256 of files, several at a time: hashing and reading leave the interpreter free."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(sha256_file, files))


def write_manifest(folder: Path, description: dict, besides: Path | None = None) -> None:
    """Write the manifest of everything in a folder: with it the folder is a finished artifact.

    Args:
        besides: a folder in it that is left out, and has to go before anybody reads the artifact.
    """
    files = _files(folder, besides)
    entries = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": checksum}
        for file, checksum in zip(files, _checksums(files))
    }
    write_json(folder / MANIFEST, {**description, "files": entries})


def problems_of(folder: Path) -> list[str]:
    """Problems of an artifact folder, empty when every file has the size and SHA-256 of its manifest."""
    try:
        recorded = read_json(folder / MANIFEST)["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST}: {type(error).__name__}: {error}"]
    problems, whole = [], []
    for name, entry in recorded.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{name}: missing")
        elif file.stat().st_size != entry["bytes"]:
            problems.append(f"{name}: {file.stat().st_size} bytes, recorded {entry['bytes']}")
        else:
            whole.append(name)
    for name, checksum in zip(whole, _checksums([folder / name for name in whole])):
        if checksum != recorded[name]["sha256"]:
            problems.append(f"{name}: SHA-256 differs from the recorded one")
    extra = {str(p.relative_to(folder)) for p in _files(folder)} - set(recorded)
    return problems + [f"{name}: not in the manifest" for name in sorted(extra)]


def _take(lock: TextIO, waiting: Callable[[str], None]) -> None:
    """Wait for an open lock file, then write this process into it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        waiting(lock.read().strip() or "another process")
        fcntl.flock(lock, fcntl.LOCK_EX)
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}")
        lock.flush()


class ArtifactStore:
    """Content-addressed artifacts under one root folder.

    Args:
        root: folder of the store, made when something is built.
    """

    remote = False
    """Whether the folder is only a cache."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).resolve()
        self._verified: set[Path] = set()
        self._held: set[Path] = set()

    def path(self, stage: str, key: str) -> Path:
        """Where the finished artifact lives (whether or not it exists)."""
        return self.root / check_name(stage, "stage") / check_name(key, "key")

    def work_folder(self, stage: str, key: str) -> Path:
        """Where the artifact is built."""
        return self.path(stage, key).with_name(f"{key}.building")

    def exists(self, stage: str, key: str) -> bool:
        """True when a manifest is there; says nothing about the bytes (see `verify`)."""
        return (self.path(stage, key) / MANIFEST).is_file()

    def has_unfinished(self, stage: str, key: str) -> bool:
        """True when a killed build left something to continue from."""
        folder = self.work_folder(stage, key)
        return folder.is_dir() and any(folder.iterdir())

    def keep(self, stage: str, key: str) -> None:
        """See to it that a finished artifact lasts: from a folder that is only a cache it is copied on."""

    def snapshot(self) -> None:
        """Copy unfinished builds to what is behind a cache."""

    def verify(self, stage: str, key: str) -> list[str]:
        """Problems of a finished artifact, empty when every file has the recorded size and SHA-256."""
        return problems_of(self.path(stage, key))

    def open(self, stage: str, key: str) -> Path:
        """Folder of a finished, verified artifact (bytes are checked once a process).

        Raises:
            ArtifactError: missing, or corrupt (then it has been moved to quarantine).
        """
        folder = self.path(stage, key)
        if not self.exists(stage, key):
            raise ArtifactError("no such artifact", where=folder, fix="run the stage that builds it")
        if folder not in self._verified:
            if self.verify(stage, key):
                self._set_aside(stage, key)
            self._verified.add(folder)
        return folder

    def _set_aside(self, stage: str, key: str) -> None:
        """Quarantine an artifact that looks corrupt, unless another process has rebuilt it meanwhile.

        Raises:
            ArtifactError: it was corrupt.
        """
        folder = self.path(stage, key)
        with self._locked(stage, key):
            problems = self.verify(stage, key)
            if not problems:
                return
            moved = f"the bad copy is {self.quarantine(stage, key)}" if self.exists(stage, key) else "it is gone"
            raise ArtifactError(
                "artifact is corrupt and was moved to quarantine",
                where=folder,
                got="; ".join(problems[:5]),
                expected="the sizes and SHA-256 of its manifest",
                fix=f"run the same command again to rebuild it; {moved}",
            )

    def quarantine(self, stage: str, key: str) -> Path:
        """Move an artifact out of the way and return where it went."""
        target = self.root / "quarantine" / f"{stage}-{key}-{time.time_ns()}"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.path(stage, key), target)
        self._verified.discard(self.path(stage, key))
        return target

    @contextmanager
    def building(self, stage: str, key: str, waiting: Callable[[str], None] = lambda _: None) -> Iterator[Path]:
        """Exclusive work folder of an artifact; what a killed build left is still in it.

        A second process that wants the same artifact waits here for the first, and should then see whether it `exists`.

        Args:
            stage: name of the stage.
            key: content hash.
            waiting: called with who holds the lock, before this process waits for it.

        Raises:
            ArtifactError: the file system has no locks.
        """
        with self._locked(stage, key, waiting):
            folder = self.work_folder(stage, key)
            folder.mkdir(exist_ok=True)
            self._undo_aside(stage, key, folder)
            try:
                yield folder
            finally:
                with contextlib.suppress(OSError):  # one that was not needed; what holds anything stays
                    folder.rmdir()

    @contextmanager
    def _locked(self, stage: str, key: str, waiting: Callable[[str], None] = lambda _: None) -> Iterator[None]:
        """Hold an artifact's lock; again inside itself it is the same lock."""
        final = self.path(stage, key)
        if final in self._held:
            yield
            return
        final.parent.mkdir(parents=True, exist_ok=True)
        with open(final.with_name(f".{key}.lock"), "a+", encoding="utf-8") as lock:
            try:
                _take(lock, waiting)
            except OSError as error:
                raise ArtifactError(
                    "the store's file system has no locks",
                    where=lock.name,
                    got=f"{type(error).__name__}: {error}",
                    expected="one that supports flock, so that two processes never build one artifact at once",
                    fix="choose another --store; see docs/cluster.md",
                ) from error
            self._held.add(final)
            try:
                yield
            finally:
                self._held.discard(final)

    def finish(self, stage: str, key: str, description: dict) -> Path:
        """Checksum the work folder, write its manifest last, and rename it into place.

        Call inside `building`. `scratch/` inside the work folder (checkpoints of a running stage) is dropped, once the
        checksums, which may take minutes, are there: a build that is killed before goes on from it.
        """
        final = self.path(stage, key)
        folder = self.work_folder(stage, key)
        scratch, aside = folder / SCRATCH, _aside(folder)
        for pattern in (".*.tmp", "*.partial"):  # our atomic writes and Zarr's, killed before their rename
            for leftover in folder.rglob(pattern):
                leftover.unlink()
        write_manifest(folder, {"stage": stage, "key": key, **description}, besides=scratch)
        if final.exists():  # a folder that lost its manifest
            self.quarantine(stage, key)
        if scratch.exists():
            os.replace(scratch, aside)
        os.replace(folder, final)
        shutil.rmtree(aside, ignore_errors=True)
        self._verified.add(final)
        return final

    def _undo_aside(self, stage: str, key: str, folder: Path) -> None:
        """Put back the scratch that a kill between the renames of `finish` left, or remove it behind them."""
        aside = _aside(folder)
        if not aside.exists():
            return
        if self.exists(stage, key) or (folder / SCRATCH).exists():
            shutil.rmtree(aside)
        else:
            (folder / MANIFEST).unlink(missing_ok=True)
            os.replace(aside, folder / SCRATCH)

    def discard_building(self, stage: str, key: str) -> None:
        """Throw away an unfinished build."""
        folder = self.work_folder(stage, key)
        for part in (folder, _aside(folder)):
            shutil.rmtree(part, ignore_errors=True)


def _aside(folder: Path) -> Path:
    """Where the scratch of a work folder is for the moment in which the folder becomes the artifact."""
    return folder.with_name(f".{folder.name}.{SCRATCH}")
