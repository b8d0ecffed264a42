"""Texts that an earlier artifact knows are copied, and only the others are embedded."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_semantic_stage import LOCAL, TITLES, FakeEngine, expected, fake_engine, run_stage, write_items  # noqa: F401

from genrec_dist.artifacts.embeddings import write_embeddings
from genrec_dist.artifacts.files import read_json
from genrec_dist.artifacts.reader import EmbeddingStore, read_embeddings
from genrec_dist.config import build_config
from genrec_dist.semantic import reuse
from genrec_dist.semantic.reuse import KnownTexts, build_index, keys_file, text_keys
from genrec_dist.testing.faults import flip_byte

FIXED = "genrec_dist.semantic.stage.model_fingerprint"


@pytest.fixture
def embed(tmp_path, fake_engine, monkeypatch):  # noqa: F811
    """Embed a list of titles as its own catalog in one store; texts that reached the engine are returned."""
    monkeypatch.setattr(FIXED, lambda settings: "fixed")

    def call(titles, *overrides):
        fake_engine.batches.clear()
        config = build_config(
            {},
            [
                "runtime.backend=local",
                "semantic.template='{title}'",
                "semantic.rows_per_shard=8",
                "semantic.normalize=false",
                *overrides,
            ],
        )
        _, done = run_stage(tmp_path, config, titles)
        return done["semantic"], sorted(text for batch in fake_engine.batches for text in batch)

    return call


def test_adding_items_embeds_only_the_new_ones(embed):
    first, embedded = embed(TITLES)
    assert embedded == sorted(TITLES)
    grown = ["new a", *TITLES[:10], "new b", *TITLES[10:], "new c"]
    second, embedded = embed(grown)
    assert embedded == ["new a", "new b", "new c"]
    assert np.array_equal(read_embeddings(second), expected(grown))
    report = read_json(second / "report.json")
    assert (report["num_copied"], report["copied_from"]) == (23, [first.name])
    third, embedded = embed([*reversed(grown)])
    assert embedded == []
    assert np.array_equal(read_embeddings(third), expected(grown[::-1]))


def test_other_settings_copy_nothing(embed):
    embed(TITLES)
    assert embed(["x", *TITLES], "semantic.max_tokens=64")[1] == sorted(["x", *TITLES])
    assert embed(["y", *TITLES], "runtime.reuse_embeddings=false")[1] == sorted(["y", *TITLES])


def test_failed_items_are_tried_again(embed):
    titles = [*TITLES[:5], "bad", *TITLES[5:]]
    embed(titles, "semantic.max_failed_fraction=0.1")
    assert embed([*titles, "new"], "semantic.max_failed_fraction=0.1")[1] == ["bad", "new"]


def test_a_damaged_artifact_is_not_copied_from(embed):
    first, _ = embed(TITLES)
    flip_byte(first / "embeddings.zarr" / "c" / "1" / "0", 0)
    assert embed([*TITLES, "new"])[1] == sorted([*TITLES, "new"])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 7), st.data())
def test_the_index_finds_what_it_holds(tmp_path_factory, rows, rows_per_shard, bucket_rows, data):
    folder = tmp_path_factory.mktemp("index")
    texts = [f"text {n % 30}" for n in range(rows)]  # some stand twice
    failed = np.array(sorted(data.draw(st.sets(st.integers(0, rows - 1), max_size=3))), np.int64)
    keys_file(folder, 0).parent.mkdir()
    for shard in range(-(-rows // rows_per_shard)):
        np.save(keys_file(folder, shard), text_keys(texts[shard * rows_per_shard : (shard + 1) * rows_per_shard]))
    write_embeddings(folder, np.ones((rows, 2), np.float32), rows_per_shard)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reuse, "BUCKET_ROWS", bucket_rows)
        build_index(folder, folder, rows, rows_per_shard, failed)
    found = KnownTexts(folder).find(text_keys([*texts, "unknown"]))
    assert found[-1] == -1
    known = {text for n, text in enumerate(texts) if n not in failed}
    for text, row in zip(texts, found):
        assert (row == -1) == (text not in known)
        assert row == -1 or (texts[row] == text and row not in failed)


def test_equal_halves_of_a_key_are_told_apart(tmp_path):
    keys = np.array([[5, 1], [5, 2], [5, 3], [6, 2]], np.uint64)
    keys_file(tmp_path, 0).parent.mkdir()
    np.save(keys_file(tmp_path, 0), keys)
    write_embeddings(tmp_path, np.ones((4, 2), np.float32))
    build_index(tmp_path, tmp_path, 4, 8, np.array([1]))
    assert KnownTexts(tmp_path).find(np.array([[6, 2], [5, 3], [5, 2], [5, 9], [7, 7]], np.uint64)).tolist() == [
        3,
        2,
        -1,
        -1,
        -1,
    ]


def test_ids_are_copied_as_they_are(embed):
    folder, _ = embed(TITLES)
    table = pq.read_table(folder / "ids.parquet")
    assert table["item_index"].to_pylist() == list(range(23))
    assert EmbeddingStore(folder).verify() == []
