"""Semantic stage: item text -> embeddings, spread over workers by Ray Data, resumable by shard.

Reads the catalog's items.parquet. Writes embeddings.zarr and shards/ (see artifacts/embeddings.py), ids.parquet
(item_index int32, item_id string), ledger.parquet and ledger.json, report.json. Row = item index.

Only report.json holds timings; everything else is the same for any number of workers.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import zarr

from genrec_dist.artifacts.embeddings import ARRAY, num_shards, pending_shards, read_records, record_path, shard_rows
from genrec_dist.artifacts.files import write_json
from genrec_dist.artifacts.ledger import Ledger
from genrec_dist.cluster import ensure_ray
from genrec_dist.config import Config, RuntimeConfig, SemanticConfig
from genrec_dist.errors import ClusterError, DataError, FailedRowsError, GenrecError
from genrec_dist.pipeline import Stage, StageContext
from genrec_dist.semantic.engine import model_fingerprint
from genrec_dist.semantic.text import UNKNOWN_TEXT, parse_template
from genrec_dist.semantic.worker import EmbedJob, ShardEmbedder


def semantic_stage(config: Config, catalog: Stage) -> Stage:
    """The stage that embeds the items of a catalog.

    Args:
        config: sections `semantic` and `runtime` are used; only the first decides the content.
        catalog: stage whose artifact holds items.parquet.

    Raises:
        ConfigError: bad template, or a local model that is not there.
    """
    settings = config.semantic
    parse_template(settings.template)
    return Stage(
        name="semantic",
        version=1,
        settings=settings.model_dump(mode="json") | {"model_fingerprint": model_fingerprint(settings.model)},
        inputs={"catalog": catalog},
        build=partial(embed_catalog, settings=settings),
    )


def embed_catalog(ctx: StageContext, settings: SemanticConfig) -> None:
    """Embed every shard that has no completion record, then write ids, ledger and report.

    Raises:
        DataError: the catalog has no items.
        FailedRowsError: more failed rows than `semantic.max_failed_fraction`; the same command again tries
            the shards that hold them once more.
        ClusterError: too few GPUs, or Ray does not work.
    """
    items = ctx.inputs["catalog"] / "items.parquet"
    num_items = pq.read_metadata(items).num_rows
    if num_items == 0:
        raise DataError("catalog has no items", where=items, fix="loosen the k-core filter or check the source")
    pending = pending_shards(ctx.out, num_items, settings.rows_per_shard)
    ctx.event("shards", total=num_shards(num_items, settings.rows_per_shard), pending=len(pending))

    runtime = ctx.runtime
    workers = max(1, min(runtime.num_embed_workers, len(pending))) if runtime.backend == "ray" else 1
    job = EmbedJob(
        out=ctx.out,
        items=items,
        num_items=num_items,
        settings=settings,
        device=runtime.device,
        num_threads=runtime.num_threads or _threads_per_worker(runtime, workers),
        batch_size=runtime.embed_batch_size,
    )
    began = time.time()
    done: list[dict] = []
    if pending:
        with _progress(ctx, job, pending):
            done = _embed_with_ray(job, pending, workers, runtime) if runtime.backend == "ray" else _embed(job, pending)
    _finish(ctx, job)
    _write_report(job, workers, done, began)


def _embed(job: EmbedJob, pending: list[int]) -> list[dict]:
    import torch

    threads = torch.get_num_threads()
    try:
        embedder = ShardEmbedder(job)
        return [embedder.embed_shard(shard) for shard in pending]
    finally:
        torch.set_num_threads(threads)  # the stages after this one run in the same process


def _embed_with_ray(job: EmbedJob, pending: list[int], workers: int, runtime: RuntimeConfig) -> list[dict]:
    ensure_ray(runtime)
    import ray
    from ray.data import ActorPoolStrategy, DataContext, from_items

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # else a worker's typed error comes back as text only
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it warns that its progress bars are off
    dataset = from_items([{"shard": shard} for shard in pending], override_num_blocks=len(pending)).map_batches(
        ShardEmbedder,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ActorPoolStrategy(size=workers),
        # The shard numbers are handed over without tasks, so workers may reserve every core. More threads than
        # cores, if the user says so, must not leave a worker waiting for ever.
        num_cpus=min(job.num_threads, _cores_per_worker(ray, workers)),
        num_gpus=_gpus_per_worker(ray, runtime.device, workers),
    )
    try:
        return dataset.take_all()
    except Exception as error:
        raise _cause(error) from error


def _threads_per_worker(runtime: RuntimeConfig, workers: int) -> int:
    here = os.cpu_count() or 1
    if runtime.backend == "local":
        return here
    share = _cores_per_worker(ensure_ray(runtime), workers)
    return min(share, here) if runtime.ray_address is None else share


def _cores_per_worker(ray: Any, workers: int) -> int:
    """Most cores that every worker can reserve at once; no worker spans two nodes."""
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    share = max(nodes)
    while share and sum(cores // share for cores in nodes) < workers:
        share -= 1
    if not share:
        raise ClusterError(
            "more embedding workers than cores in the Ray cluster",
            where="runtime.num_embed_workers",
            got=workers,
            expected=f"at most {sum(nodes)}",
            fix="lower it",
        )
    return share


def _gpus_per_worker(ray: Any, device: str, workers: int) -> float:
    """A GPU for each worker, or an equal part of one where there are fewer."""
    available = int(ray.cluster_resources().get("GPU", 0))
    if device == "cuda" and not available:
        raise ClusterError(
            "no GPU in the Ray cluster",
            where="runtime.device",
            got=device,
            expected="at least one GPU",
            fix="set it to cpu or auto",
        )
    return 0.0 if device == "cpu" or not available else 1 / -(-workers // available)


def _cause(error: BaseException) -> GenrecError:
    """The typed error that a worker raised, or a ClusterError that carries what Ray says."""
    inner = getattr(error, "cause", None)  # of a RayTaskError, which prints the whole remote traceback
    for candidate in (inner, error):
        if isinstance(candidate, GenrecError):
            return candidate
    return ClusterError(
        "embedding workers failed",
        where="semantic",
        got=f"{type(error).__name__}: {str(error)[-500:]}",
        fix="run the same command again to continue; runtime.backend=local shows the error undistributed",
    )


@contextmanager
def _progress(ctx: StageContext, job: EmbedJob, pending: list[int]) -> Iterator[None]:
    """Say every half second how many items are embedded, from the small files the workers write."""
    folder = job.progress_folder
    shutil.rmtree(folder, ignore_errors=True)  # what a killed build said of unfinished shards
    folder.mkdir(parents=True)
    rows = (shard_rows(shard, job.num_items, job.settings.rows_per_shard) for shard in pending)
    before = job.num_items - sum(end - start for start, end in rows)
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            ctx.progress(before + sum(_read_count(file) for file in folder.iterdir()), job.num_items, "items")

    watcher = threading.Thread(target=watch, daemon=True)
    ctx.progress(before, job.num_items, "items")
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
    ctx.progress(job.num_items, job.num_items, "items")


def _read_count(file: Path) -> int:
    text = file.read_text(encoding="ascii")
    return int(text) if text else 0  # empty: being written just now


def _finish(ctx: StageContext, job: EmbedJob) -> None:
    table = pq.read_table(job.items, columns=["item_index", "item_id"])
    pq.write_table(table, job.out / "ids.parquet")
    records = read_records(job.out)
    ledger = Ledger()
    for record in records:
        for row in record["info"]["empty"]:
            ledger.add("items.parquet", row + 1, "empty_text", "kept", f"embedded as {UNKNOWN_TEXT!r}")
        for row in record["failed"]:
            ledger.add("items.parquet", row["row"] + 1, row["reason"], "failed", row["detail"])
    ledger.write(job.out)

    failed = ledger.total("failed")
    allowed = job.settings.max_failed_fraction * job.num_items
    if failed > allowed:
        for record in records:
            if record["failed"]:
                record_path(job.out, record["shard"]).unlink()
        first = next(row for record in records for row in record["failed"])
        raise FailedRowsError(
            "too many items without an embedding",
            where=job.out / "ledger.parquet",
            got=f"{failed} of {job.num_items}; first: row {first['row']}, {first['reason']} {first['detail']}".rstrip(),
            expected=f"at most {int(allowed)} (semantic.max_failed_fraction {job.settings.max_failed_fraction})",
            fix="mend the cause and run again (only the shards concerned are redone), or raise the fraction",
        )
    if failed:
        ctx.event("rows_failed", failed=failed, total=job.num_items)


def _write_report(job: EmbedJob, workers: int, done: list[dict], began: float) -> None:
    records = read_records(job.out)
    first = min((row["started"] for row in done), default=began)
    last = max((row["ended"] for row in done), default=began)
    items, tokens = sum(row["items"] for row in done), sum(row["tokens"] for row in done)
    seconds = last - first
    write_json(
        job.out / "report.json",
        {
            "engine": job.settings.engine,
            "model": job.settings.model,
            "dim": zarr.open_array(store=str(job.out / ARRAY), mode="r").shape[1],
            "max_tokens": records[0]["info"]["max_tokens"],
            "num_items": job.num_items,
            "num_tokens": sum(record["info"]["tokens"] for record in records),
            "num_truncated": sum(record["info"]["truncated"] for record in records),
            "num_empty_text": sum(len(record["info"]["empty"]) for record in records),
            "num_failed": sum(len(record["failed"]) for record in records),
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
