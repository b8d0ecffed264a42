"""Tiny catalogs and a fake engine whose vectors can be computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ITEMS = pa.schema(
    [
        ("item_index", pa.int32()),
        ("item_id", pa.string()),
        ("title", pa.string()),
        ("brand", pa.string()),
        ("description", pa.string()),
        ("categories", pa.list_(pa.string())),
        ("price", pa.float64()),
    ]
)


def write_items(folder: Path, titles: list[str | None], row_group_size: int = 7) -> Path:
    """Write an items.parquet that has titles and nothing else."""
    rows = [
        {"item_index": n, "item_id": f"I{n:04d}", "title": title, "categories": []} for n, title in enumerate(titles)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "items.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=ITEMS), path, row_group_size=row_group_size)
    return path


def fake_vector(text: str) -> list[float]:
    """Number of words, number of characters, sum of code points."""
    return [len(text.split()), len(text), sum(map(ord, text))]


class FakeEngine:
    """Counts words as tokens; raises on 'poison', returns NaN on 'bad', remembers its batches."""

    dim = 3
    max_tokens = 4

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.before: Callable[[list[str]], None] = lambda texts: None

    def count_tokens(self, texts: list[str]) -> np.ndarray:
        return np.array([len(text.split()) for text in texts], dtype=np.int64)

    def embed(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        self.before(texts)
        self.batches.append(list(texts))
        if any("poison" in text for text in texts):
            raise RuntimeError("cannot read poison")
        vectors = np.array([fake_vector(text) for text in texts], dtype=np.float32)
        vectors[["bad" in text for text in texts]] = np.nan
        return vectors, np.minimum(self.count_tokens(texts), self.max_tokens)


@pytest.fixture
def fake_engine(monkeypatch) -> FakeEngine:
    """The engine every worker of this process gets."""
    engine = FakeEngine()
    monkeypatch.setattr("genrec_dist.semantic.worker.create_engine", lambda *_: engine)
    return engine
