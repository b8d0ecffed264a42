"""Failed-row ledger: every input row that was dropped or changed, with reason and place.

Kept beside the data it speaks of, never inside: `ledger.parquet` with columns source, line, reason, action,
detail, and `ledger.json` with counts. Rows past `max_rows` are counted but not listed.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from genrec_dist.artifacts.files import write_json

SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("line", pa.int64()),
        ("reason", pa.string()),
        ("action", pa.string()),
        ("detail", pa.string()),
    ]
)


class Ledger:
    """Collects rows and counts.

    Args:
        max_rows: rows listed in full; further ones only counted.
    """

    def __init__(self, max_rows: int = 1_000_000) -> None:
        self.max_rows = max_rows
        self.rows: list[dict] = []
        self.counts: Counter[tuple[str, str]] = Counter()

    def add(self, source: str, line: int, reason: str, action: str = "dropped", detail: str = "") -> None:
        """Record one row; `line` counts from 1 (for Parquet: row number), 0 when unknown."""
        self.counts[(reason, action)] += 1
        if len(self.rows) < self.max_rows:
            self.rows.append(
                {"source": source, "line": line, "reason": reason, "action": action, "detail": detail[:200]}
            )

    def extend(self, rows: list[dict]) -> None:
        """Record rows that another process collected."""
        for row in rows:
            self.add(**row)

    def total(self, action: str = "dropped") -> int:
        """Number of rows with this action."""
        return sum(n for (_, act), n in self.counts.items() if act == action)

    def summary(self) -> dict:
        """Counts by reason and action, JSON-ready."""
        out: dict[str, dict[str, int]] = {}
        for (reason, action), n in sorted(self.counts.items()):
            out.setdefault(reason, {})[action] = n
        return out

    def write(self, folder: Path) -> None:
        """Write ledger.parquet and ledger.json into `folder`."""
        rows = sorted(self.rows, key=lambda r: (r["source"], r["line"], r["reason"]))
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / "ledger.parquet")
        write_json(
            folder / "ledger.json",
            {"counts": self.summary(), "listed": len(rows), "total": sum(self.counts.values())},
        )
