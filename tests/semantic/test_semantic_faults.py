"""Poison texts, dying engines, killed workers, a full disk: every item ends with its vector or a cause."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_semantic_stage import ITEMS, write_items

from genrec_dist.artifacts.embeddings import pending_shards
from genrec_dist.artifacts.files import read_json
from genrec_dist.artifacts.reader import EmbeddingStore
from genrec_dist.config import RuntimeConfig, SemanticConfig
from genrec_dist.errors import ClusterError
from genrec_dist.pipeline import StageContext
from genrec_dist.semantic.ray_workers import end_actors, pool_actors
from genrec_dist.semantic.stage import embed_catalog
from genrec_dist.testing.tiny_engine import SlowTinyEmbedder, TinyEmbedder, tiny_vector

MEGABYTE = "long " * 200_000
POISON: dict[bytes | None, str | None] = {
    None: "empty_text",
    b"": "empty_text",
    b" \t\n": "empty_text",
    b"\x00\x01\x02": "empty_text",
    b"bell\x07 and nul\x00 inside": None,
    b"caf\xe9 in latin-1": "invalid_utf8",
    b"\xff\xfe": "invalid_utf8",
    MEGABYTE.encode(): None,
    "漢字 and 🦆".encode(): None,
    b"raise-error": "embedding_error",
    b"give-nan": "non_finite_embedding",
    b"lose-engine": "engine_crash",
}


@pytest.fixture
def tiny(monkeypatch):
    """Workers of the stage have tiny engines, in this process and in Ray's."""
    monkeypatch.setattr("genrec_dist.semantic.stage.ShardEmbedder", TinyEmbedder)
    monkeypatch.setattr("genrec_dist.semantic.ray_workers.ShardEmbedder", TinyEmbedder)


def make_context(root: Path, titles: list, runtime: RuntimeConfig) -> StageContext:
    """A catalog whose titles may be any bytes, and an empty work folder."""
    write_items(root / "catalog", [None] * len(titles))
    table = pq.read_table(root / "catalog" / "items.parquet")
    raw = pa.array([title.encode() if isinstance(title, str) else title for title in titles], pa.binary())
    column = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers(), raw.null_count)  # unchecked, as Parquet is
    pq.write_table(
        table.set_column(ITEMS.get_field_index("title"), "title", column), root / "catalog" / "items.parquet"
    )
    (root / "out").mkdir(exist_ok=True)
    return StageContext(
        out=root / "out", inputs={"catalog": root / "catalog"}, runtime=runtime, events_file=root / "events.jsonl"
    )


SETTINGS = SemanticConfig(
    template="{title}", rows_per_shard=8, normalize=False, max_failed_fraction=1.0, max_tokens=64, model="bert"
)
LOCAL = RuntimeConfig(backend="local")
RAY = RuntimeConfig(backend="ray", num_embed_workers=2, num_threads=1, device="cpu")


def check(out: Path, titles: list, causes: dict[int, str]) -> None:
    """Every item has exactly the vector of its text, or stands in the ledger with the expected cause."""
    store = EmbeddingStore(out)
    assert store.num_items == len(titles)
    assert store.failed.tolist() == sorted(causes)
    assert store.verify() == []
    for row in set(range(len(titles))) - set(causes):
        assert np.array_equal(store.rows([row])[0], tiny_vector(titles[row][:64])), row
    ledger = pq.read_table(out / "ledger.parquet").to_pylist()
    assert {row["line"] - 1: row["reason"] for row in ledger if row["action"] == "failed"} == causes
    assert sorted(set(pq.read_table(out / "ids.parquet")["item_id"].to_pylist())) == [
        f"I{n:04d}" for n in range(len(titles))
    ]


@pytest.mark.parametrize("runtime", [LOCAL, RAY], ids=["local", "ray"])
def test_poison_rows(tmp_path, tiny, runtime, request):
    if runtime is RAY:
        request.getfixturevalue("ray_session")
    titles = [f"good item {n}" for n in range(30)]
    for place, text in zip((0, 1, 2, 7, 8, 9, 12, 13, 14, 20, 22, 29), POISON):
        titles[place] = text
    ctx = make_context(tmp_path, titles, runtime)
    embed_catalog(ctx, SETTINGS)
    places = {place: POISON[text] for place, text in enumerate(titles) if text in POISON}
    failed = {
        place: cause
        for place, cause in places.items()
        if cause in ("embedding_error", "non_finite_embedding", "engine_crash")
    }
    assert set(failed.values()) == {"embedding_error", "non_finite_embedding", "engine_crash"}
    meant = dict(enumerate(titles)) | {
        0: "unknown item", 1: "unknown item", 2: "unknown item", 7: "unknown item", 8: "bell and nul inside",
        9: "caf\ufffd in latin-1", 12: "\ufffd\ufffd", 13: MEGABYTE, 14: "漢字 and 🦆",
    }  # fmt: skip
    check(ctx.out, [meant[n] for n in range(30)], failed)
    kept = [row for row in pq.read_table(ctx.out / "ledger.parquet").to_pylist() if row["action"] == "kept"]
    assert [(row["line"] - 1, row["reason"]) for row in kept] == [
        *((place, "empty_text") for place in (0, 1, 2, 7)), (9, "invalid_utf8"), (12, "invalid_utf8"),
    ]  # fmt: skip
    report = read_json(ctx.out / "report.json")
    assert (report["num_truncated"], report["num_failed"], report["num_mended"]) == (1, 3, 6)


def test_a_text_that_kills_its_process_is_given_up_and_the_rest_completes(tmp_path, tiny, ray_session):
    titles = [f"good item {n}" for n in range(40)]
    titles[13] = "kill-process"
    ctx = make_context(tmp_path, titles, RAY)
    embed_catalog(ctx, SETTINGS)
    check(ctx.out, titles, {13: "engine_crash"})


def killer(stop: threading.Event, every: int, records: Path, kills: list[int]) -> None:
    """Kill a random embedding actor each time that so many more shards are done."""
    rng = np.random.default_rng(0)
    while not stop.wait(0.01):
        if len(list(records.glob("*.json"))) < every * (len(kills) + 1):
            continue
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "MapWorker" in " ".join(process.cmdline()):
                    found.append(process.pid)
        if found:
            victim = int(rng.choice(found))
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                kills.append(victim)


def test_killed_workers_cost_no_item_and_no_bit(tmp_path, tiny, ray_session, monkeypatch):
    titles = [f"good item {n}" for n in range(400)]
    plain = make_context(tmp_path / "plain", titles, LOCAL)
    embed_catalog(plain, SETTINGS)
    titles_context = make_context(tmp_path / "chaos", titles, RAY)
    monkeypatch.setattr("genrec_dist.semantic.ray_workers.ShardEmbedder", SlowTinyEmbedder)
    stop, kills = threading.Event(), []
    thread = threading.Thread(target=killer, args=(stop, 8, titles_context.out / "shards", kills), daemon=True)
    thread.start()
    try:
        embed_catalog(titles_context, SETTINGS)
    finally:
        stop.set()
        thread.join()
    assert len(kills) >= 2
    check(titles_context.out, titles, {})
    for shard in sorted((plain.out / "embeddings.zarr" / "c").glob("*/0")):
        same = titles_context.out / shard.relative_to(plain.out)
        assert same.read_bytes() == shard.read_bytes()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 KiB; the size can be raised."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("runtime", [LOCAL, RAY], ids=["local", "ray"])
def test_a_full_disk_loses_nothing(tmp_path, tiny, small_disk, runtime, request):
    if runtime is RAY:
        request.getfixturevalue("ray_session")
    titles = [f"good item {n}" for n in range(1000)]
    ctx = make_context(tmp_path, titles, runtime)
    ctx.out = small_disk / "out"
    ctx.out.mkdir()
    settings = SETTINGS.model_copy(update={"rows_per_shard": 128})
    with pytest.raises(ClusterError, match="disk is full"):
        embed_catalog(ctx, settings)
    left = pending_shards(ctx.out, 1000, 128)
    assert len(left) > 0
    for record in (ctx.out / "shards").glob("*.json"):
        assert read_json(record)["rows"]  # whole, or not there
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    embed_catalog(ctx, settings)
    check(ctx.out, titles, {})


def test_a_failed_run_gives_its_cores_back(ray_session):
    """Even while something still refers to its actors, as a thread of Ray Data may; what was there before stays."""
    from ray.data import ActorPoolStrategy, from_items

    class Failing:
        def __call__(self, batch):
            raise ValueError("cannot embed")

    gc.collect()
    free, before = ray_session.available_resources()["CPU"], set(pool_actors())
    with pytest.raises(Exception, match="cannot embed"):
        from_items([{"shard": 0}]).map_batches(Failing, compute=ActorPoolStrategy(size=1), num_cpus=1).take_all()
    kept = pool_actors()
    assert len(kept) > len(before)
    end_actors(ray_session, kept)
    assert len(pool_actors()) == len(kept)
    end_actors(ray_session, before)
    deadline = time.monotonic() + 30
    while ray_session.available_resources().get("CPU", 0) < free and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray_session.available_resources()["CPU"] == free
