"""Unfinished builds in an S3 bucket, so that a job that starts again on another machine goes on where it was.

A snapshot is everything in a work folder that a killed process would find again: files written before one moment, and
what JSON Lines files held then. Files there are written in the order of what needs what (a record after its data, a
manifest after its files), so a snapshot up to a moment lacks nothing that it names. Hard links hold the files while
they travel. SNAPSHOT.json comes last and replaces only the one that this process wrote or claimed: of two machines with
the same build, the one that claimed it last counts, and the other stops.

Objects: `<stage>/<key>.building/SNAPSHOT.json` and `<stage>/<key>.building/<SHA-256 of the content>`.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from genrec_dist.artifacts.bucket import Bucket
from genrec_dist.artifacts.files import sha256_file
from genrec_dist.artifacts.places import is_inside

SNAPSHOT = "SNAPSHOT.json"
PARALLEL_FILES = 8
PASSING = (
    "scratch/attempt/*", "scratch/ray_train/*", "scratch/embedded/*", "scratch/progress.json", "scratch/stop",
    "scratch/stopped", "*/writing-*", ".*.tmp", "*/.*.tmp", "*.partial",
)  # fmt: skip
"""Files that mean something to live processes only, or are being written."""
Stamp = tuple[int, int, int]


class Changed(Exception):
    """A file was changed in place while it was copied, or the build is over: there is no snapshot this time."""


@dataclass
class Build:
    """One work folder that is being built here.

    Args:
        folder: the work folder.
        tag: of the SNAPSHOT.json that this process wrote last; None: another machine has claimed the build.
        sent: what the last snapshot held of each file.
        over: set when a snapshot under way is not wanted any more.
    """

    folder: Path
    tag: str | None
    sent: dict[str, tuple[Stamp, dict]] = field(default_factory=dict)
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def links(self) -> Path:
        """Where the hard links are: beside the work folder."""
        return self.folder.with_name(f".{self.folder.name}.links")

    @property
    def tag_file(self) -> Path:
        """Which SNAPSHOT.json the work folder is ahead of."""
        return _tag_file(self.folder)


class Snapshots:
    """Snapshots of the builds of one store.

    Args:
        bucket: of the store.
    """

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self._builds: dict[tuple[str, str], Build] = {}
        self._lock = threading.Lock()

    def exists(self, stage: str, key: str) -> bool:
        """Whether there is one that holds anything."""
        found = self.bucket.read(_name(stage, key, SNAPSHOT))
        return found is not None and bool(_files(found[0]))

    def claim(self, stage: str, key: str, folder: Path) -> str | None:
        """Begin to build in `folder`, with the newest state: the folder's own, or that of the snapshot.

        Returns:
            What is wrong with the snapshot, which is then not used; None if nothing is.
        """
        build = Build(folder, None)
        shutil.rmtree(build.links, ignore_errors=True)
        data, tag = self.bucket.read(_name(stage, key, SNAPSHOT)) or (b'{"files": {}}', None)
        own = build.tag_file.read_text() if build.tag_file.exists() else None
        files, problem = _files(data), None
        if files is None:
            files, problem = {}, f"{SNAPSHOT} cannot be read"
        if files and (not any(folder.iterdir()) or own != tag):
            problem = self._restore(stage, key, files, folder)
            files = {} if problem else files
        build.tag = self._write(stage, key, files, tag)
        build.tag_file.write_text(build.tag or "")
        with self._lock:
            self._builds[stage, key] = build
        return problem

    def _restore(self, stage: str, key: str, files: dict[str, dict], folder: Path) -> str | None:
        work = folder.with_name(f".{folder.name}.restoring")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()

        def bring(name: str) -> str | None:
            file, digest = work / name, files[name]["sha256"]
            there = self.bucket.download(_name(stage, key, digest), file)
            if not there:
                return f"{name}: missing"
            return None if sha256_file(file) == digest else f"{name}: SHA-256 differs from the recorded one"

        with ThreadPoolExecutor(PARALLEL_FILES) as pool:
            problems = [text for text in pool.map(bring, files) if text]
        if problems:
            shutil.rmtree(work)
            return "; ".join(problems[:5])
        shutil.rmtree(folder)
        os.replace(work, folder)
        return None

    def let_go(self, stage: str, key: str) -> None:
        """The build is not made here any more; its snapshot stays as it is."""
        if (build := self._builds.get((stage, key))) is not None:
            build.over.set()
        with self._lock:  # once a snapshot under way has stopped
            self._builds.pop((stage, key), None)

    def forget(self, stage: str, key: str, folder: Path) -> None:
        """Remove the snapshot of the build that was made in `folder`: SNAPSHOT.json first."""
        self.let_go(stage, key)
        _tag_file(folder).unlink(missing_ok=True)
        self.bucket.remove([_name(stage, key, SNAPSHOT)])
        self.bucket.remove(self.bucket.names(_name(stage, key, "")))

    def take_all(self) -> list[tuple[str, str, bool]]:
        """A snapshot of every build of this process: stage, key, and whether it still is this process's to write."""
        with self._lock:
            return [(stage, key, self._take(stage, key, one)) for (stage, key), one in self._builds.items() if one.tag]

    def _take(self, stage: str, key: str, build: Build) -> bool:
        shutil.rmtree(build.links, ignore_errors=True)
        try:
            links = dict(_freeze(build.folder, build.links))
            if not build.folder.is_dir():  # renamed meanwhile: what was found is not all that there was
                raise Changed(build.folder.name)
            todo = {name: stamp for name, stamp in links.items() if build.sent.get(name, (None,))[0] != stamp}
            with ThreadPoolExecutor(PARALLEL_FILES) as pool:
                sent = list(pool.map(lambda one: self._send(stage, key, build, *one), todo.items()))
            gone = build.sent.keys() - links.keys()
            build.sent = {name: known for name, known in build.sent.items() if name not in gone}
            build.sent |= {name: (todo[name], entry) for name, entry in zip(todo, sent)}
        except (Changed, FileNotFoundError):  # the work folder was finished or is changed in place: the next time, then
            return True
        finally:
            shutil.rmtree(build.links, ignore_errors=True)
        if not todo and not gone:
            return True
        files = {name: entry for name, (_, entry) in build.sent.items()}
        build.tag = self._write(stage, key, files, build.tag)
        if build.tag is None:
            return False
        build.tag_file.write_text(build.tag)
        named = {_name(stage, key, entry["sha256"]) for entry in files.values()} | {_name(stage, key, SNAPSHOT)}
        self.bucket.remove([name for name in self.bucket.names(_name(stage, key, "")) if name not in named])
        return True

    def _write(self, stage: str, key: str, files: dict[str, dict], tag: str | None) -> str | None:
        data = json.dumps({"writer": secrets.token_hex(8), "files": files}).encode()
        return self.bucket.write(_name(stage, key, SNAPSHOT), data, new=tag is None, replacing=tag)

    def _send(self, stage: str, key: str, build: Build, name: str, stamp: Stamp) -> dict:
        link, size = build.links / name, stamp[1]
        if build.over.is_set():
            raise Changed(name)
        if link.suffix == ".jsonl":  # it may grow meanwhile
            with open(link, "rb") as handle:
                data = handle.read(size)
            link.unlink()
            link.write_bytes(data)
        digest = sha256_file(link)
        self.bucket.upload(link, _name(stage, key, digest))
        if link.suffix != ".jsonl" and _stamp(link.stat()) != stamp:
            raise Changed(name)
        return {"bytes": size, "sha256": digest}


def _freeze(folder: Path, links: Path) -> Iterator[tuple[str, Stamp]]:
    """Hard links of everything that was written before this moment, by the clock of the file system."""
    links.mkdir()
    clock = links / ".clock"
    clock.touch()
    now = clock.stat().st_mtime_ns
    clock.unlink()
    for root, _, names in os.walk(folder):
        for name in names:
            file = Path(root) / name
            inner = file.relative_to(folder).as_posix()
            if any(fnmatch(inner, pattern) for pattern in PASSING):
                continue
            try:
                stamp = _stamp(file.stat())
                if stamp[2] >= now and file.suffix != ".jsonl":
                    continue
                target = links / inner
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(file, target)
            except FileNotFoundError:  # a checkpoint that is not kept any more
                continue
            yield inner, stamp


def _tag_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.tag")


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_ino, found.st_size, found.st_mtime_ns


def _name(stage: str, key: str, name: str) -> str:
    return f"{stage}/{key}.building/{name}"


def _files(data: bytes) -> dict[str, dict] | None:
    """What a SNAPSHOT.json names; None if it cannot be one."""
    try:
        files = json.loads(data)["files"]
        for name, entry in files.items():
            if not is_inside(name) or not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
                return None
        return files
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
