"""Semantic stage: item text -> embeddings, spread over workers by Ray Data, resumable by shard.

Reads the catalog's items.parquet. Writes embeddings.zarr and shards/ (see artifacts/embeddings.py), ids.parquet
(item_index int32, item_id string), ledger.parquet and ledger.json, text_index.npy (see reuse.py), report.json.
Row = item index. Memory does not grow with the catalog but by what the ledger lists.

Only report.json holds timings; everything else is the same for any number of workers.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from genrec_dist.artifacts.embeddings import (
    choose_rows_per_shard,
    failed_items,
    iterate_records,
    num_shards,
    pending_shards,
    record_path,
)
from genrec_dist.artifacts.exchange import check_format, import_embeddings
from genrec_dist.artifacts.files import write_json
from genrec_dist.artifacts.ledger import Ledger
from genrec_dist.artifacts.reader import EmbeddingStore
from genrec_dist.config import Config, SemanticConfig
from genrec_dist.errors import ConfigError, DataError, FailedRowsError
from genrec_dist.pipeline import Stage, StageContext
from genrec_dist.semantic.encoders import model_fingerprint, model_shape, names_package, resolve_model
from genrec_dist.semantic.reuse import build_index, find_sources
from genrec_dist.semantic.text import parse_template
from genrec_dist.semantic.worker import EmbedJob, ShardEmbedder

VERSION = 2
UNKNOWN_DIM = 1024
"""Width that shards are sized by where the model does not say it before it is loaded."""


def semantic_stage(config: Config, catalog: Stage) -> Stage:
    """The stage that embeds the items of a catalog.

    Args:
        config: sections `semantic` and `runtime` are used; only the first decides the content.
        catalog: stage whose artifact holds items.parquet.

    Raises:
        ConfigError: bad template, a local model that is not there, or an executor that does not fit the engine.
    """
    settings = config.semantic
    parse_template(settings.template)
    if settings.engine == "precomputed":
        check_format(_path(settings))
    if config.runtime.embed_executor == "ray_data_llm" and (settings.engine, config.runtime.backend) != ("vllm", "ray"):
        raise ConfigError(
            "Ray's vLLM processor needs Ray and vLLM",
            where="runtime.embed_executor",
            got=f"ray_data_llm with semantic.engine={settings.engine}, runtime.backend={config.runtime.backend}",
            expected="semantic.engine=vllm and runtime.backend=ray",
            fix="use runtime.embed_executor=actors",
        )
    return Stage(
        name="semantic",
        version=VERSION,
        settings=_stage_settings(settings),
        inputs={"catalog": catalog},
        build=partial(embed_catalog, settings=settings),
    )


def _path(settings: SemanticConfig) -> Path:
    return Path(settings.model).expanduser()


def _stage_settings(settings: SemanticConfig) -> dict:
    """What decides the content: a name is resolved, and a folder's place on the disk does not count."""
    values = settings.model_dump(mode="json") | {"model_fingerprint": model_fingerprint(settings)}
    if settings.engine != "precomputed":
        source = resolve_model(settings)
        values |= {"pooling": source.pooling, "revision": source.revision}
        if names_package(settings):
            values["revision"] = None
        elif source.is_local:
            values["model"] = "local folder"
    return values


def rows_per_shard(settings: SemanticConfig) -> int:
    """Rows of a shard, from the settings alone."""
    if settings.rows_per_shard:
        return settings.rows_per_shard
    shape = model_shape(settings)
    return choose_rows_per_shard(shape.out_dim if shape else UNKNOWN_DIM, settings.store_dtype)


def embed_catalog(ctx: StageContext, settings: SemanticConfig) -> None:
    """Embed every shard that has no completion record, then write ids, ledger, index and report.

    Raises:
        DataError: the catalog has no items.
        FailedRowsError: more failed rows than `semantic.max_failed_fraction`; the same command again tries
            the shards that hold them once more.
        ClusterError: too few cores or GPUs, Ray does not work, or the disk is full.
    """
    items = ctx.inputs["catalog"] / "items.parquet"
    num_items = pq.read_metadata(items).num_rows
    if num_items == 0:
        raise DataError("catalog has no items", where=items, fix="loosen the k-core filter or check the source")
    if settings.engine == "precomputed":
        _import(ctx, settings, num_items)
        return
    rows, runtime = rows_per_shard(settings), ctx.runtime
    pending = pending_shards(ctx.out, num_items, rows)
    known = find_sources(ctx.out, VERSION, _stage_settings(settings)) if runtime.reuse_embeddings and pending else []
    ctx.event("shards", total=num_shards(num_items, rows), pending=len(pending), reusing=[f.name for f in known])
    job = EmbedJob(
        out=ctx.out,
        items=items,
        num_items=num_items,
        rows_per_shard=rows,
        settings=settings,
        device=runtime.device,
        num_threads=runtime.num_threads or os.cpu_count() or 1,
        batch_size=runtime.embed_batch_size,
        batch_tokens=runtime.embed_batch_tokens,
        vllm=runtime.vllm,
        known=tuple(known),
    )
    job.make_folders()
    began = time.time()
    done: list[dict] = []
    workers = 1
    if pending:
        with _progress(ctx, job):
            if runtime.backend == "local":
                done = _embed(job, pending)
            else:
                from genrec_dist.semantic.ray_workers import embed_with_ray

                workers, done = embed_with_ray(ctx, job, pending)
    _finish(ctx, job)
    _write_report(job, workers, done, began)


def _embed(job: EmbedJob, pending: list[int]) -> list[dict]:
    import torch

    threads = torch.get_num_threads()
    try:
        return ShardEmbedder(job).embed_shards(pending)
    finally:
        torch.set_num_threads(threads)  # the stages after this one run in the same process


@contextmanager
def _progress(ctx: StageContext, job: EmbedJob) -> Iterator[None]:
    """Say every second how many items are embedded: recorded shards, and what workers say of the others."""
    for file in job.progress_folder.iterdir():  # what a killed build said of unfinished shards
        file.unlink()
    stop = threading.Event()

    def report() -> None:
        recorded = num_shards(job.num_items, job.rows_per_shard) - len(
            pending_shards(job.out, job.num_items, job.rows_per_shard)
        )
        rows = recorded * job.rows_per_shard + sum(map(_read_count, os.scandir(job.progress_folder)))
        ctx.progress(min(rows, job.num_items), job.num_items, "items")

    def watch() -> None:
        while not stop.wait(1.0):
            report()

    watcher = threading.Thread(target=watch, daemon=True)
    report()
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
    report()


def _read_count(entry: os.DirEntry) -> int:
    try:
        with open(entry.path, encoding="ascii") as file:
            return int(file.read() or 0)  # empty: being written just now
    except FileNotFoundError:  # its shard is done
        return 0


def _finish(ctx: StageContext, job: EmbedJob) -> None:
    _copy_ids(job)
    ledger = Ledger()
    for record in iterate_records(job.out):
        for row in record["info"]["kept"]:
            ledger.add("items.parquet", row["row"] + 1, row["reason"], "kept", row["detail"])
        for row in record["failed"]:
            ledger.add("items.parquet", row["row"] + 1, row["reason"], "failed", row["detail"])
    ledger.write(job.out)
    check_failures(ctx, ledger, job.num_items, job.settings)
    build_index(job.scratch, job.out, job.num_items, job.rows_per_shard, failed_items(job.out))


def _copy_ids(job: EmbedJob) -> None:
    columns = ["item_index", "item_id"]
    with pq.ParquetFile(job.items) as items:
        schema = pa.schema([items.schema_arrow.field(name) for name in columns])
        with pq.ParquetWriter(job.out / "ids.parquet", schema) as out:
            for batch in items.iter_batches(columns=columns):
                out.write_batch(batch)


def check_failures(ctx: StageContext, ledger: Ledger, num_items: int, settings: SemanticConfig) -> None:
    """Stop when too many items have no embedding; their shards' records are withdrawn, so that they are tried again.

    Raises:
        FailedRowsError: more than `semantic.max_failed_fraction` allows.
    """
    failed = ledger.total("failed")
    allowed = settings.max_failed_fraction * num_items
    if failed > allowed:
        first = None
        for record in iterate_records(ctx.out):
            if record["failed"]:
                first = first or record["failed"][0]
                record_path(ctx.out, record["shard"]).unlink()
        assert first is not None
        raise FailedRowsError(
            "too many items without an embedding",
            where=ctx.out / "ledger.parquet",
            got=f"{failed} of {num_items}; first: row {first['row']}, {first['reason']} {first['detail']}".rstrip(),
            expected=f"at most {int(allowed)} (semantic.max_failed_fraction {settings.max_failed_fraction})",
            fix="mend the cause and run again (only the shards concerned are redone), or raise the fraction",
        )
    if failed:
        ctx.event("rows_failed", failed=failed, total=num_items)


def _import(ctx: StageContext, settings: SemanticConfig, num_items: int) -> None:
    ids = pq.read_table(ctx.inputs["catalog"] / "items.parquet", columns=["item_id"])["item_id"]
    ledger = import_embeddings(
        _path(settings),
        ctx.out,
        ids,
        dtype=settings.store_dtype,
        rows_per_shard=settings.rows_per_shard,
        normalize=settings.normalize,
    )
    check_failures(ctx, ledger, num_items, settings)
    write_json(
        ctx.out / "report.json",
        {
            "engine": "precomputed",
            "model": _path(settings).name,
            "dim": EmbeddingStore(ctx.out).dim,
            "num_items": num_items,
            "num_failed": ledger.total("failed"),
            "num_unknown_items": ledger.total("ignored"),
        },
    )


def _write_report(job: EmbedJob, workers: int, done: list[dict], began: float) -> None:
    totals = {"tokens": 0, "truncated": 0, "copied": 0}
    num_failed = num_mended = max_tokens = 0
    for record in iterate_records(job.out):
        info = record["info"]
        max_tokens = info["max_tokens"]
        num_failed += len(record["failed"])
        num_mended += len(info["kept"])
        for name in totals:
            totals[name] += info[name]
    worked = [row for row in done if row["items"]]
    first = min((row["started"] for row in worked), default=began)
    last = max((row["ended"] for row in worked), default=began)
    items, tokens = sum(row["items"] for row in worked), sum(row["tokens"] for row in worked)
    seconds = last - first
    store = EmbeddingStore(job.out)
    write_json(
        job.out / "report.json",
        {
            "engine": job.settings.engine,
            "model": job.settings.model,
            "dim": store.dim,
            "store_dtype": store.dtype,
            "rows_per_shard": store.rows_per_shard,
            "max_tokens": max_tokens,
            "num_items": job.num_items,
            "num_tokens": totals["tokens"],
            "num_truncated": totals["truncated"],
            "num_mended": num_mended,
            "num_failed": num_failed,
            "num_copied": totals["copied"],
            "copied_from": [folder.name for folder in job.known],
            # of the command that finished the stage; shards that an earlier, killed one left are not in it
            "timing": {
                "workers": workers,
                "threads_per_worker": job.num_threads,
                "items": items,
                "tokens": tokens,
                "startup_seconds": round(first - began, 3),
                "seconds": round(seconds, 3),
                "items_per_second": round(items / seconds, 2) if seconds else None,
                "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
            },
        },
    )
