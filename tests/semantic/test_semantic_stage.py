"""The stage: rows at their own index, ledger, resuming by shard, failed rows, Ray equal to local."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genrec_dist import cluster
from genrec_dist.artifacts.embeddings import EmbeddingWriter, failed_items, pending_shards
from genrec_dist.artifacts.files import read_json
from genrec_dist.artifacts.reader import read_embeddings
from genrec_dist.artifacts.store import ArtifactStore
from genrec_dist.config import Config, RuntimeConfig, SemanticConfig, build_config
from genrec_dist.errors import ClusterError, ConfigError, DataError, FailedRowsError
from genrec_dist.pipeline import Stage, StageContext, execute
from genrec_dist.runs import RunFolder
from genrec_dist.semantic.encoders import packaged_minilm
from genrec_dist.semantic.ray_workers import cores_per_worker, gpus_of_worker
from genrec_dist.semantic.stage import embed_catalog, semantic_stage
from genrec_dist.semantic.worker import RowReader

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


class FakeTokenizer:
    """One token a word; numbers stand for words, so that the engine can read the text again."""

    max_tokens = 4

    def __init__(self) -> None:
        self.words: list[str] = []

    def __call__(self, texts: list[str]) -> tuple[list[list[int]], np.ndarray]:
        ids = []
        for text in texts:
            known = len(self.words)
            self.words += text.split()
            ids.append(list(range(known, len(self.words))))
        return ids, np.array([len(row) > self.max_tokens for row in ids], bool)

    def text(self, row: list[int]) -> str:
        return " ".join(self.words[n] for n in row)


class FakeEngine:
    """Raises on 'poison', returns NaN on 'bad', remembers its batches."""

    dim = 3
    batch_rows = 4
    batch_tokens = 0

    def __init__(self) -> None:
        self.tokenizer = FakeTokenizer()
        self.batches: list[list[str]] = []
        self.before: Callable[[list[str]], None] = lambda texts: None

    def embed(self, ids: list[list[int]]) -> np.ndarray:
        texts = [self.tokenizer.text(row) for row in ids]
        self.before(texts)
        self.batches.append(texts)
        if any("poison" in text for text in texts):
            raise RuntimeError("cannot read poison")
        vectors = np.array([fake_vector(text) for text in texts], dtype=np.float32)
        vectors[["bad" in text for text in texts]] = np.nan
        return vectors

    def survives(self, error: Exception) -> bool:
        return not isinstance(error, MemoryError)


@pytest.fixture
def fake_engine(monkeypatch) -> FakeEngine:
    """The engine every worker of this process gets."""
    engine = FakeEngine()
    monkeypatch.setattr("genrec_dist.semantic.worker.create_engine", lambda *_: engine)
    return engine


LOCAL = RuntimeConfig(backend="local", embed_batch_size=4)
TITLES = [f"{'w ' * (n % 5)}item{n}" for n in range(23)]


def context(tmp_path, titles, runtime=LOCAL) -> StageContext:
    items = write_items(tmp_path / "catalog", titles)
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    return StageContext(out=out, inputs={"catalog": items.parent}, runtime=runtime)


def settings(**values) -> SemanticConfig:
    return SemanticConfig(**{"template": "{title}", "rows_per_shard": 8, "normalize": False} | values)


def expected(titles) -> np.ndarray:
    return np.array([fake_vector(title) for title in titles], dtype=np.float32)


def test_rows_are_at_their_own_index_though_batches_go_by_length(tmp_path, fake_engine):
    ctx = context(tmp_path, TITLES)
    embed_catalog(ctx, settings())
    assert np.array_equal(read_embeddings(ctx.out), expected(TITLES))
    first_shard = [len(text.split()) for batch in fake_engine.batches[:2] for text in batch]
    assert first_shard == [5, 4, 3, 3, 2, 2, 1, 1]

    ids = pq.read_table(ctx.out / "ids.parquet")
    assert ids.column_names == ["item_index", "item_id"]
    assert ids["item_index"].to_pylist() == list(range(23))
    assert ids["item_id"][22].as_py() == "I0022"
    report = read_json(ctx.out / "report.json")
    assert (report["dim"], report["num_items"], report["num_truncated"]) == (3, 23, 4)  # 5 words for 4 tokens
    assert report["num_tokens"] == sum(len(title.split()) for title in TITLES)
    assert report["timing"]["items"] == 23
    progress = read_json(ctx.scratch / "progress.json")
    assert (progress["done"], progress["total"], progress["unit"]) == (23, 23, "items")


def test_item_without_text_is_kept_and_named(tmp_path, fake_engine):
    ctx = context(tmp_path, ["a", None, "c", " "])
    embed_catalog(ctx, settings())
    assert np.array_equal(read_embeddings(ctx.out), expected(["a", "unknown item", "c", "unknown item"]))
    assert failed_items(ctx.out).tolist() == []
    rows = pq.read_table(ctx.out / "ledger.parquet").to_pylist()
    assert [(row["line"], row["reason"], row["action"]) for row in rows] == [
        (2, "empty_text", "kept"),
        (4, "empty_text", "kept"),
    ]


def test_only_shards_without_a_record_are_built_again(tmp_path, fake_engine):
    ctx = context(tmp_path, TITLES)
    embed_catalog(ctx, settings())
    before = read_json(ctx.out / "report.json")
    EmbeddingWriter(ctx.out, 23, 3, 8).array[8:16] = -1.0
    (ctx.out / "shards" / "000001.json").unlink()
    fake_engine.batches.clear()

    embed_catalog(ctx, settings())
    assert sorted(text for batch in fake_engine.batches for text in batch) == sorted(TITLES[8:16])
    assert np.array_equal(read_embeddings(ctx.out), expected(TITLES))
    after = read_json(ctx.out / "report.json")
    assert after["timing"]["items"] == 8
    assert {k: v for k, v in after.items() if k != "timing"} == {k: v for k, v in before.items() if k != "timing"}

    fake_engine.batches.clear()
    embed_catalog(ctx, settings())
    assert fake_engine.batches == []


def test_interrupted_work_continues_after_the_last_whole_shard(tmp_path, fake_engine):
    ctx = context(tmp_path, TITLES)

    def interrupt(texts):
        if len(fake_engine.batches) == 3:  # in the middle of the second shard
            raise KeyboardInterrupt

    fake_engine.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        embed_catalog(ctx, settings())
    assert pending_shards(ctx.out, 23, 8) == [1, 2]
    fake_engine.before = lambda texts: None
    fake_engine.batches.clear()
    embed_catalog(ctx, settings())
    assert sum(map(len, fake_engine.batches)) == 15
    assert np.array_equal(read_embeddings(ctx.out), expected(TITLES))


def test_one_bad_text_costs_one_row(tmp_path, fake_engine):
    titles = [*TITLES[:10], "poison", "bad", *TITLES[12:]]
    ctx = context(tmp_path, titles)
    embed_catalog(ctx, settings(max_failed_fraction=0.1))
    assert failed_items(ctx.out).tolist() == [10, 11]
    values = read_embeddings(ctx.out)
    others = [n for n in range(23) if n not in (10, 11)]
    assert np.array_equal(values[others], expected(titles)[others])
    assert np.isnan(EmbeddingWriter(ctx.out, 23, 3, 8).array[10:12]).all()
    rows = pq.read_table(ctx.out / "ledger.parquet").to_pylist()
    assert [(row["line"], row["reason"], row["action"], row["detail"]) for row in rows] == [
        (11, "embedding_error", "failed", "RuntimeError: cannot read poison"),
        (12, "non_finite_embedding", "failed", ""),
    ]
    assert read_json(ctx.out / "report.json")["num_failed"] == 2


def test_too_many_failed_rows_stop_and_only_their_shards_are_tried_again(tmp_path, fake_engine):
    titles = [*TITLES[:10], "bad", *TITLES[11:]]
    ctx = context(tmp_path, titles)
    with pytest.raises(FailedRowsError, match=r"1 of 23; first: row 10, non_finite_embedding") as caught:
        embed_catalog(ctx, settings())
    assert caught.value.exit_code == 6
    assert pending_shards(ctx.out, 23, 8) == [1]
    assert pq.read_metadata(ctx.out / "ledger.parquet").num_rows == 1

    fake_engine.batches.clear()
    write_items(tmp_path / "catalog", TITLES)
    embed_catalog(ctx, settings())
    assert sum(map(len, fake_engine.batches)) == 8
    assert np.array_equal(read_embeddings(ctx.out), expected(TITLES))
    assert read_json(ctx.out / "ledger.json")["total"] == 0


def test_our_own_errors_are_not_taken_for_a_bad_text(tmp_path, fake_engine):
    fake_engine.dim = 4
    with pytest.raises(DataError, match="wrong shape"):
        embed_catalog(context(tmp_path, ["a"]), settings(max_failed_fraction=1.0))


def test_an_empty_catalog_is_refused(tmp_path, fake_engine):
    with pytest.raises(DataError, match="no items"):
        embed_catalog(context(tmp_path, []), settings())


@pytest.mark.parametrize(("start", "end"), [(0, 23), (0, 1), (6, 8), (7, 14), (20, 23)])
def test_rows_over_row_groups(tmp_path, start, end):
    reader = RowReader(write_items(tmp_path, TITLES, row_group_size=7), ["title"])
    for _ in range(2):  # the second time from the group that is kept
        assert reader.rows(start, end)["title"].to_pylist() == TITLES[start:end]


def test_rows_past_the_end_are_an_error(tmp_path):
    with pytest.raises(DataError, match="fewer rows"):
        RowReader(write_items(tmp_path, TITLES), ["title"]).rows(20, 24)


def catalog_stage(titles) -> Stage:
    return Stage("catalog", 1, {"titles": titles}, {}, lambda ctx: write_items(ctx.out, titles))


def run_stage(root, config: Config, titles) -> tuple[Stage, dict]:
    stage = semantic_stage(config, catalog_stage(titles))
    run = RunFolder(root / "runs", "test")
    run.create(config, ["test"])
    return stage, execute([stage], ArtifactStore(root / "store"), run, config.runtime)


def test_key_holds_what_decides_the_vectors_and_nothing_else(tmp_path):
    catalog = catalog_stage(TITLES)

    def key(*overrides: str) -> str:
        return semantic_stage(build_config({}, list(overrides)), catalog).key

    assert key() == key("runtime.num_embed_workers=7", "runtime.embed_batch_size=3", "runtime.backend=local", "seed=5")
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_bytes(b"1")
    different = {
        key(),
        key("semantic.template='{title}'"),
        key("semantic.max_tokens=64"),
        key(f"semantic.model={model}"),
    }
    (model / "weights").write_bytes(b"2")
    different.add(key(f"semantic.model={model}"))
    assert len(different) == 5
    with pytest.raises(ConfigError, match="nearest"):
        key("semantic.template='{titel}'")


def test_ray_equals_local_to_the_bit(tmp_path, ray_session):
    overrides = ["semantic.rows_per_shard=8", "runtime.embed_batch_size=4", "runtime.num_threads=1"]
    folders = {}
    for name, extra in {
        "local": ["runtime.backend=local"],
        "one": ["runtime.backend=ray"],
        "two": ["runtime.backend=ray", "runtime.num_embed_workers=2"],
    }.items():
        _, done = run_stage(tmp_path / name, build_config({}, overrides + extra), [*TITLES, None])
        folders[name] = done["semantic"]
    local = read_embeddings(folders["local"])
    assert local.shape == (24, 384)
    np.testing.assert_allclose(np.linalg.norm(local, axis=1), 1.0, atol=1e-5)
    for name in ("one", "two"):
        assert np.array_equal(read_embeddings(folders[name]), local)
        files = {name: file["sha256"] for name, file in read_json(folders[name] / "MANIFEST.json")["files"].items()}
        ours = {name: file["sha256"] for name, file in read_json(folders["local"] / "MANIFEST.json")["files"].items()}
        assert {n for n in files if files[n] != ours.get(n)} <= {"report.json"}  # which holds timings
        assert files.keys() == ours.keys()


class FakeCluster:
    """The two calls of Ray that say what a cluster has."""

    def __init__(self, cores: list[int], gpus: int = 0) -> None:
        self.cores, self.gpus = cores, gpus

    def nodes(self) -> list[dict]:
        return [{"Alive": True, "Resources": {"CPU": float(n)}} for n in self.cores] + [
            {"Alive": False, "Resources": {"CPU": 64.0}}
        ]

    def cluster_resources(self) -> dict:
        return {"GPU": float(self.gpus)} if self.gpus else {}


@pytest.mark.parametrize(
    ("cores", "workers", "share"),
    [([2], 1, 2), ([2], 2, 1), ([16, 16], 2, 16), ([16, 16], 3, 8), ([3, 3], 3, 1), ([4, 1], 2, 2)],
)
def test_every_worker_finds_its_cores(cores, workers, share):
    assert cores_per_worker(FakeCluster(cores), workers) == share


def test_more_workers_than_cores_is_an_error(monkeypatch):
    monkeypatch.setattr(cluster, "NODE_WAIT_SECONDS", 0.1)
    with pytest.raises(ClusterError, match="more embedding workers than cores"):
        cores_per_worker(FakeCluster([2, 1]), 4)


class Returning(FakeCluster):
    """A cluster whose lost node is back after some looks."""

    looks = 3

    def nodes(self) -> list[dict]:
        self.looks -= 1
        return super().nodes() if self.looks > 0 else FakeCluster([*self.cores, 4]).nodes()

    def cluster_resources(self) -> dict:
        return {"GPU": 1.0 if self.looks > 0 else 2.0}


def test_a_stage_that_starts_while_a_node_is_away_waits_for_it(monkeypatch):
    monkeypatch.setattr(cluster, "NODE_POLL_SECONDS", 0.01)
    assert cores_per_worker(Returning([2]), 3) == 2
    assert cluster.gpus_per_worker(RuntimeConfig(num_workers=2), Returning([2])) == 1
    assert cluster.gpus_per_worker(RuntimeConfig(num_workers=2, device="cpu"), Returning([2])) == 0


def test_nobody_waits_for_what_never_was(monkeypatch):
    monkeypatch.setattr(cluster.time, "sleep", lambda seconds: pytest.fail("waited"))
    assert cluster.gpus_per_worker(RuntimeConfig(num_workers=2), FakeCluster([8], 0)) == 0
    assert cores_per_worker(FakeCluster([8]), 8) == 1


@pytest.mark.parametrize(
    ("device", "gpus", "workers", "share"),
    [("auto", 0, 2, 0), ("cpu", 4, 2, 0), ("auto", 4, 2, 1), ("cuda", 2, 3, 0.5), ("auto", 1, 4, 0.25)],
)
def test_gpus_are_shared_so_that_all_workers_fit(device, gpus, workers, share):
    assert gpus_of_worker(FakeCluster([8], gpus), RuntimeConfig(device=device), workers) == share


def test_a_tensor_parallel_group_has_its_gpus():
    runtime = RuntimeConfig(vllm={"tensor_parallel_size": 2})
    assert gpus_of_worker(FakeCluster([8], 4), runtime, 2) == 2
    with pytest.raises(ClusterError, match="tensor-parallel"):
        gpus_of_worker(FakeCluster([8], 4), runtime, 3)


def test_cuda_without_a_gpu_is_an_error():
    with pytest.raises(ClusterError, match="no GPU"):
        gpus_of_worker(FakeCluster([8]), RuntimeConfig(device="cuda"), 1)


def test_error_of_a_ray_worker_keeps_its_type(tmp_path, ray_session):
    model = tmp_path / "model"
    shutil.copytree(packaged_minilm(), model)
    (model / "model.safetensors").write_bytes(b"truncated")
    config = build_config({}, [f"semantic.model={model}", "runtime.num_threads=1"])
    with pytest.raises(ConfigError, match="cannot be loaded") as caught:
        run_stage(tmp_path, config, TITLES)
    assert "Traceback" not in str(caught.value)


def test_packaged_weights_are_found_where_the_package_is_not(monkeypatch) -> None:
    """An artifact made with the package serves a machine without it, as long as nobody names another revision."""
    catalog = Stage("catalog", 1, {}, {}, lambda _: None)
    with_package = semantic_stage(Config(), catalog).key
    other = semantic_stage(Config(semantic={"revision": "0" * 40}), catalog).key
    monkeypatch.setattr("genrec_dist.semantic.encoders.packaged_minilm", lambda: None)
    assert semantic_stage(Config(), catalog).key == with_package != other
