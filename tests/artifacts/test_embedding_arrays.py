"""Embedding arrays: shards, completion records, and that a missing vector never passes for one."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec_dist.artifacts.embeddings import (
    ARRAY,
    EmbeddingWriter,
    failed_items,
    iterate_records,
    pending_shards,
    write_embeddings,
)
from genrec_dist.artifacts.reader import read_embeddings
from genrec_dist.errors import ArtifactError, DataError


def table(rows: int, dim: int = 3) -> np.ndarray:
    return np.arange(rows * dim, dtype=np.float32).reshape(rows, dim)


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 40), rows_per_shard=st.integers(1, 17))
def test_round_trip_for_any_shard_size(tmp_path_factory, rows, rows_per_shard):
    folder = tmp_path_factory.mktemp("array")
    write_embeddings(folder, table(rows), rows_per_shard)
    assert np.array_equal(read_embeddings(folder), table(rows))
    assert len(list(iterate_records(folder))) == -(-rows // rows_per_shard)


def test_shards_written_by_two_writers_in_any_order(tmp_path):
    values = table(10)
    first, second = EmbeddingWriter(tmp_path, 10, 3, 4), EmbeddingWriter(tmp_path, 10, 3, 4)
    second.write(2, values[8:10])
    first.write(0, values[0:4])
    assert pending_shards(tmp_path, 10, 4) == first.pending() == [1]
    with pytest.raises(ArtifactError, match="unfinished"):
        read_embeddings(tmp_path)
    second.write(1, values[4:8], info={"tokens": 5})
    assert np.array_equal(read_embeddings(tmp_path), values)
    assert [record["info"] for record in list(iterate_records(tmp_path))] == [{}, {"tokens": 5}, {}]


def test_failed_rows_are_named_and_never_nan(tmp_path):
    values = table(5)
    values[3] = np.nan
    EmbeddingWriter(tmp_path, 5, 3, 8).write(0, values, failed=[{"row": 3, "reason": "embedding_error"}])
    assert failed_items(tmp_path).tolist() == [3]
    read = read_embeddings(tmp_path)
    assert np.isfinite(read).all()
    assert read[3].tolist() == [0, 0, 0]
    assert np.array_equal(read[4], values[4])


@pytest.mark.parametrize("named", [[], [2], [1, 2]])
def test_writing_refuses_rows_that_differ_from_the_named_failures(tmp_path, named):
    values = table(4)
    values[1, 0] = np.inf
    writer = EmbeddingWriter(tmp_path, 4, 3, 4)
    with pytest.raises(DataError, match="non-finite"):
        writer.write(0, values, failed=[{"row": row, "reason": "x"} for row in named])
    assert writer.pending() == [0]


def test_float16_overflow_is_not_finite(tmp_path):
    with pytest.raises(DataError, match="non-finite"), np.errstate(over="ignore"):
        EmbeddingWriter(tmp_path, 1, 2, 4, dtype="float16").write(0, np.array([[1.0, 1e6]], dtype=np.float32))


def test_wrong_shape_is_refused(tmp_path):
    with pytest.raises(DataError, match="wrong shape"):
        EmbeddingWriter(tmp_path, 6, 3, 4).write(1, table(4))


def test_lost_chunk_files_are_noticed(tmp_path):
    write_embeddings(tmp_path, table(8), rows_per_shard=4)
    shutil.rmtree(tmp_path / ARRAY / "c" / "1")  # Zarr itself reads such rows back as the fill value
    with pytest.raises(ArtifactError, match="non-finite"):
        read_embeddings(tmp_path)


def test_records_of_other_shards_do_not_make_up_for_a_missing_one(tmp_path):
    write_embeddings(tmp_path, table(8), rows_per_shard=4)
    (tmp_path / "shards" / "000001.json").rename(tmp_path / "shards" / "000007.json")
    with pytest.raises(ArtifactError, match="unfinished"):
        read_embeddings(tmp_path)


@pytest.mark.parametrize(("rows", "dim", "per_shard"), [(9, 3, 4), (8, 4, 4), (8, 3, 8)])
def test_an_array_of_another_shape_is_not_continued(tmp_path, rows, dim, per_shard):
    EmbeddingWriter(tmp_path, 8, 3, 4)
    with pytest.raises(ArtifactError, match="another shape"):
        EmbeddingWriter(tmp_path, rows, dim, per_shard)


def test_a_folder_without_array_metadata_is_filled_in(tmp_path):
    (tmp_path / ARRAY).mkdir()  # killed between making the folder and writing zarr.json
    write_embeddings(tmp_path, table(3), rows_per_shard=4)
    assert np.array_equal(read_embeddings(tmp_path), table(3))


def test_a_table_that_an_earlier_training_began_is_written_anew(tmp_path):
    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=(10, 3)).astype(np.float32) for _ in range(2))
    write_embeddings(tmp_path, first, rows_per_shard=4)  # killed before the artifact was finished, and trained again
    write_embeddings(tmp_path, second, rows_per_shard=4)
    assert np.array_equal(read_embeddings(tmp_path), second)
