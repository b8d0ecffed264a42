"""An artifact store in an S3 bucket behind a folder of this machine (or of the cluster, if all nodes see it).

Work is done in the folder. A finished artifact is uploaded file by file below a name of that upload alone; its
MANIFEST.json, which says which upload it is, comes last and only if there is none: two writers cannot mix, and a killed
upload leaves nothing that a reader sees. What the folder lacks is fetched and compared with the checksums of the
manifest. A corrupt artifact is named, moved below `quarantine/` in the bucket, and built again.

Objects: `<stage>/<key>/MANIFEST.json`, `<stage>/<key>/<upload>/<file>`; of unfinished builds, see snapshots.py.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from genrec_dist.artifacts.bucket import Bucket
from genrec_dist.artifacts.files import read_json, write_atomic
from genrec_dist.artifacts.places import is_inside, is_url, local_folder, parse_url
from genrec_dist.artifacts.snapshots import Snapshots
from genrec_dist.artifacts.store import MANIFEST, ArtifactStore, problems_of
from genrec_dist.config import check_name
from genrec_dist.errors import ArtifactError, GenrecError

PARALLEL_FILES = 8
SHOWN_PROBLEMS = 5


def open_store(place: str | Path) -> ArtifactStore:
    """The store at a folder or URL.

    Raises:
        ConfigError: the URL is none of a store.
    """
    return CachedStore(str(place)) if is_url(place) else ArtifactStore(place)


class CachedStore(ArtifactStore):
    """Artifacts in a bucket.

    Args:
        place: s3://BUCKET/PREFIX.

    Attributes:
        tell: called with the kind and fields of what a reader of the run should know.
    """

    remote = True

    def __init__(self, place: str) -> None:
        super().__init__(local_folder(place))
        self.place = place.rstrip("/")
        self.bucket = Bucket(parse_url(place))
        self.snapshots = Snapshots(self.bucket)
        self.tell: Callable[..., None] = lambda kind, **fields: None
        self._kept: set[Path] = set()

    # What is there

    def exists(self, stage: str, key: str) -> bool:
        return super().exists(stage, key) or self.bucket.read(_manifest(stage, key)) is not None

    def has_unfinished(self, stage: str, key: str) -> bool:
        return super().has_unfinished(stage, key) or self.snapshots.exists(stage, key)

    def open(self, stage: str, key: str) -> Path:
        """As of the base class; what is missing here, or damaged here only, is fetched."""
        if not super().exists(stage, key):
            self.fetch(stage, key)
            return super().open(stage, key)
        try:
            return super().open(stage, key)
        except ArtifactError as error:
            self.tell("cached_artifact_corrupt", stage=stage, key=key, detail=str(error))
            if not self.fetch(stage, key):
                raise
            return super().open(stage, key)

    def fetch(self, stage: str, key: str, replace: bool = False) -> bool:
        """Bring an artifact into the folder, all of it or nothing; False if the bucket has none.

        Args:
            replace: also where there is one; that goes to the folder's quarantine.

        Raises:
            ArtifactError: the one in the bucket is corrupt; it has been moved to quarantine.
        """
        final = self.path(stage, key)
        final.parent.mkdir(parents=True, exist_ok=True)
        with open(final.with_name(f".{key}.fetch.lock"), "w", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if super().exists(stage, key) and not replace:  # another process was faster
                return True
            found = self.bucket.read(_manifest(stage, key))
            if found is None:
                return False
            if super().exists(stage, key) and _same_files(found[0], final):  # likewise
                return True
            work = final.with_name(f".{key}.fetching")
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            problems = self._download(stage, key, found[0], work)
            if problems:
                shutil.rmtree(work)
                raise self._corrupt(stage, key, found, problems)
            if final.exists():
                super().quarantine(stage, key)
            os.replace(work, final)
            self._verified.add(final)
            self._kept.add(final)
            return True

    def _download(self, stage: str, key: str, manifest: bytes, work: Path) -> list[str]:
        try:
            record = json.loads(manifest)
            upload, names = check_name(record["upload"], MANIFEST), list(record["files"])
        except Exception as error:  # anything may be in there
            return [f"{MANIFEST}: {type(error).__name__}: {error}"]
        bad = [name for name in names if not is_inside(name)]
        if bad:
            return [f"{MANIFEST}: not a name of a file: {bad[0]!r}"]
        with ThreadPoolExecutor(PARALLEL_FILES) as pool:
            list(pool.map(lambda name: self.bucket.download(f"{stage}/{key}/{upload}/{name}", work / name), names))
        write_atomic(work / MANIFEST, manifest)
        return problems_of(work)

    def _corrupt(self, stage: str, key: str, found: tuple[bytes, str], problems: list[str]) -> ArtifactError:
        target = self._quarantine_objects(stage, key, found)
        return ArtifactError(
            "stored artifact is corrupt and was moved to quarantine",
            where=f"{self.place}/{stage}/{key}",
            got="; ".join(problems[:SHOWN_PROBLEMS]),
            expected="the sizes and SHA-256 of its manifest",
            fix=f"run the same command again to rebuild it; the bad copy is {target}",
        )

    def _quarantine_objects(self, stage: str, key: str, found: tuple[bytes, str]) -> str:
        """Copy the objects aside; then the manifest goes first, unless another has taken its place meanwhile."""
        target = f"quarantine/{stage}-{key}-{time.time_ns()}"
        names = [name for name in self.bucket.names(f"{stage}/{key}/") if not name.endswith(f"/{MANIFEST}")]
        for name in names:
            self.bucket.copy(name, f"{target}/{name.removeprefix(f'{stage}/{key}/')}")
        self.bucket.write(f"{target}/{MANIFEST}", found[0])
        now = self.bucket.read(_manifest(stage, key))
        if now is not None and now[1] == found[1]:
            self.bucket.remove([_manifest(stage, key)])
            self.bucket.remove(names)
        return f"{self.place}/{target}"

    # Building

    @contextmanager
    def building(self, stage: str, key: str, waiting: Callable[[str], None] = lambda _: None) -> Iterator[Path]:
        """As of the base class; an unfinished build that another machine left is brought here first.

        Machines that do not share the folder do not wait for each other: both build, and the first to finish counts.
        """
        with super().building(stage, key, waiting) as folder:
            if not super().exists(stage, key) and self.bucket.read(_manifest(stage, key)) is None:
                problem = self.snapshots.claim(stage, key, folder)
                if problem is not None:
                    self.tell("snapshot_corrupt", stage=stage, key=key, detail=problem)
            try:
                yield folder
            except BaseException:
                self.snapshot()  # the last that this machine can say of it
                raise
            finally:
                self.snapshots.let_go(stage, key)

    def snapshot(self) -> None:
        """Copy the builds of this process to the bucket; what goes wrong is told, and does not stop the work."""
        try:
            for stage, key, mine in self.snapshots.take_all():
                if not mine:
                    self.tell("build_claimed_elsewhere", stage=stage, key=key)
        except (OSError, GenrecError) as error:
            self.tell("snapshot_failed", detail=str(error))

    def finish(self, stage: str, key: str, description: dict) -> Path:
        self.snapshots.let_go(stage, key)  # the last one stays until the artifact is in the bucket
        folder = super().finish(stage, key, description)
        self.keep(stage, key)
        return folder

    def keep(self, stage: str, key: str) -> None:
        """Make the bucket's artifact and the one that is finished here the same; then drop the snapshot of its build.

        Uploads it unless the bucket has one; takes the bucket's where that holds other bytes, since artifacts that were
        built from it are there, or will be.
        """
        final = self.path(stage, key)
        if final in self._kept:
            return
        found = self.bucket.read(_manifest(stage, key))
        if found is None:
            self._publish(stage, key, final)
        else:
            self._adopt(stage, key, final, found)
        self.snapshots.forget(stage, key, self.work_folder(stage, key))
        self._kept.add(final)

    def _publish(self, stage: str, key: str, folder: Path) -> None:
        record, upload = read_json(folder / MANIFEST), secrets.token_hex(8)
        names = list(record["files"])
        with ThreadPoolExecutor(PARALLEL_FILES) as pool:
            list(pool.map(lambda name: self.bucket.upload(folder / name, f"{stage}/{key}/{upload}/{name}"), names))
        data = json.dumps({**record, "upload": upload}, indent=2).encode()
        won = self.bucket.write(_manifest(stage, key), data, new=True) is not None
        mine = f"{stage}/{key}/{upload}/"
        others = [n for n in self.bucket.names(f"{stage}/{key}/") if not n.endswith(f"/{MANIFEST}")]
        if won:  # what killed uploads left: only this upload can count now
            self.bucket.remove([name for name in others if not name.startswith(mine)])
            return
        self.bucket.remove([name for name in others if name.startswith(mine)])
        found = self.bucket.read(_manifest(stage, key))
        if found is None:  # and it was corrupt, and is gone
            self._publish(stage, key, folder)
        else:
            self._adopt(stage, key, folder, found)

    def _adopt(self, stage: str, key: str, folder: Path, found: tuple[bytes, str]) -> None:
        """Another machine finished the same artifact first: later stages have to read that one."""
        if _same_files(found[0], folder):
            return
        self.tell("artifact_finished_elsewhere", stage=stage, key=key)
        try:
            if self.fetch(stage, key, replace=True):
                return
        except ArtifactError as error:  # the other's is in quarantine now
            self.tell("stored_artifact_corrupt", stage=stage, key=key, detail=str(error))
        self._publish(stage, key, folder)

    def discard_building(self, stage: str, key: str) -> None:
        super().discard_building(stage, key)
        self.snapshots.forget(stage, key, self.work_folder(stage, key))


def _same_files(manifest: bytes, folder: Path) -> bool:
    """Whether a manifest names the very files of a finished artifact."""
    try:
        return json.loads(manifest)["files"] == read_json(folder / MANIFEST)["files"]
    except (ValueError, KeyError, TypeError):
        return False


def _manifest(stage: str, key: str) -> str:
    return f"{check_name(stage, 'stage')}/{check_name(key, 'key')}/{MANIFEST}"
