"""Codebook quality on a codebook small enough to check by hand, and its properties on random ones."""

from __future__ import annotations

import json

import numpy as np
import pytest

from genrec_dist.errors import DataError
from genrec_dist.identifiers.quality import codebook_quality, neighbour_preservation

# Five items on a line; two clusters {0, 1, 2} and {3, 4}, the first split again.
CODES = np.array([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]], dtype=np.int32)
DEPTH = np.full(5, 2, dtype=np.int32)
POINTS = np.array([[0.0], [1.0], [2.0], [10.0], [12.0]], dtype=np.float32)


def test_by_hand():
    report = codebook_quality(CODES, DEPTH, 4, POINTS)
    assert report["num_items"] == 5
    assert (report["unique_fraction"], report["collisions"]) == (1.0, 0)
    assert (report["max_depth"], report["depth_histogram"]) == (2, {"1": 0, "2": 5})
    first, second = report["levels"]
    assert (first["codes_used"], first["nodes"]) == (2, 2)
    entropy = -(0.6 * np.log2(0.6) + 0.4 * np.log2(0.4))
    assert first["entropy_bits"] == pytest.approx(entropy)
    assert first["normalised_perplexity"] == pytest.approx(2**entropy / 4)
    assert (first["size_min"], first["size_median"], first["size_mean"], first["size_max"]) == (2, 2.5, 2.5, 3)
    assert first["size_histogram"] == {"from": [1, 2], "nodes": [0, 2]}
    # mean 5: total 25 + 16 + 9 + 25 + 49 = 124; within {0, 1, 2}: 2, within {10, 12}: 2
    assert first["variance_explained"] == pytest.approx(1 - 4 / 124)
    assert (second["codes_used"], second["nodes"], second["size_max"]) == (3, 5, 1)
    assert second["variance_explained"] == pytest.approx(1.0)


def test_items_that_end_early():
    codes = np.array([[0, -1], [1, 0], [1, 1]], dtype=np.int32)
    report = codebook_quality(codes, np.array([1, 2, 2], dtype=np.int32), 2, POINTS[:3])
    assert report["depth_histogram"] == {"1": 1, "2": 2}
    assert [level["items"] for level in report["levels"]] == [3, 2]
    assert [level["nodes"] for level in report["levels"]] == [2, 2]
    assert report["levels"][1]["variance_explained"] == pytest.approx(1.0)
    assert report["collisions"] == 0


def test_collisions_are_counted_by_item():
    codes = np.array([[0, 1], [0, 1], [0, 2], [0, 1]], dtype=np.int32)
    report = codebook_quality(codes, np.full(4, 2, dtype=np.int32), 4, POINTS[:4])
    assert report["collisions"] == 3
    assert report["unique_fraction"] == 0.25


def test_properties_of_a_random_codebook():
    generator = np.random.default_rng(0)
    codes = generator.integers(8, size=(3000, 3)).astype(np.int32)
    depth = generator.integers(1, 4, size=3000).astype(np.int32)
    codes[np.arange(3) >= depth[:, None]] = -1
    report = codebook_quality(codes, depth, 8, generator.normal(size=(3000, 6)))
    json.dumps(report, allow_nan=False)
    explained = [level["variance_explained"] for level in report["levels"]]
    assert explained == sorted(explained)
    assert 0 <= explained[0] < explained[-1] <= 1
    for number, level in enumerate(report["levels"], start=1):
        reached = codes[depth >= number, :number]
        assert level["nodes"] == len({tuple(row) for row in reached.tolist()})
        assert level["items"] == len(reached)
        assert sum(level["size_histogram"]["nodes"]) == level["nodes"]
        assert level["entropy_bits"] <= 3.0
    assert report["levels"][0]["normalised_perplexity"] == pytest.approx(1.0, abs=0.01)  # uniform codes


def test_neighbours_against_full_sort():
    generator = np.random.default_rng(1)
    points = generator.normal(size=(700, 5)).astype(np.float32)
    clusters = generator.integers(4, size=700)
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = np.argsort(-similarity, axis=1)[:, :10]
    result = neighbour_preservation(clusters, points)
    assert result["recall"] == pytest.approx((clusters[nearest] == clusters[:, None]).mean())
    assert result["chance"] == pytest.approx(((clusters[:, None] == clusters).sum(1) - 1).mean() / 699)
    assert result["queries"] == 700


def test_neighbours_of_separated_clusters_are_all_kept():
    generator = np.random.default_rng(2)
    clusters = np.repeat(np.arange(4), 600)
    points = 20 * np.eye(4)[clusters] + generator.normal(size=(2400, 4)) * 0.1
    result = neighbour_preservation(clusters, points)
    assert result["recall"] == 1.0
    assert result["queries"] == 2000
    assert result["chance"] == pytest.approx(599 / 2399)


def test_neighbours_without_embeddings():
    assert neighbour_preservation(np.array([0, 1]), np.zeros((2, 3)))["recall"] is None


@pytest.mark.parametrize(
    ("codes", "depth"),
    [
        (np.array([[0, 1], [0, 2]]), np.array([2, 1])),  # goes on past its depth
        (np.array([[0, -1], [0, 2]]), np.array([2, 2])),  # ends before it
        (np.array([[-1, -1], [0, 2]]), np.array([0, 2])),  # no code at all
        (np.array([[0, 1], [0, 2]]), np.array([2, 2, 2])),
    ],
)
def test_codes_that_do_not_fit_are_refused(codes, depth):
    with pytest.raises(DataError):
        codebook_quality(codes, depth, 4, POINTS[:2])
