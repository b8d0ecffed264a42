"""Codebook quality: by hand, against a plain reference that holds the whole table, and whatever is read at a time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from genrec_dist.errors import DataError
from genrec_dist.identifiers import quality
from genrec_dist.identifiers.quality import codebook_quality, nearest_rows, neighbour_preservation
from genrec_dist.identifiers.rows import ArrayRows, FileRows, Part

# Five items on a line; two clusters {0, 1, 2} and {3, 4}, the first split again.
CODES = np.array([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]], dtype=np.int32)
DEPTH = np.full(5, 2, dtype=np.int32)
POINTS = np.array([[0.0], [1.0], [2.0], [10.0], [12.0]], dtype=np.float32)


def random_codebook(num_items: int, num_clusters: int = 6, levels: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Codes that end at any depth, with shared ones among them."""
    generator = np.random.default_rng(3)
    codes = generator.integers(num_clusters, size=(num_items, levels)).astype(np.int32)
    depth = generator.integers(1, levels + 1, size=num_items).astype(np.int32)
    depth[:2] = levels
    codes[np.arange(levels) >= depth[:, None]] = -1
    return codes, depth


def random_table(num_items: int, dim: int = 7) -> np.ndarray:
    """Rows far from the origin, some of them zeros."""
    generator = np.random.default_rng(4)
    table = (generator.normal(size=(num_items, dim)) + 5).astype(np.float32)
    table[generator.choice(num_items, num_items // 10, replace=False)] = 0
    return table


def reference_quality(codes: np.ndarray, depth: np.ndarray, num_clusters: int, table: np.ndarray, seed: int) -> dict:
    """The whole report from prefixes as tuples and a full similarity matrix."""
    table = table.astype(np.float64)
    total = np.square(table - table.mean(0)).sum()
    levels = []
    for level in range(codes.shape[1]):
        prefixes = [tuple(row[: level + 1].tolist()) for row in codes]
        members: dict[tuple, list[int]] = {}
        for item, prefix in enumerate(prefixes):
            members.setdefault(prefix, []).append(item)
        within = sum(np.square(table[items] - table[items].mean(0)).sum() for items in members.values())
        sizes = np.array([len(items) for prefix, items in members.items() if prefix[-1] >= 0])
        values = codes[depth > level, level]
        share = np.unique(values, return_counts=True)[1] / len(values)
        entropy = float(-(share * np.log2(share)).sum())
        bins = [int(size).bit_length() - 1 for size in sizes]
        levels.append(
            {
                "level": level + 1,
                "items": len(values),
                "codes_used": len(share),
                "entropy_bits": pytest.approx(entropy),
                "normalised_perplexity": pytest.approx(2**entropy / num_clusters),
                "nodes": len(sizes),
                "size_min": sizes.min(),
                "size_median": np.median(sizes),
                "size_mean": pytest.approx(sizes.mean()),
                "size_max": sizes.max(),
                "size_histogram": {
                    "from": [2**b for b in range(max(bins) + 1)],
                    "nodes": [bins.count(b) for b in range(max(bins) + 1)],
                },
                "variance_explained": pytest.approx(1 - within / total, abs=1e-9),
            }
        )
    alike = sum(len(items) for items in members.values() if len(items) > 1)
    return {
        "num_items": len(codes),
        "num_clusters": num_clusters,
        "unique_fraction": pytest.approx(1 - alike / len(codes)),
        "collisions": alike,
        "max_depth": codes.shape[1],
        "mean_depth": pytest.approx(depth.mean()),
        "depth_histogram": {str(d): int((depth == d).sum()) for d in range(1, codes.shape[1] + 1)},
        "levels": levels,
        "neighbour_preservation": reference_neighbours(codes[:, 0], table, seed),
    }


def reference_neighbours(clusters: np.ndarray, table: np.ndarray, seed: int) -> dict:
    present = np.flatnonzero(table.any(1))
    queries = np.arange(len(present))
    if len(present) > quality.NUM_QUERIES:
        queries = np.sort(np.random.default_rng(seed).choice(len(present), quality.NUM_QUERIES, replace=False))
    unit, clusters = table[present] / np.linalg.norm(table[present], axis=1, keepdims=True), clusters[present]
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = np.argsort(-similarity[queries], axis=1)[:, :10]
    others = (clusters[queries, None] == clusters).sum(1) - 1
    return {
        "recall": pytest.approx((clusters[nearest] == clusters[queries, None]).mean()),
        "chance": pytest.approx(others.mean() / (len(present) - 1)),
        "neighbours": 10,
        "queries": len(queries),
    }


@pytest.mark.parametrize("queries", [90, 2000])
def test_same_as_the_reference(queries, monkeypatch):
    monkeypatch.setattr(quality, "NUM_QUERIES", queries)
    (codes, depth), table = random_codebook(600), random_table(600)
    report = codebook_quality(codes, depth, 8, table, seed=5)
    assert report == reference_quality(codes, depth, 8, table, seed=5)
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize("rows_at_once", [1, 37, 599])
@pytest.mark.parametrize("scored", [1, 50])
def test_ranges_do_not_matter(rows_at_once, scored, monkeypatch):
    (codes, depth), table = random_codebook(600), random_table(600)
    monkeypatch.setattr(quality, "RANGE_BYTES", 4 * table.shape[1] * rows_at_once)
    monkeypatch.setattr(quality, "SCORED_ROWS", scored)
    assert codebook_quality(codes, depth, 8, table) == reference_quality(codes, depth, 8, table, seed=0)


class CountedRows(ArrayRows):
    """Rows that remember how many were read at a time."""

    read_at_once = 0
    passes = 0

    def read(self, start: int, stop: int) -> np.ndarray:
        self.read_at_once = max(self.read_at_once, stop - start)
        self.passes += stop - start == 100 and start == 0
        return super().read(start, stop)


@pytest.mark.parametrize(("nodes_at_once", "passes"), [(10_000, 1), (100, 3), (13, 19)])
def test_sums_kept_at_a_time_do_not_matter(nodes_at_once, passes, monkeypatch):
    """The codebook has 234 nodes of two or more, and the root."""
    (codes, depth), table = random_codebook(600), random_table(600)
    monkeypatch.setattr(quality, "SUMS_BYTES", 8 * table.shape[1] * nodes_at_once)
    monkeypatch.setattr(quality, "RANGE_BYTES", 4 * table.shape[1] * 100)
    monkeypatch.setattr(quality, "MAX_PASSES", 1000)
    rows = CountedRows(table)
    report = codebook_quality(codes, depth, 8, rows)
    assert report == reference_quality(codes, depth, 8, table, seed=0)
    assert rows.read_at_once == 100
    assert rows.passes == passes + 1  # and one for the neighbours


def test_too_many_nodes_are_sampled(monkeypatch):
    monkeypatch.setattr(quality, "NUM_QUERIES", 20)
    codes, depth = random_codebook(20_000, num_clusters=12)
    table = random_table(20_000)
    exact = codebook_quality(codes, depth, 12, table)
    monkeypatch.setattr(quality, "SUMS_BYTES", 8 * table.shape[1] * 50)
    rows = CountedRows(table)
    report = codebook_quality(codes, depth, 12, rows)
    assert report == codebook_quality(codes, depth, 12, table)  # seeded
    samples = [level.pop("variance_sample", 1.0) for level in report["levels"]]
    assert samples[:2] == [1.0, 1.0]
    assert 0.5 < samples[2] < 0.9  # of the items; of the nodes, 400 of some 1,800
    for level, known in zip(report["levels"], exact["levels"], strict=True):
        assert level["variance_explained"] == pytest.approx(known["variance_explained"], abs=0.03)
        assert level | {"variance_explained": 0} == known | {"variance_explained": 0}


@pytest.mark.parametrize(("code_type", "depth_type"), [(np.int16, np.uint8), (np.int32, np.int32), (np.int64, np.int8)])
def test_any_integers(code_type, depth_type):
    codes, depth = random_codebook(300)
    table = random_table(300)
    report = codebook_quality(codes.astype(code_type), depth.astype(depth_type), 8, table)
    assert report == reference_quality(codes, depth, 8, table, seed=0)


@pytest.mark.parametrize("code_type", [np.int16, np.int32])
def test_largest_codes_do_not_overflow(code_type):
    codes, depth = random_codebook(300)
    codes = np.where(codes > 0, np.iinfo(code_type).max - codes, codes).astype(code_type)
    table = random_table(300)
    assert codebook_quality(codes, depth, 8, table) == reference_quality(codes, depth, 8, table, seed=0)


def test_rows_from_files(tmp_path: Path, monkeypatch):
    (codes, depth), table = random_codebook(500), random_table(500)
    table[:70].tofile(tmp_path / "a")
    table[60:].tofile(tmp_path / "b")
    rows = FileRows([Part(str(tmp_path / "a"), 0, 70), Part(str(tmp_path / "b"), 10, 440)], table.shape[1])
    monkeypatch.setattr(quality, "RANGE_BYTES", 4 * table.shape[1] * 64)
    assert codebook_quality(codes, depth, 8, rows) == reference_quality(codes, depth, 8, table, seed=0)


def test_identical_rows_have_no_variance_to_explain():
    report = codebook_quality(CODES, DEPTH, 4, np.full((5, 3), 0.1, np.float32))
    assert [level["variance_explained"] for level in report["levels"]] == [1.0, 1.0]


def test_one_item():
    report = codebook_quality(CODES[:1], DEPTH[:1], 4, POINTS[1:2])
    assert [level["variance_explained"] for level in report["levels"]] == [1.0, 1.0]
    assert report["neighbour_preservation"]["recall"] is None


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


def test_rows_of_zeros_are_no_ones_neighbours():
    table = np.concatenate([np.zeros((30, 2)), [[1, 0], [1, 0.1], [0, 1], [0.1, 1]], np.zeros((30, 2))])
    clusters = np.array([2] * 30 + [0, 0, 1, 1] + [2] * 30)
    result = neighbour_preservation(clusters, table)
    assert (result["neighbours"], result["queries"]) == (3, 4)
    assert result["recall"] == result["chance"] == pytest.approx(1 / 3)  # all three others, one of them alike


def test_nearest_rows_by_any_score(monkeypatch):
    monkeypatch.setattr(quality, "SCORED_ROWS", 3)
    table = np.arange(10.0, dtype=np.float32)[:, None]
    items = np.array([0, 4, 9])
    found = nearest_rows(table, items, 2, lambda rows: -np.abs(table[items] - rows.T))
    assert np.sort(found, axis=1).tolist() == [[1, 2], [3, 5], [7, 8]]


@pytest.mark.parametrize(
    ("codes", "depth"),
    [
        (np.array([[0, 1], [0, 2]]), np.array([2, 1])),  # goes on past its depth
        (np.array([[0, -1], [0, 2]]), np.array([2, 2])),  # ends before it
        (np.array([[-1, -1], [0, 2]]), np.array([0, 2])),  # no code at all
        (np.array([[0, 1], [0, 2]]), np.array([2, 3])),  # deeper than there are levels
        (np.array([[0, 1], [0, 2]]), np.array([2, 2, 2])),
    ],
)
def test_codes_that_do_not_fit_are_refused(codes, depth):
    with pytest.raises(DataError):
        codebook_quality(codes, depth, 4, POINTS[:2])
