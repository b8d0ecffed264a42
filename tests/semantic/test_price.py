"""The price of an embedding job: counted tokens, FLOPs by formula, rows of files that are not read whole."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_semantic_stage import write_items

from genrec_dist.catalog.locate import InputFile
from genrec_dist.config import SemanticConfig, build_config
from genrec_dist.semantic import price as pricing
from genrec_dist.semantic.encoders import ENCODERS
from genrec_dist.semantic.price import Price, price_embedding, probe_speed
from genrec_dist.testing.tiny_encoders import write_tiny_encoder

TITLES = [f"{'word ' * (n % 7)}item{n}" for n in range(50)]


@pytest.fixture
def catalog(tmp_path):
    return write_items(tmp_path / "catalog", TITLES, row_group_size=50).parent


def config(model: str, **semantic):
    values = {"template": "{title}", "engine": "transformers", "model": model, "max_tokens": 20} | semantic
    return build_config({"method": "embed", "semantic": values, "runtime": {"device": "cpu"}})


def test_tokens_are_those_of_the_models_tokenizer(tmp_path, catalog):
    model = write_tiny_encoder(tmp_path / "model", "llama")
    found = price_embedding(config(str(model), store_dtype="float16"), None, catalog, probe=False)
    lengths = np.array([min(1 + len(title), 20) for title in TITLES])  # <s> and a token a byte
    assert sorted(found.lengths) == sorted(lengths)
    assert found.cut_fraction == np.mean([1 + len(title) > 20 for title in TITLES])
    assert found.num_tokens == pytest.approx(lengths.sum())
    assert found.bytes_on_disk == 50 * 64 * 2
    mean = (lengths**2).sum() / lengths.sum()
    assert found.flops == pytest.approx(found.shape.flops(lengths.sum(), mean))
    assert found.tokens_per_second is None
    assert found.hours is None


def test_without_the_tokenizer_characters_are_counted(catalog):
    found = price_embedding(config("llama2-7b", max_tokens=6), 1000, catalog, probe=False)
    assert found.num_items == 1000
    assert any("characters" in note for note in found.notes)
    assert found.lengths.max() == 6
    assert found.cut_fraction > 0.5


def test_a_probe_gives_hours(tmp_path, catalog):
    model = write_tiny_encoder(tmp_path / "model", "bert")
    found = price_embedding(config(str(model)), None, catalog, probe=True)
    assert found.tokens_per_second > 0
    assert found.device.startswith("CPU")
    assert found.hours == pytest.approx(found.num_tokens / found.tokens_per_second / 3600)


def test_a_deeper_model_is_slower():
    from dataclasses import replace

    shape = replace(ENCODERS["minilm"].shape, num_layers=2)
    lengths = np.full(64, 32)
    slow, _ = probe_speed(SemanticConfig(), replace(shape, num_layers=60), lengths, "cpu")
    fast, _ = probe_speed(SemanticConfig(), shape, lengths, "cpu")
    assert slow < fast / 3


def test_hours_by_hand():
    price = Price(10, np.array([4, 6]), 0.0, ENCODERS["bert"].shape, 0, 8, tokens_per_second=100.0)
    assert (price.mean_tokens, price.num_tokens, price.hours) == (5.0, 50.0, 50 / 100 / 3600)


def test_nothing_is_said_of_a_model_that_is_not_known_here(catalog):
    assert price_embedding(config("some-org/some-model"), None, catalog, probe=False) is None


@pytest.mark.parametrize("compressed", [False, True])
def test_rows_of_a_long_file_are_estimated(tmp_path, monkeypatch, compressed):
    monkeypatch.setattr(pricing, "SAMPLE_ITEMS", 100)  # the first 2,000 lines are read
    rng = np.random.default_rng(0)
    lines = [json.dumps({"asin": f"A{n}", "title": rng.bytes(60).hex()}) + "\n" for n in range(20_000)]
    path = tmp_path / ("meta.json.gz" if compressed else "meta.json")
    with gzip.open(path, "wt") if compressed else open(path, "w") as file:
        file.writelines(lines)
    assert pricing._count_rows(InputFile(path, path.name), "amazon2014") == pytest.approx(20_000, rel=0.15)
    with gzip.open(path, "wt") if compressed else open(path, "w") as file:
        file.writelines(lines[:50])
    assert pricing._count_rows(InputFile(path, path.name), "amazon2014") == 50


def test_items_of_input_files_are_sampled_before_there_is_a_catalog(tmp_path, catalog):
    folder = tmp_path / "raw"
    folder.mkdir()
    pq.write_table(pq.read_table(catalog / "items.parquet"), folder / "items.parquet")
    pq.write_table(pq.read_table(catalog / "items.parquet").select(["item_id"]), folder / "interactions.parquet")
    settings = config("minilm").model_copy()
    settings.catalog = settings.catalog.model_copy(update={"source": "parquet", "path": str(folder)})
    found = price_embedding(settings, None, None, probe=False)
    assert found.num_items == 50
    assert any("metadata files" in note for note in found.notes)
