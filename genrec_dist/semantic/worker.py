"""Embedding one shard of items: the work that local and Ray execution share.

Reads the shard's rows of items.parquet; writes the shard of the Zarr array, then its completion record.
Shards are independent and each is batched on its own, so the vectors do not depend on how many workers
there are, or on which of them takes a shard.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genrec_dist.artifacts.embeddings import EmbeddingWriter, shard_rows
from genrec_dist.config import SemanticConfig
from genrec_dist.errors import DataError, GenrecError
from genrec_dist.semantic.engine import EmbeddingEngine, create_engine
from genrec_dist.semantic.text import FIELDS, UNKNOWN_TEXT, item_text


@dataclass(frozen=True)
class EmbedJob:
    """What a worker must know.

    Args:
        out: work folder of the artifact; on a cluster, on a file system that all workers see.
        items: items.parquet of the catalog.
        num_items: its rows.
        settings: section `semantic` of the configuration.
        device: 'auto', 'cpu' or 'cuda'.
        num_threads: CPU threads of one worker.
        batch_size: texts of a forward pass.
    """

    out: Path
    items: Path
    num_items: int
    settings: SemanticConfig
    device: str
    num_threads: int
    batch_size: int

    @property
    def progress_folder(self) -> Path:
        """Where workers say how many rows of a shard they have embedded."""
        return self.out / "scratch" / "embedded"


class ShardEmbedder:
    """One engine, used for shard after shard; also the actor class of Ray Data.

    Engine and array are opened with the first shard, not in the constructor: what an actor's constructor
    raises reaches the driver as text only, what a call raises keeps its type.

    Args:
        job: what to embed and how.
    """

    def __init__(self, job: EmbedJob) -> None:
        self.job = job

    @cached_property
    def engine(self) -> EmbeddingEngine:
        return create_engine(self.job.settings, self.job.device, self.job.num_threads)

    @cached_property
    def writer(self) -> EmbeddingWriter:
        return EmbeddingWriter(self.job.out, self.job.num_items, self.engine.dim, self.job.settings.rows_per_shard)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        """Embed the shards of a Ray Data batch (column 'shard'); columns as `embed_shard` returns them."""
        done = [self.embed_shard(int(shard)) for shard in batch["shard"]]
        return {name: [row[name] for row in done] for name in done[0]}

    def embed_shard(self, shard: int) -> dict[str, float]:
        """Embed and write one shard.

        Returns:
            Items and tokens read, and when the work began and ended (seconds since the epoch); loading the
            engine is not in it.

        Raises:
            ConfigError: the engine cannot be made.
        """
        writer = self.writer
        started = time.time()
        start, end = shard_rows(shard, self.job.num_items, self.job.settings.rows_per_shard)
        texts = self._texts(start, end)
        empty = [start + row for row, text in enumerate(texts) if not text]
        texts = [text or UNKNOWN_TEXT for text in texts]

        lengths = self.engine.count_tokens(texts)
        order = np.argsort(-np.minimum(lengths, self.engine.max_tokens), kind="stable")
        vectors = np.full((len(texts), self.engine.dim), np.nan, dtype=np.float32)
        tokens = 0
        failed: list[dict] = []
        for first in range(0, len(order), self.job.batch_size):
            rows = order[first : first + self.job.batch_size].tolist()
            tokens += self._embed_rows(rows, texts, vectors, start, failed)
            self._report_progress(shard, first + len(rows))
        failed.sort(key=lambda row: row["row"])
        info = {
            "tokens": tokens,
            "truncated": int((lengths > self.engine.max_tokens).sum()),
            "max_tokens": self.engine.max_tokens,
            "empty": empty,
        }
        writer.write(shard, vectors, failed, info)
        return {"items": len(texts), "tokens": tokens, "started": started, "ended": time.time()}

    def _texts(self, start: int, end: int) -> list[str]:
        table = read_rows(self.job.items, start, end, list(FIELDS))
        columns = [table[name].to_pylist() for name in FIELDS]
        return [item_text(self.job.settings.template, *fields) for fields in zip(*columns)]

    def _embed_rows(
        self, rows: list[int], texts: list[str], vectors: np.ndarray, start: int, failed: list[dict]
    ) -> int:
        """Fill the rows of `vectors`, name those that fail, and return the tokens read.

        When a batch raises, its texts are tried one by one, so that one bad text costs one row.
        """
        try:
            values, tokens = self._embed([texts[row] for row in rows])
        except GenrecError:
            raise
        except Exception as error:  # whatever a library raises on some text
            if len(rows) > 1:
                return sum(self._embed_rows([row], texts, vectors, start, failed) for row in rows)
            detail = f"{type(error).__name__}: {error}"[:200]
            failed.append({"row": start + rows[0], "reason": "embedding_error", "detail": detail})
            return 0
        finite = np.isfinite(values).all(axis=1)
        for row, value, is_finite in zip(rows, values, finite):
            if is_finite:
                vectors[row] = value
            else:
                failed.append({"row": start + row, "reason": "non_finite_embedding", "detail": ""})
        return int(tokens[finite].sum())

    def _embed(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        values, tokens = self.engine.embed(texts)
        if values.shape != (len(texts), self.engine.dim):
            raise DataError(
                "embedding engine returned the wrong shape",
                where=self.job.settings.engine,
                got=values.shape,
                expected=(len(texts), self.engine.dim),
            )
        return values, tokens

    def _report_progress(self, shard: int, rows: int) -> None:
        (self.job.progress_folder / str(shard)).write_text(str(rows), encoding="ascii")


def read_rows(path: Path, start: int, end: int, columns: list[str]) -> pa.Table:
    """Rows start..end of a Parquet file, reading only the row groups that hold them.

    Raises:
        DataError: the file has fewer rows.
    """
    parts = []
    with pq.ParquetFile(path) as file:
        first = 0
        for group in range(file.num_row_groups):
            last = first + file.metadata.row_group(group).num_rows
            if first < end and last > start:
                table = file.read_row_group(group, columns=columns)
                parts.append(table.slice(max(start - first, 0), min(end, last) - max(start, first)))
            first = last
    if first < end:
        raise DataError("file has fewer rows than expected", where=path, got=first, expected=f"at least {end}")
    return pa.concat_tables(parts).select(columns)
