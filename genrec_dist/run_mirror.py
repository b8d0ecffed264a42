"""A run folder's copy in an S3 bucket: pushed while the run goes on, pulled where somebody asks for it.

Every file is one object, put whole, so a reader sees an older or a newer one and never a part. `.pushed`, a word that
is new with every push, comes last. A file of that name in the folder keeps the word up to which all was copied, and
what each file was then: who has the bucket's word is as new, and what was changed here since is known. What a run
leaves is for people and reports; artifacts and unfinished builds have their own rules (artifacts/cached_store.py,
snapshots.py).
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

from genrec_dist.artifacts.bucket import Bucket
from genrec_dist.artifacts.files import read_json, read_jsonl, write_json
from genrec_dist.artifacts.places import is_inside, parse_url
from genrec_dist.artifacts.store import ArtifactStore
from genrec_dist.errors import GenrecError

EVENTS, PUSHED = "events.jsonl", ".pushed"
Stamp = tuple[int, int]
"""Size and time of a file."""


class RunMirror:
    """The copy of one run.

    Args:
        place: s3://BUCKET/PREFIX/NAME.
        folder: the run folder.
    """

    def __init__(self, place: str, folder: Path) -> None:
        self.bucket, self.folder = Bucket(parse_url(place)), folder
        self._sent: dict[str, Stamp] = {}
        self._unannounced = False
        self._lock = threading.Lock()

    def push(self) -> None:
        """Put what changed since the last push, and remove what is gone."""
        with self._lock:
            there = set()
            for file in sorted(self.folder.rglob("*")):
                name = file.relative_to(self.folder).as_posix()
                if file.name.startswith(".") or not file.is_file():
                    continue
                there.add(name)
                stamp = _stamp(file)
                if self._sent.get(name) != stamp:
                    self._unannounced = True
                    self.bucket.write(name, file.read_bytes())
                    self._sent[name] = stamp
            gone = set(self._sent) - there
            if gone:
                self._unannounced = True
                self.bucket.remove(gone)
                for name in gone:
                    del self._sent[name]
            if self._unannounced:
                word = secrets.token_hex(8)
                self.bucket.write(PUSHED, word.encode())
                self._keep(word, self._sent)
                self._unannounced = False

    def pull(self) -> None:
        """Bring the copy here unless the folder is as new, or a process of this machine works in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "a", encoding="ascii") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            self.pull_locked()

    def pull_locked(self) -> None:
        """`pull` for the process that holds the folder."""
        found = self.bucket.read(PUSHED)
        word = found[0].decode() if found is not None else ""  # none: the first push was cut off
        names = [name for name in self.bucket.names() if is_inside(name) and not Path(name).name.startswith(".")]
        if EVENTS not in names:
            return
        known, files = self._known()
        if not word or known != word:
            self._pull_newer(names, word, files)
        self._sent |= {name: self._sent.get(name, (-1, -1)) for name in names}

    def _pull_newer(self, names: list[str], word: str, files: dict[str, Stamp]) -> None:
        """Bring everything, unless more has happened in the folder than in the copy: then that is to be pushed.

        Where as much has happened, what was changed here since the last copy stays.
        """
        incoming, whole = self.folder / f".{EVENTS}.pulled", False
        try:
            self.bucket.download(EVENTS, incoming)
            there, here = _last(incoming), _last(self.folder / EVENTS)
            for name in names if there >= here else ():
                target = self.folder / name
                if there == here and target.exists() and _stamp(target) != files.get(name):
                    continue
                if self._bring(name):
                    files[name] = _stamp(target)
            whole = True
        finally:
            incoming.unlink(missing_ok=True)
            self._keep(word if whole else "", files)

    def _bring(self, name: str) -> bool:
        target = self.folder / name
        part = target.with_name(f".{target.name}.pulled")
        there = self.bucket.download(name, part)
        if there:
            os.replace(part, target)
        return there

    def _known(self) -> tuple[str, dict[str, Stamp]]:
        """The word up to which all was copied, and what each file was then."""
        try:
            record = read_json(self.folder / PUSHED)
            return str(record["word"]), {name: (stamp[0], stamp[1]) for name, stamp in record["files"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return "", {}

    def _keep(self, word: str, files: dict[str, Stamp]) -> None:
        write_json(self.folder / PUSHED, {"word": word, "files": files})


def _stamp(file: Path) -> Stamp:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _last(events: Path) -> float:
    """Time of the last event of a file, 0 if there is none."""
    times = [e["time"] for e in read_jsonl(events) if isinstance(e, dict) and isinstance(e.get("time"), int | float)]
    return max(times, default=0.0)


class Mirroring:
    """Context manager: pushes a run, and takes snapshots of unfinished builds, every so often.

    Args:
        run: copy of the run folder; None if it is kept in a plain folder.
        store: artifacts.
        seconds: between two rounds.
        tell: gets an event when a round fails, the first of a row.
    """

    def __init__(self, run: RunMirror | None, store: ArtifactStore, seconds: float, tell: Callable[..., None]) -> None:
        self.run, self.store, self.seconds, self.tell = run, store, seconds, tell
        self._done = threading.Event()
        self._now = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._active = run is not None or store.remote

    def __enter__(self) -> Mirroring:
        if self._active:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._now.set()
        if self._active:
            self._thread.join()

    def soon(self) -> None:
        """A stage has ended: the next round is due now."""
        self._now.set()

    def push(self) -> None:
        """Push the run now.

        Raises:
            ClusterError: the bucket does not take it.
        """
        if self.run is not None:
            self.run.push()

    def _work(self) -> None:
        while True:
            self._now.wait(self.seconds)
            self._now.clear()
            if self._done.is_set():
                return
            self.store.snapshot()
            try:
                self.push()
                self._failing = False
            except (OSError, GenrecError) as error:
                if not self._failing:
                    self.tell("mirror_failed", detail=str(error))
                self._failing = True
