"""The command line in a process of its own, over the fake stages or the real ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from genrec_dist.artifacts.files import read_jsonl

HERE = Path(__file__).parent
FAKE = [str(HERE / "fake_cli.py")]
REAL = ["-m", "launcher.cli"]


class Cli:
    """The command line in a scratch folder that holds `a.yaml`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "PYTHONPATH": str(HERE.parents[1]),
            "COLUMNS": "120",
            "TERM": "dumb",
            "OMP_NUM_THREADS": "1",
        }
        (folder / "a.yaml").write_text("seed: 1\nruntime: {progress_seconds: 0.2}\n")

    def __call__(self, *arguments: str, script: list[str] = FAKE) -> subprocess.CompletedProcess[str]:
        """Run to the end."""
        return subprocess.run(
            [sys.executable, *script, *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start and return at once."""
        return subprocess.Popen(
            [sys.executable, *FAKE, *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run_folder(self, name: str) -> Path:
        return self.folder / "runs" / name

    def events(self, name: str) -> list[dict]:
        return read_jsonl(self.run_folder(name) / "events.jsonl")

    def log(self, name: str) -> str:
        return (self.run_folder(name) / "logs" / "driver.log").read_text()

    def in_work(self) -> bool:
        """True once the fake model stage has reported progress."""
        return bool(list(self.folder.glob("store/model/*.building/scratch/progress.json")))
