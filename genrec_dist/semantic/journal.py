"""Which texts were in the engine when the process died: what tells a text that kills engines from a killed worker.

A file a shard, written before each batch. It is no checkpoint: vectors of an unfinished shard are computed again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

BATCH_DEATHS = 3
"""Deaths of a batch, one after the other, after which its texts are tried one by one. Fewer would let kills from
outside change batches, and with them the last bits of vectors."""
TEXT_DEATHS = 3
"""Deaths of a text by itself, one after the other, after which it is given up."""


class CrashJournal:
    """Deaths of one shard's batches, over all processes that tried. A batch that comes through has none.

    Args:
        path: the shard's file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.deaths: dict[str, int] = {}
        self._running: str | None = None
        try:
            state = json.loads(path.read_text(encoding="ascii"))
            self.deaths = state["deaths"]
            if state["running"] is not None:  # its process did not come back
                self._blame(state["running"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass

    def begin(self, rows: Sequence[int]) -> None:
        """Say that these rows go into the engine now, and that those before came through."""
        self._enter(self.key(rows))

    def end(self) -> None:
        """Say that nothing is in the engine."""
        self._enter(None)

    def died(self) -> None:
        """Say that the engine died with the rows that are in it, and this process did not."""
        assert self._running is not None
        self._blame(self._running)
        self._running = None

    def is_suspect(self, rows: Sequence[int]) -> bool:
        """True when the batch died so often that it must be taken apart, or the single text given up."""
        return self.deaths.get(self.key(rows), 0) >= (TEXT_DEATHS if len(rows) == 1 else BATCH_DEATHS)

    def close(self) -> None:
        """The shard is done."""
        self.path.unlink(missing_ok=True)

    @staticmethod
    def key(rows: Sequence[int]) -> str:
        return str(rows[0]) if len(rows) == 1 else f"{rows[0]}+{len(rows)}"

    def _blame(self, key: str) -> None:
        self.deaths[key] = self.deaths.get(key, 0) + 1

    def _enter(self, running: str | None) -> None:
        if self._running is not None:
            self.deaths.pop(self._running, None)
        self._running = running
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"deaths": self.deaths, "running": running}), encoding="ascii")
        os.replace(temporary, self.path)
