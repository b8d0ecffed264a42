"""Embeddings to and from other formats, read back by the formats' own libraries."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from test_reader import rounded, table, write

from genrec_dist.artifacts.exchange import FORMATS, export_embeddings, import_embeddings
from genrec_dist.artifacts.reader import EmbeddingStore
from genrec_dist.errors import ConfigError, DataError

FAILED = (5, 11)


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def store(request, tmp_path) -> EmbeddingStore:
    folder = write(tmp_path / "store", table(20), 8, request.param, FAILED)
    ids = {"item_index": pa.array(range(20), pa.int32()), "item_id": [f"I{n:02d}" for n in range(20)]}
    pq.write_table(pa.table(ids), folder / "ids.parquet")
    return EmbeddingStore(folder)


@pytest.fixture
def expected(store) -> np.ndarray:
    values = rounded(table(20), store.dtype)
    values[list(FAILED)] = np.nan
    return values


def test_npy_is_read_by_numpy(store, expected, tmp_path):
    export_embeddings(store, tmp_path / "e.npy")
    found = np.load(tmp_path / "e.npy", allow_pickle=False)
    assert found.dtype == ("float16" if store.dtype == "float16" else "float32")
    assert np.array_equal(found.astype(np.float32), expected, equal_nan=True)


def test_safetensors_is_read_by_its_library(store, expected, tmp_path):
    export_embeddings(store, tmp_path / "e.safetensors")
    found = safetensors.torch.load_file(tmp_path / "e.safetensors")["embeddings"]
    assert found.dtype == getattr(torch, store.dtype)
    assert np.array_equal(found.float().numpy(), expected, equal_nan=True)


def test_parquet_has_ids_and_null_for_a_failure(store, expected, tmp_path):
    export_embeddings(store, tmp_path / "e.parquet")
    found = pq.read_table(tmp_path / "e.parquet")
    assert found["item_id"].to_pylist() == [f"I{n:02d}" for n in range(20)]
    assert found["item_index"].to_pylist() == list(range(20))
    rows = found["embedding"].to_pylist()
    assert [n for n, row in enumerate(rows) if row is None] == list(FAILED)
    good = [n for n in range(20) if n not in FAILED]
    assert np.array_equal(np.array([rows[n] for n in good], np.float32), expected[good])


@pytest.mark.parametrize("ending", FORMATS)
def test_a_round_trip_keeps_every_bit(store, tmp_path, ending):
    export_embeddings(store, tmp_path / f"e{ending}")
    ledger = import_embeddings(tmp_path / f"e{ending}", tmp_path / "back", dtype=store.dtype)
    back = EmbeddingStore(tmp_path / "back")
    assert (back.dtype, back.failed.tolist(), back.verify()) == (store.dtype, list(FAILED), [])
    assert np.array_equal(back.read("zero"), store.read("zero"))
    assert ledger.summary() == {"no_vector": {"failed": 2}}


def test_rows_of_parquet_are_found_by_id(tmp_path):
    values = table(4)
    ids = ["C", "A", "unknown", "B"]
    pq.write_table(pa.table({"item_id": ids, "embedding": values.tolist()}), tmp_path / "e.parquet", row_group_size=2)
    wanted = pa.chunked_array([["A", "B", "C", "D"]])
    ledger = import_embeddings(tmp_path / "e.parquet", tmp_path / "out", wanted)
    store = EmbeddingStore(tmp_path / "out")
    assert store.failed.tolist() == [3]
    assert np.array_equal(store.rows([0, 1, 2]), values[[1, 3, 0]])
    assert ledger.summary() == {"no_vector": {"failed": 1}, "unknown_item": {"ignored": 1}}
    assert not (tmp_path / "out" / ".import").exists()


def test_imported_rows_can_be_normalised(tmp_path):
    np.save(tmp_path / "e.npy", table(3).astype(np.float64) * 5)
    import_embeddings(tmp_path / "e.npy", tmp_path / "out", normalize=True)
    np.testing.assert_allclose(np.linalg.norm(EmbeddingStore(tmp_path / "out").read(), axis=1), 1, atol=1e-6)


def test_infinite_and_overflowing_rows_are_failures(tmp_path):
    values = table(3)
    values[0, 1], values[2, 0] = np.inf, 1e6
    np.save(tmp_path / "e.npy", values)
    ledger = import_embeddings(tmp_path / "e.npy", tmp_path / "out", dtype="float16")
    assert ledger.summary() == {"non_finite_embedding": {"failed": 1}, "overflows_float16": {"failed": 1}}


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("e.npy", lambda p: p.write_bytes(b"not numpy"), "not a .npy file"),
        ("e.npy", lambda p: np.save(p, np.zeros(3, np.float32)), "not a table of floats"),
        ("e.npy", lambda p: np.save(p, np.zeros((3, 2), np.int64)), "not a table of floats"),
        ("e.npy", lambda p: np.save(p, np.array([[{}]]), allow_pickle=True), "not a .npy file"),
        ("e.safetensors", lambda p: p.write_bytes(b"\xff" * 40), "not a safetensors file"),
        ("e.safetensors", lambda p: safetensors.numpy.save_file({"a": np.zeros(2), "b": np.zeros(2)}, p), "one table"),
        ("e.parquet", lambda p: p.write_bytes(b"not parquet"), "not a Parquet file"),
        ("e.parquet", lambda p: pq.write_table(pa.table({"x": [1]}), p), "column missing"),
        (
            "e.parquet",
            lambda p: pq.write_table(pa.table({"item_id": ["a", "b"], "embedding": [[1.0], [1.0, 2.0]]}), p),
            "rows of different width",
        ),
        ("e.parquet", lambda p: None, "no such embedding file"),
    ],
)
def test_files_that_are_no_tables_are_refused(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(DataError, match=message):
        import_embeddings(tmp_path / name, tmp_path / "out")


def test_an_id_that_stands_twice_is_refused(tmp_path):
    pq.write_table(pa.table({"item_id": ["A", "A"], "embedding": [[1.0], [2.0]]}), tmp_path / "e.parquet")
    with pytest.raises(DataError, match="stands twice"):
        import_embeddings(tmp_path / "e.parquet", tmp_path / "out", pa.chunked_array([["A", "B"]]))


def test_another_number_of_rows_than_items_is_refused(tmp_path):
    np.save(tmp_path / "e.npy", table(3))
    with pytest.raises(DataError, match="another number of rows"):
        import_embeddings(tmp_path / "e.npy", tmp_path / "out", pa.chunked_array([["A", "B"]]))


def test_unknown_endings_are_refused(store, tmp_path):
    with pytest.raises(ConfigError, match="unknown embedding format"):
        export_embeddings(store, tmp_path / "e.csv")


def test_a_failed_export_leaves_the_old_file(store, tmp_path, monkeypatch):
    (tmp_path / "e.npy").write_bytes(b"old")

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("genrec_dist.artifacts.exchange._tables", broken)
    with pytest.raises(Exception, match="disk is full"):
        export_embeddings(store, tmp_path / "e.npy")
    assert (tmp_path / "e.npy").read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.npy", "store"]
