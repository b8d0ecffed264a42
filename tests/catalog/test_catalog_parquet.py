"""The Parquet pair: ids of any type, optional columns, and rows that cannot be used."""

from __future__ import annotations

import datetime as dt

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from catalog_files import sequences_by_id

from genrec_dist.catalog import parquet
from genrec_dist.errors import DataError


def read(path, columns: dict, role: str = "interactions") -> list[dict]:
    pq.write_table(pa.table(columns), path / f"{role}.parquet")
    reader = parquet.read_interactions if role == "interactions" else parquet.read_items
    return pa.concat_tables(reader(path / f"{role}.parquet", "parquet", 0)).to_pylist()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([7, 12]), ["7", "12"]),
        (pa.array([7.0, None]), ["7", None]),
        (pa.array([7.5, 1.0]), ["7.5", "1"]),
        (pa.array([" a ", "b"]), ["a", "b"]),
        (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
        (pa.array(["a", "b"], pa.large_string()), ["a", "b"]),
        (pa.array([b"a", b"b"]), ["a", "b"]),
        (pa.array([True, False]), ["true", "false"]),
    ],
)
def test_ids_of_any_type_become_strings(tmp_path, values, expected) -> None:
    rows = read(tmp_path, {"user_id": values, "item_id": ["x", "y"], "position": [0, 1]})
    assert [row["user_id"] for row in rows] == expected


def test_list_ids_are_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="list or a struct"):
        read(tmp_path, {"user_id": [[1], [2]], "item_id": ["x", "y"], "position": [0, 1]})


@pytest.mark.parametrize(
    ("stamps", "expected", "reasons"),
    [
        (pa.array([5, -5]), [5, -5], [None, None]),
        (pa.array([5.9, float("nan")]), [5, None], [None, "missing_field"]),
        (pa.array([5.0, float("inf")]), [5, None], [None, "bad_timestamp"]),
        (pa.array(["5", "x"]), [5, None], [None, "bad_timestamp"]),
        (pa.array([5, 1_588_687_728_923]), [5, None], [None, "bad_timestamp"]),
        (pa.array([5, -(2**63)]), [5, None], [None, "bad_timestamp"]),
        (pa.array([dt.datetime(1970, 1, 2), None], pa.timestamp("us")), [86400, None], [None, "missing_field"]),
        (pa.array([dt.date(1970, 1, 2), dt.date(1970, 1, 3)]), [86400, 172800], [None, None]),
    ],
)
def test_timestamps(tmp_path, stamps, expected, reasons) -> None:
    rows = read(tmp_path, {"user_id": ["u", "u"], "item_id": ["x", "y"], "timestamp": stamps})
    assert [row["timestamp"] for row in rows] == expected
    assert [row["reason"] for row in rows] == reasons


def test_bad_rows_have_row_numbers_and_the_position_can_replace_a_timestamp(tmp_path) -> None:
    not_utf8 = pa.array([b"u", b"u", b"", b"u", b"\xff", None]).view(pa.string())
    columns = {
        "user_id": not_utf8,
        "item_id": ["x", None, "x", "y", "x", "x"],
        "timestamp": pa.array([1, 1, 1, None, 1, 1]),
        "position": pa.array([None, 1, 1, 0, 1, 1], pa.int16()),
    }
    rows = read(tmp_path, columns)
    assert [(row["line"], row["reason"], row["detail"]) for row in rows] == [
        (1, None, None),
        (2, "missing_field", "item_id"),
        (3, "missing_field", "user_id"),
        (4, None, None),
        (5, "non_utf8", ""),
        (6, "missing_field", "user_id"),
    ]
    assert rows[1]["user_id"] is None  # a bad row carries no data


def test_neither_timestamp_nor_position(tmp_path) -> None:
    with pytest.raises(DataError, match="timestamp or position"):
        read(tmp_path, {"user_id": ["u"], "item_id": ["x"]})


def test_absent_columns_and_unreadable_files(tmp_path) -> None:
    with pytest.raises(DataError, match="item_id"):
        read(tmp_path, {"user_id": ["u"], "item": ["x"], "position": [0]})
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(DataError, match=r"broken\.parquet"):
        list(parquet.read_interactions(tmp_path / "broken.parquet", "parquet", 0))


@pytest.mark.parametrize(
    ("categories", "expected"),
    [
        ([["A > B", "C"], None], [["A > B", "C"], []]),
        ([[["A", "B"], ["C"]], []], [["A > B", "C"], []]),
        (["A &amp; B", ""], [["A & B"], []]),
    ],
)
def test_category_shapes(tmp_path, categories, expected) -> None:
    rows = read(tmp_path, {"item_id": [1, 2], "categories": categories}, "items")
    assert [row["categories"] for row in rows] == expected


def test_items_with_only_an_id_and_bad_item_rows(tmp_path) -> None:
    titles = pa.array([b"ok", b"\xff", b"ok"]).view(pa.string())
    rows = read(tmp_path, {"item_id": pa.array([1, 2, None]), "title": titles}, "items")
    assert [(r["line"], r["reason"], r["item_id"], r["title"]) for r in rows] == [
        (1, None, "1", "ok"),
        (2, "non_utf8", None, None),
        (3, "missing_field", None, None),
    ]


def test_integer_ids_through_the_whole_stage(tmp_path, build) -> None:
    columns = {"user_id": [10, 9, 10], "item_id": [3, 3, 20], "timestamp": [5, 5, 4]}
    pq.write_table(pa.table(columns), tmp_path / "interactions.parquet")
    pq.write_table(pa.table({"item_id": [3, 20]}), tmp_path / "items.parquet")
    catalog = build(source="parquet", path=str(tmp_path))
    assert catalog.item_ids == ["20", "3"]  # ids are strings, also when sorted
    assert sequences_by_id(catalog) == {"10": ["20", "3"], "9": ["3"]}
