"""Mapped sequences: equal to those read into memory, made once, made anew when the artifact changes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest

from genrec_dist.catalog import dataset, mapped
from genrec_dist.catalog.dataset import Catalog
from genrec_dist.testing.tiny import tiny_sequences, write_tiny_catalog

SEQUENCES = tiny_sequences(50, 30, shortest=0)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "FROM_INTERACTIONS", 1)
    folder = write_tiny_catalog(tmp_path / "key", SEQUENCES)
    table = pq.read_table(folder / "sequences.parquet")
    pq.write_table(table, folder / "sequences.parquet", row_group_size=7)
    return folder


def same(one, other) -> None:
    for name in ("indptr", "items", "timestamps"):
        left, right = getattr(one, name), getattr(other, name)
        assert left.dtype == right.dtype
        assert np.array_equal(left, right), name


def is_mapped(array: np.ndarray) -> bool:
    return isinstance(array.base, np.memmap)


@pytest.mark.parametrize("order", ["time", "file"])
def test_a_map_holds_the_sequences(folder, order):
    found = Catalog(folder, order).sequences
    same(found, SEQUENCES if order == "time" else SEQUENCES.by_item())
    assert is_mapped(found.items)
    assert not found.items.flags.writeable
    assert found.num_items == SEQUENCES.num_items
    same(found, Catalog(folder, order).sequences)


def test_the_artifact_is_left_alone(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    _ = Catalog(folder).sequences
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert {p.name for p in folder.parent.iterdir()} == {"key", ".key.mapped-time", ".key.mapped-time.lock"}


def test_a_map_is_made_once_and_anew_for_another_artifact(folder, monkeypatch):
    writes = []
    write = mapped._write
    monkeypatch.setattr(mapped, "_write", lambda *args: writes.append(1) or write(*args))
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: Catalog(folder).sequences, range(4)):
            same(found, SEQUENCES)
    assert len(writes) == 1
    other = tiny_sequences(40, 30, seed=5)
    write_tiny_catalog(folder, other)
    os.utime(folder / "sequences.parquet", ns=(1, 1))
    same(Catalog(folder).sequences, other)
    assert len(writes) == 2


def test_a_killed_writer_leaves_nothing_that_is_read(folder, monkeypatch):
    def killed(*args, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(mapped, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        _ = Catalog(folder).sequences
    monkeypatch.undo()
    monkeypatch.setattr(dataset, "FROM_INTERACTIONS", 1)
    same(Catalog(folder).sequences, SEQUENCES)


def test_where_no_map_can_be_written_the_sequences_are_read(folder, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mapped, "_write", full)
    with pytest.warns(RuntimeWarning, match="not mapped: .*No space left"):
        found = Catalog(folder).sequences
    same(found, SEQUENCES)
    assert not is_mapped(found.items)


def test_small_catalogs_are_read(tmp_path):
    folder = write_tiny_catalog(tmp_path / "key", SEQUENCES)
    found = Catalog(folder).sequences
    same(found, SEQUENCES)
    assert not is_mapped(found.items)
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_catalog_that_is_being_built_leaves_no_map(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "FROM_INTERACTIONS", 1)
    folder = write_tiny_catalog(tmp_path / "key.building", SEQUENCES)
    found = Catalog(folder).read_sequences()
    same(found, SEQUENCES)
    assert not is_mapped(found.items)
    assert [path.name for path in tmp_path.iterdir()] == ["key.building"]
