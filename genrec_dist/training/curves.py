"""curves.jsonl of a training: losses, learning rates, speeds and validation metrics by step."""

from __future__ import annotations

from pathlib import Path

from genrec_dist.artifacts.files import append_jsonl, write_atomic


class Curves:
    """The file, cut back to what a checkpoint knows when a training resumes.

    Args:
        path: curves.jsonl.
        num_lines: lines that are kept.
        write: whether this worker writes; the others count along.
    """

    def __init__(self, path: Path, num_lines: int, write: bool) -> None:
        self.path, self.num_lines, self.active = path, num_lines, write
        if write:
            kept = path.read_bytes().splitlines(keepends=True)[:num_lines] if path.exists() else []
            write_atomic(path, b"".join(kept))

    def add(self, **record: object) -> None:
        """Append one line."""
        self.num_lines += 1
        if self.active:
            append_jsonl(self.path, record)
