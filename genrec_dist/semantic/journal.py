"""Which texts were in the engine when the process died: what tells a text that kills engines from a killed worker.

A file a shard, written before each batch. It is no checkpoint: vectors of an unfinished shard are computed again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

BATCH_DEATHS = 3
"""Deaths of a batch after which its texts are tried one by one. Fewer would let kills from outside change batches,
and with them the last bits of vectors."""
TEXT_DEATHS = 2
"""Deaths of a text by itself after which it is given up."""


class CrashJournal:
    """Deaths of one shard's batches, over all processes that tried.

    Args:
        path: the shard's file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.deaths: dict[str, int] = {}
        try:
            state = json.loads(path.read_text(encoding="ascii"))
            self.deaths = state["deaths"]
            if state["running"] is not None:  # its process did not come back
                self.blame(state["running"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass

    def blame(self, key: str) -> None:
        """Count a death of a batch."""
        self.deaths[key] = self.deaths.get(key, 0) + 1

    def begin(self, rows: Sequence[int]) -> None:
        """Say that these rows go into the engine now."""
        self._write(self.key(rows))

    def end(self) -> None:
        """Say that nothing is in the engine."""
        self._write(None)

    def is_suspect(self, rows: Sequence[int]) -> bool:
        """True when the batch died so often that it must be taken apart, or the single text given up."""
        return self.deaths.get(self.key(rows), 0) >= (TEXT_DEATHS if len(rows) == 1 else BATCH_DEATHS)

    def close(self) -> None:
        """The shard is done."""
        self.path.unlink(missing_ok=True)

    @staticmethod
    def key(rows: Sequence[int]) -> str:
        return str(rows[0]) if len(rows) == 1 else f"{rows[0]}+{len(rows)}"

    def _write(self, running: str | None) -> None:
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"deaths": self.deaths, "running": running}), encoding="ascii")
        os.replace(temporary, self.path)
