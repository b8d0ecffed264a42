"""Collisions: counting, and the three ways out."""

import numpy as np
import pytest

from genrec_dist.errors import DataError
from genrec_dist.identifiers.collisions import (
    _nearest_sequences,
    group_ids,
    quantised,
    resolve_collisions,
    uniqueness,
)
from genrec_dist.identifiers.random_codes import random_codes
from genrec_dist.identifiers.trie import build_trie


def crowded(num_items: int = 60, levels: int = 3, clusters: int = 4, seed: int = 0):
    """Items whose nearest codes collide often: 64 sequences for 60 items."""
    rng = np.random.default_rng(seed)
    codebooks = (rng.normal(size=(levels, clusters, 5)) * (0.5 ** np.arange(levels))[:, None, None]).astype(np.float32)
    rows = rng.normal(size=(num_items, 5)).astype(np.float32)
    left, codes = rows.copy(), []
    for table in codebooks:
        codes.append(np.square(left[:, None] - table[None]).sum(2).argmin(1))
        left = left - table[codes[-1]]
    return np.stack(codes, 1).astype(np.int32), codebooks, rows


def test_uniqueness_by_hand() -> None:
    codes = np.array([[0, 1], [0, 1], [1, 0], [0, 1], [2, 2], [2, 2]], np.int32)
    assert uniqueness(codes) == {"unique_codes": 3, "coverage": 0.5, "colliding_items": 5, "largest_group": 3}
    assert group_ids(codes).tolist() == [0, 0, 1, 0, 2, 2]


def test_dedup_code_by_hand() -> None:
    codes = np.array([[0, 1], [1, 0], [0, 1], [0, 1]], np.int32)
    found = resolve_collisions(codes, np.zeros((2, 3, 1), np.float32), lambda items: np.zeros((len(items), 1)), "dedup")
    assert found.codes.tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 1], [0, 1, 2]]
    assert found.report["before"]["coverage"] == 0.5
    assert found.report["after"]["coverage"] == 1.0


def test_no_collision_no_change() -> None:
    codes = np.array([[0, 1], [1, 0]], np.int32)
    for method in ("dedup", "sinkhorn", "nearest_free"):
        found = resolve_collisions(codes, np.zeros((2, 2, 1), np.float32), lambda items: np.zeros((2, 1)), method)
        assert np.array_equal(found.codes, codes)
        assert found.report["moved"] == 0


@pytest.mark.parametrize("method", ["dedup", "sinkhorn", "nearest_free"])
@pytest.mark.parametrize("seed", range(4))
def test_every_item_gets_its_own_code(method: str, seed: int) -> None:
    codes, codebooks, rows = crowded(seed=seed)
    assert uniqueness(codes)["coverage"] < 0.7
    asked: set[int] = set()
    found = resolve_collisions(codes, codebooks, lambda items: asked.update(items.tolist()) or rows[items], method)
    assert uniqueness(found.codes)["coverage"] == 1.0
    build_trie(found.codes, np.full(len(codes), found.codes.shape[1], np.int32))
    alone = np.bincount(group_ids(codes))[group_ids(codes)] == 1
    assert np.array_equal(found.codes[alone, :3], codes[alone])
    assert not asked & set(np.flatnonzero(alone).tolist())
    if method != "dedup":
        assert found.codes.shape == codes.shape
        assert found.codes.max() < codebooks.shape[1]
        assert found.report["moved_squared_error"] >= found.report["moved_squared_error_before"] > 0


def test_sinkhorn_stays_below_the_prefix_while_there_is_room() -> None:
    rng = np.random.default_rng(0)
    codebooks = np.stack([np.eye(8, dtype=np.float32)[:, :4] * 10, rng.normal(size=(8, 4)).astype(np.float32)])
    rows = (codebooks[0][0] + codebooks[1][3] + 0.3 * rng.normal(size=(5, 4))).astype(np.float32)
    codes = np.tile(np.array([[0, 3]], np.int32), (5, 1))
    found = resolve_collisions(codes, codebooks, lambda items: rows[items], "sinkhorn").codes
    assert (found[:, 0] == 0).all()
    assert len(set(found[:, 1].tolist())) == 5


def test_nearest_free_moves_the_farther_item_to_the_nearest_free_sequence() -> None:
    codebooks = np.array([[[0.0], [10.0]], [[0.0], [1.0]]], np.float32)
    rows = np.array([[0.1], [0.4], [1.0]], np.float32)
    codes = np.array([[0, 0], [0, 0], [0, 1]], np.int32)
    found = resolve_collisions(codes, codebooks, lambda items: rows[items], "nearest_free").codes
    assert found.tolist() == [[0, 0], [1, 0], [0, 1]]  # (0, 1) is taken, 10 + 0 is nearer to .4 than 10 + 1


def test_nearest_sequences_with_a_wide_beam_are_all_in_order() -> None:
    _, codebooks, rows = crowded(1)
    found = _nearest_sequences(rows[0], codebooks, 64)
    distances = np.square(quantised(found, codebooks) - rows[0]).sum(1)
    assert len(np.unique(found, axis=0)) == 64
    assert (np.diff(distances) >= -1e-5).all()


@pytest.mark.parametrize("method", ["sinkhorn", "nearest_free"])
def test_more_items_than_sequences(method: str) -> None:
    codes = np.zeros((5, 2), np.int32)
    with pytest.raises(DataError, match="fewer code sequences than items") as caught:
        resolve_collisions(codes, np.zeros((2, 2, 1), np.float32), lambda items: np.zeros((5, 1)), method)
    assert "2 ** 2 = 4 for 5 items" in str(caught.value)


@pytest.mark.parametrize(("items", "clusters", "levels"), [(64, 4, 3), (1000, 256, 4), (50, 512, 8)])
def test_random_codes_are_distinct_and_spread(items: int, clusters: int, levels: int) -> None:
    codes = random_codes(items, clusters, levels, seed=3)
    assert codes.shape == (items, levels)
    assert codes.min() >= 0
    assert codes.max() < clusters
    assert uniqueness(codes)["coverage"] == 1.0
    assert np.array_equal(codes, random_codes(items, clusters, levels, seed=3))
    assert not np.array_equal(codes, random_codes(items, clusters, levels, seed=4))
    assert len(np.unique(codes[:, 0])) > min(items, clusters) / 2


def test_random_codes_need_room() -> None:
    with pytest.raises(DataError, match="fewer code sequences than items"):
        random_codes(65, 4, 3)
