"""Writing small input files, and reading a catalog back as plain lists."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow.parquet as pq

from genrec_dist.catalog.dataset import Catalog


def gzip_lines(path: Path, lines: list[bytes | str | dict]) -> Path:
    """Write a compressed file; dicts become JSON."""
    raw = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    path.write_bytes(gzip.compress(b"".join((r if isinstance(r, bytes) else r.encode()) + b"\n" for r in raw)))
    return path


def ledger_rows(folder: Path) -> list[tuple]:
    """(source, line, reason, action) of each ledger row."""
    rows = pq.read_table(folder / "ledger.parquet").to_pylist()
    return [(row["source"], row["line"], row["reason"], row["action"]) for row in rows]


def sequences_by_id(catalog: Catalog) -> dict[str, list[str]]:
    """Item ids of each user, in the catalog's order."""
    users = pq.read_table(catalog.folder / "sequences.parquet", columns=["user_id"])["user_id"].to_pylist()
    sequences = catalog.sequences
    parts = zip(sequences.indptr[:-1], sequences.indptr[1:])
    return {
        user: [catalog.item_ids[item] for item in sequences.items[start:end]]
        for user, (start, end) in zip(users, parts)
    }
