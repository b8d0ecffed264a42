"""Reading embeddings: any rows, shard-aligned streams, other writers' layouts; a failure never passes for a vector."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec_dist.artifacts.embeddings import (
    ARRAY,
    OVERFLOW,
    EmbeddingWriter,
    choose_rows_per_shard,
    finite_rows,
    from_bfloat16,
    shard_file,
    to_bfloat16,
    write_embeddings,
)
from genrec_dist.artifacts.reader import EmbeddingStore, read_embeddings
from genrec_dist.errors import ArtifactError, DataError

DTYPES = ("float32", "float16", "bfloat16")


def table(rows: int, dim: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """What a stored dtype keeps of float32 values, by torch."""
    return torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy()


def write(folder: Path, values: np.ndarray, rows_per_shard: int, dtype: str, failed: tuple[int, ...] = ()) -> Path:
    writer = EmbeddingWriter(folder, *values.shape, rows_per_shard, dtype)
    for shard in range(writer.num_shards):
        start, end = writer.rows(shard)
        part = values[start:end].copy()
        bad = [row for row in failed if start <= row < end]
        part[[row - start for row in bad]] = np.nan
        writer.write(shard, part, [{"row": row, "reason": "embedding_error", "detail": ""} for row in bad])
    return folder


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
def test_bfloat16_rounds_to_nearest_even(values):
    array = np.array(values, np.float32)
    bits = array.view(np.uint32).astype(np.uint64)
    by_hand = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    assert np.array_equal(to_bfloat16(array), by_hand)
    assert np.array_equal(from_bfloat16(by_hand), rounded(array, "bfloat16"))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=8), st.integers(1, 4))
def test_finite_rows_are_those_without_nan_and_infinity(values, rows):
    table = np.array([values] * rows, np.float32)
    table[-1] = np.finfo(np.float32).max
    assert np.array_equal(finite_rows(table), np.isfinite(table).all(axis=1))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_limits_of_a_dtype_are_exact(tmp_path, dtype):
    limit = np.float32(OVERFLOW[dtype])
    values = np.array([[limit, 1], [np.nextafter(limit, np.float32(0)), 1], [1, -limit], [np.nan, limit]], np.float32)
    assert EmbeddingWriter(tmp_path, 4, 2, 4, dtype).overflows(values).tolist() == [True, False, True, False]
    stored = torch.from_numpy(values[:3]).to(getattr(torch, dtype)).isinf().any(1)
    assert stored.tolist() == [True, False, True]


def test_bfloat16_keeps_nan_whatever_its_bits():
    patterns = np.array([0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0xFF800001], np.uint32).view(np.float32)
    assert np.isnan(from_bfloat16(to_bfloat16(patterns))).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(0, 23), st.sampled_from(DTYPES), st.data())
def test_rows_come_in_the_order_asked_for(tmp_path_factory, rows, rows_per_shard, dtype, data):
    values = table(rows)
    store = EmbeddingStore(write(tmp_path_factory.mktemp("store"), values, rows_per_shard, dtype))
    wanted = data.draw(st.lists(st.integers(0, rows - 1), max_size=40))
    found = store.rows(wanted)
    assert found.dtype == np.float32
    assert np.array_equal(found, rounded(values, dtype)[wanted].reshape(-1, 6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stream_gives_every_vector_once_and_no_failure(tmp_path, dtype):
    values = table(50)
    store = EmbeddingStore(write(tmp_path, values, 8, dtype, failed=(3, 16, 17, 49)))
    for seed in (None, 1):
        blocks = list(store.stream(seed=seed))
        index = np.concatenate([block[0] for block in blocks])
        assert sorted(index.tolist()) == [n for n in range(50) if n not in (3, 16, 17, 49)]
        assert np.array_equal(np.concatenate([block[1] for block in blocks]), rounded(values, dtype)[index])
        assert all(len(set((block[0] // 8).tolist())) == 1 for block in blocks)  # aligned with the shards
    assert (np.diff(np.concatenate([block[0] for block in store.stream()])) > 0).all()
    again = np.concatenate([block[0] for block in store.stream(seed=1)])
    assert np.array_equal(again, index)
    halves = [np.concatenate([i for i, _ in store.stream(range(rank, store.num_shards, 2))]) for rank in (0, 1)]
    assert sorted(np.concatenate(halves).tolist()) == sorted(index.tolist())


def test_an_item_without_an_embedding_is_an_error_or_zero(tmp_path):
    store = EmbeddingStore(write(tmp_path, table(10), 4, "float32", failed=(5,)))
    with pytest.raises(DataError, match="1 of 3, first item 5"):
        store.rows([4, 5, 6])
    assert not store.rows([4, 5], failed="zero")[1].any()
    assert store.failed.tolist() == [5]
    with pytest.raises(DataError, match="no such item"):
        store.rows([10])


def test_a_lost_shard_file_is_noticed_by_every_reader(tmp_path):
    folder = write(tmp_path, table(10), 4, "float32")
    shard_file(folder, 1).unlink()  # Zarr reads such rows back as the fill value
    store = EmbeddingStore(folder)
    assert np.isfinite(store.rows([0, 9])).all()
    with pytest.raises(ArtifactError, match="first 4"):
        store.rows([4])
    with pytest.raises(ArtifactError, match="non-finite"):
        list(store.stream())
    assert any("no failure recorded" in problem for problem in store.verify())


def test_verify_names_wrong_failures(tmp_path):
    folder = write(tmp_path, table(10), 4, "float32", failed=(5,))
    assert EmbeddingStore(folder).verify() == []
    zarr.open_array(store=str(folder / ARRAY), mode="r+")[5] = 1.0
    assert EmbeddingStore(folder).verify() == ["shard 1: 1 rows finite, recorded as failed, first 5"]


@pytest.mark.parametrize("layout", ["compressed", "unsharded", "start"])
def test_arrays_in_another_layout_are_read_through_zarr(tmp_path, layout):
    values = table(20)
    write_embeddings(tmp_path, values, rows_per_shard=8)
    (tmp_path / ARRAY).rename(tmp_path / "old.zarr")
    from zarr.codecs import BytesCodec, ShardingCodec

    options = {
        "compressed": {"chunks": (4, 6), "shards": (8, 6)},
        "unsharded": {"chunks": (8, 6), "compressors": None},
        "start": {
            "chunks": (8, 6),
            "compressors": None,
            "serializer": ShardingCodec(chunk_shape=(4, 6), codecs=[BytesCodec()], index_location="start"),
        },
    }[layout]
    array = zarr.create_array(
        store=str(tmp_path / ARRAY), shape=(20, 6), dtype="float32", fill_value=float("nan"), zarr_format=3, **options
    )
    array[:] = values
    assert np.array_equal(EmbeddingStore(tmp_path).rows([19, 0, 8]), values[[19, 0, 8]])
    assert np.array_equal(read_embeddings(tmp_path), values)


def test_our_own_layout_is_mapped(tmp_path):
    store = EmbeddingStore(write(tmp_path, table(20), 8, "bfloat16"))
    assert isinstance(store._raw(2).base, np.memmap)
    assert store._raw(2).shape == (4, 6)


def test_other_zarr_readers_see_the_same(tmp_path):
    values = table(20)
    write_embeddings(tmp_path, values, rows_per_shard=8)
    assert np.array_equal(zarr.open_array(store=str(tmp_path / ARRAY), mode="r")[:], values)


@pytest.mark.parametrize(
    ("dim", "dtype", "rows"),
    [
        (4096, "bfloat16", 2048),
        (4096, "float32", 1024),
        (384, "float32", 2048),
        (100_000, "float32", 32),
        (10**8, "float32", 1),
    ],
)
def test_a_shard_fits_sixteen_mebibytes(dim, dtype, rows):
    assert choose_rows_per_shard(dim, dtype) == rows
    assert rows == 1 or rows * dim * (2 if dtype == "bfloat16" else 4) <= 16 << 20


def test_values_beyond_float16_are_refused(tmp_path):
    writer = EmbeddingWriter(tmp_path, 2, 2, 2, "float16")
    values = np.array([[1, 2], [1, 70_000]], np.float32)
    assert writer.overflows(values).tolist() == [False, True]
    with pytest.raises(DataError, match="non-finite"):
        writer.write(0, values)
    assert writer.pending() == [0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_array_of_another_dtype_is_not_continued(tmp_path, dtype):
    EmbeddingWriter(tmp_path, 8, 3, 4)
    with pytest.raises(ArtifactError, match="another shape"):
        EmbeddingWriter(tmp_path, 8, 3, 4, dtype)
