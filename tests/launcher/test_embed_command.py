"""Embeddings from the command line: run, verify, export, import, and a run on imported vectors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from cli_process import REAL, Cli

from genrec_dist.artifacts.reader import EmbeddingStore
from genrec_dist.testing.faults import flip_byte
from genrec_dist.testing.tiny_encoders import write_tiny_encoder

CONFIG = """
name: small
method: embed
catalog: {{source: synthetic, synthetic: {{num_items: 60, num_users: 150}}}}
semantic: {{engine: transformers, model: {model}, max_tokens: 64, rows_per_shard: 16, store_dtype: bfloat16}}
report: {{tsne_items: 0}}
runtime: {{backend: local, device: cpu, num_threads: 1}}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Cli:
    """A finished embedding run."""
    folder = tmp_path_factory.mktemp("embed")
    cli = Cli(folder)
    model = write_tiny_encoder(folder / "model", "bert")
    (folder / "small.yaml").write_text(CONFIG.format(model=model))
    done = cli("run", "small.yaml", script=REAL)
    assert done.returncode == 0, done.stderr
    for text in ("vectors", "tokens", "cut off", "items/s", "embeddings:", "report.html"):
        assert text in done.stdout
    return cli


@pytest.fixture
def copy(built, tmp_path) -> Cli:
    """The same in a folder that a test may damage."""
    for name in ("store", "runs", "small.yaml"):
        source = built.folder / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    return Cli(tmp_path)


def artifact(cli: Cli) -> Path:
    return next((cli.folder / "store" / "semantic").glob("*/MANIFEST.json")).parent


def test_the_report_shows_the_embeddings(built):
    page = (built.run_folder("small") / "report.html").read_text()
    assert "text embeddings" in page
    assert "no model is trained or evaluated" in page
    assert "has no evaluation yet" not in page
    metrics = json.loads((built.run_folder("small") / "metrics.json").read_text())
    assert metrics["embeddings"]["num_failed"] == 0
    status = built("status", "small", script=REAL)
    assert status.returncode == 0, status.stderr
    assert "finished" in status.stdout


def test_the_same_command_reuses(built):
    done = built("run", "small.yaml", script=REAL)
    assert done.returncode == 0, done.stderr
    assert "semantic: reused" in done.stdout


def test_verify_names_what_is_wrong(copy):
    for target in ("small", "store", str(artifact(copy))):
        sound = copy("data", "verify", target, script=REAL)
        assert sound.returncode == 0, sound.stderr
        assert "semantic/" in sound.stdout
        assert ": ok" in sound.stdout
    flip_byte(artifact(copy) / "embeddings.zarr" / "c" / "1" / "0", 5)
    (artifact(copy) / "ledger.json").unlink()
    broken = copy("data", "verify", "small", script=REAL)
    assert broken.returncode == 3
    assert "embeddings.zarr/c/1/0: SHA-256 differs" in broken.stdout
    assert "ledger.json: missing" in broken.stdout
    assert "damaged" in broken.stderr
    nothing = copy("data", "verify", "nowhere", script=REAL)
    assert nothing.returncode == 2


def test_verify_looks_at_the_rows(copy):
    folder = artifact(copy)
    record = folder / "shards" / "000000.json"
    content = json.loads(record.read_text())
    content["failed"] = [{"row": 2, "reason": "embedding_error", "detail": ""}]
    record.write_text(json.dumps(content))
    from genrec_dist.artifacts.store import write_manifest

    write_manifest(folder, {"stage": "semantic", "key": folder.name})
    broken = copy("data", "verify", str(folder), script=REAL)
    assert broken.returncode == 3
    assert "finite, recorded as failed" in broken.stdout
    assert "ledger.json: 0 failed items, the shards' records have 1" in broken.stdout


def test_export_import_and_a_run_on_the_file(copy):
    values = EmbeddingStore(artifact(copy)).read()
    for ending in ("npy", "safetensors", "parquet"):
        done = copy("data", "export", "small", f"v.{ending}", script=REAL)
        assert done.returncode == 0, done.stderr
        done = copy("data", "import", f"v.{ending}", "--out", f"in-{ending}", "--dtype", "bfloat16", script=REAL)
        assert done.returncode == 0, done.stderr
        assert np.array_equal(EmbeddingStore(copy.folder / f"in-{ending}").read(), values)
        assert copy("data", "verify", f"in-{ending}", script=REAL).returncode == 0
    again = copy("data", "import", "v.npy", "--out", "in-npy", script=REAL)
    assert again.returncode == 2
    assert "not an empty folder" in again.stderr

    table = pq.read_table(copy.folder / "v.parquet")
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), copy.folder / "mixed.parquet")
    settings = ["semantic.engine=precomputed", "semantic.model=mixed.parquet", "semantic.normalize=false"]
    overrides = [word for text in settings for word in ("--set", text)]
    done = copy("run", "small.yaml", "--name", "taken", *overrides, script=REAL)
    assert done.returncode == 0, done.stderr
    links = json.loads((copy.run_folder("taken") / "artifacts.json").read_text())
    taken = EmbeddingStore(copy.run_folder("taken") / links["semantic"]["path"])
    assert np.array_equal(taken.read(), values)
    wrong = copy("data", "export", "small", "v.csv", script=REAL)
    assert wrong.returncode == 2
    assert "unknown embedding format" in wrong.stderr


def test_items_that_the_file_lacks_are_too_many_failed_rows(copy):
    copy("data", "export", "small", "v.parquet", script=REAL)
    pq.write_table(pq.read_table(copy.folder / "v.parquet").slice(3), copy.folder / "few.parquet")
    overrides = ["--set", "semantic.engine=precomputed", "--set", "semantic.model=few.parquet"]
    done = copy("run", "small.yaml", "--name", "few", *overrides, script=REAL)
    assert done.returncode == 6
    assert "no_vector" in done.stderr


def test_dry_run_prices_the_job(copy):
    done = copy("run", "small.yaml", "--dry-run", "--set", "semantic.normalize=false", script=REAL)
    assert done.returncode == 0, done.stderr
    for text in ("tokens an item", "FLOP a token", "shards of 16 rows", "probe: ", "tokens/s on this machine"):
        assert text in done.stdout
    plain = copy("run", "small.yaml", "--dry-run", "--no-probe", "--set", "semantic.normalize=false", script=REAL)
    assert "probe" not in plain.stdout
    named = copy("run", "small.yaml", "--dry-run", "--no-probe", "--set", "semantic.model=llama2-7b", script=REAL)
    assert "GPU-hours" in named.stdout
    assert "13" in named.stdout.split("FLOPs: ")[1][:4]
