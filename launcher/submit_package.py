"""What a submitted job is made of: one zip of the package sources and the resolved configuration.

Reads the folders of `genrec_dist` and `launcher`, and git's word on them; writes one zip. Equal content gives equal
bytes, so a cluster that has a package already is not sent it again. No data, artifacts, runs, tests or secrets go in.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from genrec_dist.config import Config, dump_config
from genrec_dist.errors import ConfigError
from genrec_dist.runs import GIT_FILE, git_state

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("genrec_dist", "launcher")
CONFIG_FILE = "genrec-config.yaml"
LIMIT_BYTES = 16 << 20
EPOCH = (1980, 1, 1, 0, 0, 0)  # the time of every member: a zip of the same content is the same file


@dataclass(frozen=True)
class Package:
    """A zip that is ready to be sent."""

    path: Path
    num_files: int
    num_bytes: int


def for_cluster(config: Config) -> Config:
    """The configuration as the job has it: the cluster is the one that the job runs in."""
    return config.model_copy(update={"runtime": config.runtime.model_copy(update={"ray_address": "auto"})})


def source_files(root: Path = ROOT) -> Iterator[Path]:
    """Files of the packages, sorted; no caches, hidden files or links."""
    for name in SOURCES:
        for path in sorted((root / name).rglob("*")):
            parts = path.relative_to(root).parts
            if any(part.startswith(".") or part == "__pycache__" for part in parts) or path.suffix == ".pyc":
                continue
            if path.is_file() and not path.is_symlink():
                yield path


def make_package(config: Config, folder: Path, root: Path = ROOT, limit: int = LIMIT_BYTES) -> Package:
    """Write the package of a configuration into `folder`.

    Args:
        config: resolved configuration, see `for_cluster`.
        folder: an existing folder.
        root: where the packages lie.
        limit: most bytes of the zip.

    Raises:
        ConfigError: the zip is larger than the limit; the largest files are named.
    """
    target = folder / "genrec-package.zip"
    files = list(source_files(root))
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            _add(archive, path.relative_to(root).as_posix(), path.read_bytes())
        _add(archive, CONFIG_FILE, dump_config(config).encode())
        _add(archive, GIT_FILE, json.dumps(git_state(root)).encode())
    size = target.stat().st_size
    if size > limit:
        largest = sorted(files, key=lambda path: path.stat().st_size, reverse=True)[:3]
        raise ConfigError(
            "the package is too large to be sent",
            where=", ".join(str(root / name) for name in SOURCES),
            got=f"{size:,} bytes; largest files: "
            + ", ".join(f"{p.relative_to(root)} ({p.stat().st_size:,})" for p in largest),
            expected=f"at most {limit:,} bytes",
            fix="remove what is no source code from these folders",
        )
    return Package(target, len(files) + 2, size)


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    member = zipfile.ZipInfo(name, EPOCH)
    member.external_attr = 0o644 << 16
    archive.writestr(member, data, zipfile.ZIP_DEFLATED)
