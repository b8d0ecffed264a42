"""Filtering, duplicates, unknown items, threshold and order, on catalogs small enough to check by hand."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from catalog_files import gzip_lines, ledger_rows, sequences_by_id
from hypothesis import given
from hypothesis import strategies as st

from genrec_dist.catalog.kcore import kcore
from genrec_dist.errors import DataError


def write_pair(folder, rows: list[tuple], known: list[str], **columns) -> str:
    users, items, stamps = zip(*rows)
    table = {"user_id": users, "item_id": items, "timestamp": pa.array(stamps, pa.int64()), **columns}
    pq.write_table(pa.table(table), folder / "interactions.parquet")
    pq.write_table(pa.table({"item_id": pa.array(known, pa.string())}), folder / "items.parquet")
    return str(folder)


def stats_of(catalog) -> dict:
    return json.loads((catalog.folder / "stats.json").read_text())


@given(
    pairs=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=60),
    min_user=st.integers(0, 4),
    min_item=st.integers(0, 4),
)
def test_kcore_equals_removing_one_by_one(pairs, min_user, min_item) -> None:
    left = list(range(len(pairs)))
    while True:
        users = [pairs[row][0] for row in left]
        items = [pairs[row][1] for row in left]
        weak = [r for r in left if users.count(pairs[r][0]) < min_user or items.count(pairs[r][1]) < min_item]
        if not weak:
            break
        left.remove(weak[0])
    array = np.array(pairs, dtype=np.int32).reshape(-1, 2)
    keep, _ = kcore(array[:, 0], array[:, 1], min_user, min_item)
    assert np.flatnonzero(keep).tolist() == left


def test_kcore_rounds_of_a_chain() -> None:
    # users 0,1,2 x items 0,1 stay; user 3 has one, then item 2 loses its second, then user 4 is left with one
    users = np.array([0, 0, 1, 1, 2, 2, 3, 4, 4])
    items = np.array([0, 1, 0, 1, 0, 1, 2, 2, 0])
    keep, rounds = kcore(users, items, 2, 2)
    assert keep.tolist() == [True] * 6 + [False] * 3
    assert rounds == 3


def test_time_order_breaks_ties_by_item_id(tmp_path, build) -> None:
    path = write_pair(tmp_path, [("u", "c", 2), ("u", "b", 1), ("u", "a", 2), ("u", "d", 0)], list("abcd"))
    assert sequences_by_id(build(path=path)) == {"u": ["d", "b", "a", "c"]}
    assert sequences_by_id(build(path=path, order="file")) == {"u": ["a", "b", "c", "d"]}


def test_a_complete_position_decides_the_time_order(tmp_path, build) -> None:
    rows = [("u", "a", None), ("u", "b", 5), ("u", "c", None)]
    path = write_pair(tmp_path, rows, list("abc"), position=[2, 0, 1])
    catalog = build(path=path)
    assert sequences_by_id(catalog) == {"u": ["b", "c", "a"]}
    assert pq.read_table(catalog.folder / "sequences.parquet")["timestamps"].to_pylist() == [[5, None, None]]
    assert stats_of(catalog)["missing_timestamps"] == 2
    assert stats_of(catalog)["users_with_tied_targets"] == 1  # a missing timestamp is a tie


def test_incomplete_position_and_timestamp_cannot_be_ordered(tmp_path, build) -> None:
    path = write_pair(tmp_path, [("u", "a", None), ("u", "b", 5)], ["a", "b"], position=[0, None])
    with pytest.raises(DataError, match="time order"):
        build(path=path)
    assert sequences_by_id(build(path=path, order="file")) == {"u": ["a", "b"]}


def test_the_earliest_of_duplicate_pairs_wins(tmp_path, build) -> None:
    rows = [("u", "a", 9), ("u", "b", 5), ("u", "a", 1), ("v", "a", 3), ("u", "a", 1)]
    path = write_pair(tmp_path, rows, ["a", "b"])
    catalog = build(path=path, max_bad_fraction=0.0)  # duplicates are not bad rows
    assert sequences_by_id(catalog) == {"u": ["a", "b"], "v": ["a"]}
    assert ledger_rows(catalog.folder) == [
        ("interactions.parquet", 1, "duplicate_pair", "dropped"),
        ("interactions.parquet", 5, "duplicate_pair", "dropped"),
    ]
    kept = build(path=path, duplicates="keep")
    assert sequences_by_id(kept) == {"u": ["a", "a", "b", "a"], "v": ["a"]}
    assert ledger_rows(kept.folder) == []


def test_unknown_items(tmp_path, build) -> None:
    path = write_pair(tmp_path, [("u", "a", 1), ("u", "x", 2), ("v", "x", 3)], ["a"])
    kept = build(path=path, max_bad_fraction=0.0)
    assert kept.item_ids == ["a", "x"]
    assert pq.read_table(kept.folder / "items.parquet")["categories"].to_pylist() == [[], []]
    assert ledger_rows(kept.folder) == [
        ("interactions.parquet", 2, "unknown_item", "kept"),
        ("interactions.parquet", 3, "unknown_item", "kept"),
    ]
    assert stats_of(kept)["input"]["metadata"]["items_without_metadata"] == 1
    dropped = build(path=path, unknown_items="drop", max_bad_fraction=0.7)
    assert sequences_by_id(dropped) == {"u": ["a"]}
    with pytest.raises(DataError, match="unknown_item 2"):
        build(path=path, unknown_items="drop", max_bad_fraction=0.6)


def test_repeated_metadata_rows(tmp_path, build) -> None:
    gzip_lines(tmp_path / "reviews_X.json.gz", [{"reviewerID": "u", "asin": "a", "unixReviewTime": 1}])
    gzip_lines(
        tmp_path / "meta_X.json.gz",
        [
            {"asin": "a", "title": "first", "categories": [["A"]]},
            {"asin": "a", "title": "second", "categories": [["A"]]},
            {"asin": "a", "title": "first", "categories": [["A"]]},
            {"asin": "a", "title": "first", "categories": [["B"]]},
            {"asin": "a", "title": "first", "categories": [["A"]], "price": 1},
        ],
    )
    catalog = build(source="amazon2014", path=str(tmp_path), max_bad_fraction=0.0)
    assert catalog.titles == ["first"]
    assert ledger_rows(catalog.folder) == [
        ("meta_X.json.gz", 2, "conflicting_metadata", "dropped"),
        ("meta_X.json.gz", 3, "duplicate_item", "dropped"),
        ("meta_X.json.gz", 4, "conflicting_metadata", "dropped"),
        ("meta_X.json.gz", 5, "conflicting_metadata", "dropped"),
    ]


def test_too_many_bad_rows_stop_with_exit_code_3(tmp_path, build) -> None:
    good = {"reviewerID": "u", "asin": "a", "unixReviewTime": 1}
    gzip_lines(tmp_path / "reviews_X.json.gz", [good, "{broken", {**good, "unixReviewTime": None}, good])
    gzip_lines(tmp_path / "meta_X.json.gz", [{"asin": "a"}])
    with pytest.raises(DataError) as caught:
        build(source="amazon2014", path=str(tmp_path), max_bad_fraction=0.49)
    assert caught.value.exit_code == 3
    message = str(caught.value)
    assert "2 of 4 rows: broken_line 1, missing_field 1" in message
    assert "reviews_X.json.gz:2 broken_line" in message
    assert "reviews_X.json.gz:3 missing_field" in message
    failed = tmp_path / "catalog0"
    assert not (failed / "sequences.parquet").exists()
    assert len(ledger_rows(failed / "scratch")) == 2  # what was found so far can be looked at
    assert sequences_by_id(build(source="amazon2014", path=str(tmp_path), max_bad_fraction=0.5)) == {"u": ["a"]}


def test_bad_metadata_is_measured_by_itself(tmp_path, build) -> None:
    good = {"reviewerID": "u", "asin": "a", "unixReviewTime": 1}
    gzip_lines(tmp_path / "reviews_X.json.gz", [good] * 1000)
    gzip_lines(tmp_path / "meta_X.json.gz", [{"asin": "a"}, {"title": "nameless"}])
    with pytest.raises(DataError, match="too many bad rows in the metadata"):
        build(source="amazon2014", path=str(tmp_path), max_bad_fraction=0.1)


def test_only_bad_rows_empty_input_and_empty_core(tmp_path, build) -> None:
    gzip_lines(tmp_path / "meta_X.json.gz", [{"asin": "a"}])
    gzip_lines(tmp_path / "reviews_X.json.gz", ["{"])
    settings = {"source": "amazon2014", "path": str(tmp_path)}
    with pytest.raises(DataError, match="too many bad rows"):
        build(**settings)
    with pytest.raises(DataError, match="no interaction is left"):
        build(**settings, max_bad_fraction=1.0)
    gzip_lines(tmp_path / "reviews_X.json.gz", [])
    with pytest.raises(DataError, match="are empty"):
        build(**settings)
    gzip_lines(tmp_path / "reviews_X.json.gz", [{"reviewerID": "u", "asin": "a", "unixReviewTime": 1}])
    with pytest.raises(DataError, match="no interaction is left"):
        build(**settings, min_user_interactions=5)


def test_statistics_of_a_small_catalog(tmp_path, build) -> None:
    rows = [("u", "a", 1), ("u", "b", 2), ("u", "c", 2), ("v", "a", 1), ("w", "a", 1), ("w", "b", 2), ("w", "c", 3)]
    path = write_pair(tmp_path, rows, ["a", "b", "c", "z"])
    stats = stats_of(build(path=path))
    assert (stats["num_users"], stats["num_items"], stats["num_interactions"]) == (3, 3, 7)
    assert stats["density"] == pytest.approx(7 / 9)
    assert stats["sequence_length"] == {"mean": pytest.approx(7 / 3), "median": 3.0, "min": 1, "max": 3}
    assert stats["users_with_tied_targets"] == 1  # u: b and c on the same day
    assert stats["input"]["metadata"]["items_without_interactions"] == 1
