"""Embedding shards of items: the work that local and Ray execution share.

Reads the shard's rows of items.parquet; writes the shard of the Zarr array, then its completion record.
Shards are independent and each is batched on its own, so the vectors do not depend on how many workers
there are, or on which of them takes a shard. While a shard is in the engine, the next one is read and tokenised
and the one before is written.
"""

from __future__ import annotations

import io
import logging
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genrec_dist.artifacts.embeddings import EmbeddingWriter, record_path, shard_rows, space_checked
from genrec_dist.artifacts.files import write_atomic
from genrec_dist.config import SemanticConfig, VllmConfig
from genrec_dist.errors import DataError, GenrecError
from genrec_dist.semantic.engine import EmbeddingEngine, batch_limits, create_engine, normalized, plan_batches
from genrec_dist.semantic.journal import CrashJournal
from genrec_dist.semantic.reuse import KnownTexts, keys_file, text_keys
from genrec_dist.semantic.text import FIELDS, item_texts
from genrec_dist.semantic.tokens import TextTokenizer

EXIT_ENGINE_LOST = 70


@dataclass(frozen=True)
class EmbedJob:
    """What a worker must know.

    Args:
        out: work folder of the artifact; on a cluster, on a file system that all workers see.
        items: items.parquet of the catalog.
        num_items: its rows.
        rows_per_shard: rows of a shard, never 0.
        settings: section `semantic` of the configuration.
        device: 'auto', 'cpu' or 'cuda'.
        num_threads: CPU threads of one worker.
        batch_size: most texts of a forward pass, 0 for the engine's choice.
        batch_tokens: most padded tokens of a forward pass, 0 for the engine's choice.
        vllm: section `runtime.vllm`.
        known: folders of finished artifacts whose vectors may be copied.
        expendable: the process may end itself when its engine is lost, because somebody starts another.
    """

    out: Path
    items: Path
    num_items: int
    rows_per_shard: int
    settings: SemanticConfig
    device: str = "auto"
    num_threads: int = 0
    batch_size: int = 0
    batch_tokens: int = 0
    vllm: VllmConfig = field(default_factory=VllmConfig)
    known: tuple[Path, ...] = ()
    expendable: bool = False

    @property
    def scratch(self) -> Path:
        """Kept over a kill, dropped when the artifact is finished."""
        return self.out / "scratch"

    @property
    def progress_folder(self) -> Path:
        """Where workers say how many rows of an unfinished shard they have embedded."""
        return self.scratch / "embedded"

    def make_folders(self) -> None:
        """Make what the workers write into."""
        for folder in (self.progress_folder, self.scratch / "journal", keys_file(self.scratch, 0).parent):
            folder.mkdir(parents=True, exist_ok=True)

    def journal(self, shard: int) -> CrashJournal:
        return CrashJournal(self.scratch / "journal" / f"{shard}.json")


@dataclass
class Prepared:
    """A shard that is read and tokenised.

    Args:
        shard: its number.
        start: item index of its first row.
        vectors: filled in by copying and embedding.
        todo: rows to embed.
        ids: token ids by row.
        failed: `{"row": item index, "reason", "detail"}` of rows that get no vector.
        info: what the shard's record keeps.

    Shapes:
        vectors: (n, dim) float32, NaN where there is none (yet). todo: (m,) int64.
    """

    shard: int
    start: int
    vectors: np.ndarray
    todo: np.ndarray
    ids: dict[int, list[int]]
    failed: list[dict]
    info: dict


class ShardEmbedder:
    """One engine, used for shard after shard; also the actor class of Ray Data.

    Engine and array are opened with the first shard, not in the constructor: what an actor's constructor
    raises reaches the driver as text only, what a call raises keeps its type.

    Args:
        job: what to embed and how.
        engine: one that is there already; by default the job says which to make.
    """

    def __init__(self, job: EmbedJob, engine: EmbeddingEngine | None = None) -> None:
        self.job = job
        self._engine = engine

    @property
    def engine(self) -> EmbeddingEngine:
        if self._engine is None:
            self._engine = create_engine(self.job.settings, self.job.device, self.job.num_threads, self.job.vllm)
        return self._engine

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """Of the first engine; the thread that reads must not make another one when that is lost."""
        return self.engine.tokenizer

    @cached_property
    def writer(self) -> EmbeddingWriter:
        job = self.job
        return EmbeddingWriter(job.out, job.num_items, self.engine.dim, job.rows_per_shard, job.settings.store_dtype)

    @cached_property
    def reader(self) -> RowReader:
        return RowReader(self.job.items, list(FIELDS))

    @cached_property
    def known(self) -> list[KnownTexts]:
        return [KnownTexts(folder) for folder in self.job.known]

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        """Embed the shards of a Ray Data batch (column 'shard'); columns as `embed_shards` returns them."""
        done = self.embed_shards([int(shard) for shard in batch["shard"]])
        return {name: [row[name] for row in done] for name in done[0]}

    def embed_shards(self, shards: list[int]) -> list[dict[str, float]]:
        """Embed and write shards; those that are recorded already are left alone.

        Returns:
            For each shard the items and tokens read, and when the work began and ended (seconds since the epoch,
            0 for a shard left alone); loading the engine is not in it.

        Raises:
            ConfigError: the engine cannot be made.
            ClusterError: the disk is full.
        """
        with space_checked(self.job.out):
            return self._embed_shards(shards)

    def _embed_shards(self, shards: list[int]) -> list[dict[str, float]]:
        left = [shard for shard in shards if not record_path(self.job.out, shard).exists()]
        if left:
            _ = self.writer, self.tokenizer  # loads the engine, before the clock starts and there are threads
        done = {}
        writing: Future | None = None
        with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
            ahead = reader.submit(self.prepare, left[0]) if left else None
            for place, shard in enumerate(left):
                assert ahead is not None
                started = time.time()
                prepared = ahead.result()
                if place + 1 < len(left):
                    ahead = reader.submit(self.prepare, left[place + 1])
                self._embed(prepared)
                if writing is not None:
                    writing.result()
                writing = writer.submit(self.write, prepared)
                done[shard] = {
                    "items": len(prepared.vectors),
                    "tokens": prepared.info["tokens"],
                    "started": started,
                    "ended": time.time(),
                }
            if writing is not None:
                writing.result()
                done[left[-1]]["ended"] = time.time()
        nothing = {"items": 0, "tokens": 0, "started": 0.0, "ended": 0.0}
        return [{"shard": shard, **done.get(shard, nothing)} for shard in shards]

    def prepare(self, shard: int) -> Prepared:
        """Read and tokenise a shard, and copy the vectors that are known."""
        job = self.job
        start, end = shard_rows(shard, job.num_items, job.rows_per_shard)
        texts, notes = item_texts(self.reader.rows(start, end), job.settings.template)
        keys = text_keys(texts)
        _save(keys_file(job.scratch, shard), keys)
        vectors, copied = self._copied(keys)
        todo = np.flatnonzero(~copied)
        ids, cut = self.tokenizer([texts[row] for row in todo])
        tokens = dict(zip(todo.tolist(), ids))
        failed = [
            {"row": start + row, "reason": "no_tokens", "detail": "the tokenizer finds nothing in the text"}
            for row, found in tokens.items()
            if not found
        ]
        info = {
            "tokens": 0,
            "truncated": int(cut.sum()),
            "max_tokens": self.tokenizer.max_tokens,
            "copied": int(copied.sum()),
            "kept": [{"row": start + row, "reason": reason, "detail": detail} for row, reason, detail in notes],
        }
        todo = np.array([row for row in todo if tokens[row]], np.int64)
        return Prepared(shard, start, vectors, todo, tokens, failed, info)

    def _copied(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A table of NaN with the vectors of known texts filled in, and which rows those are."""
        vectors = np.full((len(keys), self.writer.dim), np.nan, np.float32)
        copied = np.zeros(len(keys), bool)
        for source in self.known:
            rows = source.find(keys)
            new = (rows >= 0) & ~copied
            if new.any():
                vectors[new] = source.store.rows(rows[new])
                copied |= new
        return vectors, copied

    def _embed(self, prepared: Prepared) -> None:
        """Fill in the vectors and name the rows that fail."""
        journal = self.job.journal(prepared.shard)
        limits = batch_limits(self.engine, self.job.batch_size, self.job.batch_tokens)
        lengths = np.array([len(prepared.ids[row]) for row in prepared.todo], np.int64)
        finished = len(prepared.vectors) - len(prepared.todo)
        for batch in plan_batches(lengths, *limits):
            rows = prepared.todo[batch].tolist()
            self._embed_rows(rows, prepared, journal)
            finished += len(rows)
            self._report_progress(prepared.shard, finished)
        journal.end()

    def _embed_rows(self, rows: list[int], prepared: Prepared, journal: CrashJournal) -> None:
        """Fill in the vectors of one batch.

        A batch that raises is halved until the bad text is alone: it costs one row, and too large a batch just
        becomes smaller. A batch during which the engine or the process died again and again is tried text by text;
        a text that goes on killing it is given up.
        """
        if journal.is_suspect(rows):
            if len(rows) == 1:
                self.fail(prepared, rows[0], "engine_crash", "the engine died with this text")
            else:
                for row in rows:
                    self._embed_rows([row], prepared, journal)
            return
        journal.begin(rows)
        try:
            values = self.engine.embed([prepared.ids[row] for row in rows])
        except GenrecError:
            raise
        except Exception as error:  # whatever a library raises on some text
            if not self.engine.survives(error):
                self._lose_engine(error, journal)
                self._embed_rows(rows, prepared, journal)
            elif len(rows) > 1:
                for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
                    self._embed_rows(half, prepared, journal)
            else:
                self.fail(prepared, rows[0], "embedding_error", f"{type(error).__name__}: {error}"[:200])
            return
        if values.shape != (len(rows), self.writer.dim):
            raise DataError(
                "embedding engine returned the wrong shape",
                where=self.job.settings.engine,
                got=values.shape,
                expected=(len(rows), self.writer.dim),
            )
        self.keep(rows, values, prepared)

    def keep(self, rows: list[int], values: np.ndarray, prepared: Prepared) -> None:
        """Take vectors as the engine made them; one that is not finite, or not in the stored form, is a failed row."""
        if self.job.settings.normalize:
            values = normalized(values)
        finite = np.isfinite(values).all(axis=1)
        overflow = self.writer.overflows(values)
        for row, value, is_finite, overflows in zip(rows, values, finite, overflow):
            if overflows:
                self.fail(prepared, row, "overflow", f"beyond {self.job.settings.store_dtype}")
            elif not is_finite:
                self.fail(prepared, row, "non_finite_embedding", "")
            else:
                prepared.vectors[row] = value
                prepared.info["tokens"] += len(prepared.ids[row])

    def fail(self, prepared: Prepared, row: int, reason: str, detail: str) -> None:
        """Name a row that gets no vector."""
        prepared.failed.append({"row": prepared.start + row, "reason": reason, "detail": detail})

    def _lose_engine(self, error: Exception, journal: CrashJournal) -> None:
        """Leave a broken engine: with the process where that is allowed, as only a fresh one is surely sound."""
        logging.getLogger(__name__).error("embedding engine is lost: %s: %s", type(error).__name__, error)
        if self.job.expendable:
            os._exit(EXIT_ENGINE_LOST)  # the journal still says what was in the engine
        journal.died()
        self._engine = None

    def write(self, prepared: Prepared) -> None:
        """Write a shard and its record; what its work left in the scratch folder goes."""
        prepared.failed.sort(key=lambda row: row["row"])
        self.writer.write(prepared.shard, prepared.vectors, prepared.failed, prepared.info)
        self.job.journal(prepared.shard).close()
        (self.job.progress_folder / str(prepared.shard)).unlink(missing_ok=True)

    def _report_progress(self, shard: int, rows: int) -> None:
        (self.job.progress_folder / str(shard)).write_text(str(rows), encoding="ascii")


def _save(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomic(path, buffer.getvalue())


class RowReader:
    """Ranges of rows of a Parquet file. The row group read last is kept, as neighbouring shards lie in it.

    Args:
        path: the file.
        columns: what to read.
    """

    def __init__(self, path: Path, columns: list[str]) -> None:
        self.path, self.columns = path, columns
        self._group: tuple[int, pa.Table] | None = None

    def rows(self, start: int, end: int) -> pa.Table:
        """Rows start..end.

        Raises:
            DataError: the file has fewer rows.
        """
        parts, first = [], 0
        with pq.ParquetFile(self.path) as file:
            for group in range(file.num_row_groups):
                last = first + file.metadata.row_group(group).num_rows
                if first < end and last > start:
                    if self._group is None or self._group[0] != group:
                        self._group = group, file.read_row_group(group, columns=self.columns)
                    parts.append(self._group[1].slice(max(start - first, 0), min(end, last) - max(start, first)))
                first = last
        if first < end:
            raise DataError("file has fewer rows than expected", where=self.path, got=first, expected=f"at least {end}")
        return pa.concat_tables(parts)
