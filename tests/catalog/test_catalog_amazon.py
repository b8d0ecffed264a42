"""Raw Amazon files of 2014, 2018 and 2023: every field variant and every kind of bad line."""

from __future__ import annotations

import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from catalog_files import gzip_lines, ledger_rows, sequences_by_id

from genrec_dist.catalog import amazon
from genrec_dist.errors import DataError


def rows_of(tables) -> list[dict]:
    return pa.concat_tables(tables).to_pylist()


def items_of(catalog) -> list[dict]:
    return pq.read_table(catalog.folder / "items.parquet").to_pylist()


def test_2014_reviews_and_python_literal_metadata(tmp_path, build) -> None:
    review = {"overall": 5.0, "reviewText": "fine", "helpful": [0, 0]}
    gzip_lines(
        tmp_path / "reviews_X_5.json.gz",
        [
            {"reviewerID": "U2", "asin": "B2", "unixReviewTime": 86400, **review},
            {"reviewerID": "U1", "asin": "B9", "unixReviewTime": 172800, **review},
            {"reviewerID": "U1", "asin": "B2", "unixReviewTime": 86400, **review},
        ],
    )
    gzip_lines(
        tmp_path / "meta_X.json.gz",
        [
            "{'asin': 'B2', 'title': \"Men&#39;s  Soap &amp;\\n Towel\", 'price': 4.5, 'brand': 'Ivory', "
            "'description': 'It\\'s \\d good', 'categories': [['Beauty', 'Bath'], ['Gifts']]}",
            '{"asin": "B9", "title": "Strict JSON", "categories": [["Beauty"]]}',
            "{'asin': 'B5', 'title': 'never bought'}",
        ],
    )
    catalog = build(source="amazon2014", path=str(tmp_path))
    assert items_of(catalog) == [
        {
            "item_index": 0,
            "item_id": "B2",
            "title": "Men's Soap & Towel",
            "brand": "Ivory",
            "categories": ["Beauty > Bath", "Gifts"],
            "description": "It's \\d good",
            "price": 4.5,
        },
        {
            "item_index": 1,
            "item_id": "B9",
            "title": "Strict JSON",
            "brand": None,
            "categories": ["Beauty"],
            "description": None,
            "price": None,
        },
    ]
    assert sequences_by_id(catalog) == {"U1": ["B2", "B9"], "U2": ["B2"]}
    assert catalog.sequences.timestamps.tolist() == [86400, 172800, 86400]
    assert ledger_rows(catalog.folder) == []


@pytest.mark.parametrize("source", ["amazon2018", "amazon2023"])
def test_ratings_of_other_years_are_refused(tmp_path, source) -> None:
    """In 2018's files the item comes first: read as 2014's, users would be items."""
    path = tmp_path / "ratings_X.csv"
    path.write_text("B0012345,A1USER,5.0,1400000000\n")
    with pytest.raises(DataError, match=source):
        amazon.read_interactions(path, source, 0)


def test_2014_ratings_csv(tmp_path) -> None:
    path = tmp_path / "ratings_X.csv"
    path.write_text("U1,B1,5.0,86400\nU1,B2,5.0\nU1,,5.0,86400\nU1,B2,1.0,yesterday\n")
    rows = rows_of(amazon.read_interactions(path, "amazon2014", 0))
    assert [(r["line"], r["reason"], r["user_id"], r["item_id"], r["timestamp"]) for r in rows] == [
        (1, None, "U1", "B1", 86400),
        (2, "broken_line", None, None, None),
        (3, "missing_field", None, None, None),
        (4, "bad_timestamp", None, None, None),
    ]


def test_2018_list_description_and_price_text(tmp_path) -> None:
    path = gzip_lines(
        tmp_path / "meta_X.json.gz",
        [
            {"asin": "A", "description": ["One &lt;b&gt;", "", "two"], "price": "$1,212.99", "category": ["T", "S"]},
            {"asin": "B", "description": [], "price": "$5.00 - $9.00", "category": []},
            {"asin": "C", "price": ".a-box-inner{color:red}", "title": ""},
            "{'asin': 'D'}",
        ],
    )
    rows = rows_of(amazon.read_items(path, "amazon2018", 0))
    assert [r["description"] for r in rows] == ["One <b> two", None, None, None]
    assert [r["price"] for r in rows] == [1212.99, 5.0, None, None]
    assert [r["categories"] for r in rows] == [["T > S"], [], [], None]
    assert rows[2]["title"] is None
    assert rows[3]["reason"] == "broken_line"  # literals are a habit of 2014 only


def test_2023_parent_asin_milliseconds_and_store(tmp_path, build) -> None:
    gzip_lines(
        tmp_path / "X.jsonl.gz",
        [
            {"user_id": "U", "asin": "V1", "parent_asin": "P2", "timestamp": 1_588_687_728_923},
            {"user_id": "U", "asin": "V2", "parent_asin": "P1", "sort_timestamp": 1_588_615_855_070},
            {"user_id": "U", "asin": "V3", "timestamp": 1_588_615_855_070},
        ],
    )
    gzip_lines(
        tmp_path / "meta_X.jsonl.gz",
        [
            {"parent_asin": "P1", "title": "One", "store": "Acme", "categories": ["A", "B", "C"], "price": 3},
            {"parent_asin": "P2", "title": "Two", "store": None, "categories": [], "price": "12.5"},
        ],
    )
    catalog = build(source="amazon2023", path=str(tmp_path), max_bad_fraction=0.5)
    items = items_of(catalog)
    assert [(i["item_id"], i["brand"], i["categories"], i["price"]) for i in items] == [
        ("P1", "Acme", ["A > B > C"], 3.0),
        ("P2", None, [], 12.5),
    ]
    assert sequences_by_id(catalog) == {"U": ["P1", "P2"]}
    assert catalog.sequences.timestamps.tolist() == [1_588_615_855, 1_588_687_728]
    assert ledger_rows(catalog.folder) == [("X.jsonl.gz", 3, "missing_field", "dropped")]


def test_every_bad_review_line_is_named(tmp_path) -> None:
    good = {"reviewerID": "U", "asin": "B", "unixReviewTime": 1}
    lines = [
        good,
        '{"reviewerID": "U", "asin":',
        b'{"reviewerID": "\xff\xfe", "asin": "B", "unixReviewTime": 1}',
        "",
        {"asin": "B", "unixReviewTime": 1},
        {"reviewerID": "U", "asin": "  ", "unixReviewTime": 1},
        {"reviewerID": "U", "asin": "B"},
        {"reviewerID": "U", "asin": "B", "unixReviewTime": "soon"},
        {"reviewerID": "U", "asin": "B", "unixReviewTime": -5},
        {"reviewerID": "U", "asin": "B", "unixReviewTime": 1_588_687_728_923},
        "[1, 2]",
        '{"reviewerID": "\\ud800", "asin": "B", "unixReviewTime": 1}',
        "[" * 100_000,
        good,
    ]
    path = gzip_lines(tmp_path / "reviews_X.json.gz", lines)
    rows = rows_of(amazon.read_interactions(path, "amazon2014", 7))
    assert [r["line"] for r in rows] == list(range(1, 15))
    assert {r["file"] for r in rows} == {7}
    assert [r["reason"] for r in rows] == [
        None,
        "broken_line",
        "non_utf8",
        "broken_line",
        "missing_field",
        "missing_field",
        "missing_field",
        "bad_timestamp",
        "bad_timestamp",
        "bad_timestamp",
        "broken_line",
        "non_utf8",
        "broken_line",
        None,
    ]


@pytest.mark.parametrize("line", ["{'asin': __import__('os').getcwd()}", "{'asin': 'B'", "['B']", "(" * 5000])
def test_metadata_that_is_no_literal_is_not_evaluated(tmp_path, line) -> None:
    path = gzip_lines(tmp_path / "meta_X.json.gz", [line, "{'asin': 'B'}"])
    rows = rows_of(amazon.read_items(path, "amazon2014", 0))
    assert [(r["line"], r["reason"], r["item_id"]) for r in rows] == [(1, "broken_line", None), (2, None, "B")]


def test_truncated_and_broken_gzip_end_with_a_ledger_row(tmp_path) -> None:
    lines = b"".join(b'{"reviewerID": "U%d", "asin": "B", "unixReviewTime": 1}\n' % n for n in range(5000))
    whole = gzip.compress(lines)
    path = tmp_path / "reviews_X.json.gz"
    path.write_bytes(whole[: len(whole) // 2])
    rows = rows_of(amazon.read_interactions(path, "amazon2014", 0))
    assert 0 < len(rows) < 5000
    assert [r["reason"] for r in rows[:-1]] == [None] * (len(rows) - 1)
    assert (rows[-1]["line"], rows[-1]["reason"]) == (len(rows), "truncated_gzip")

    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])
    rows = rows_of(amazon.read_interactions(path, "amazon2014", 0))
    assert rows[-1]["reason"] in ("broken_gzip", "broken_line")
    assert any(r["reason"] == "broken_gzip" for r in rows)


def test_file_is_read_by_content_not_by_name(tmp_path) -> None:
    path = tmp_path / "reviews_X.json.gz"
    path.write_bytes(b'\xef\xbb\xbf{"reviewerID": "U", "asin": "B", "unixReviewTime": 1}\r\n')
    rows = rows_of(amazon.read_interactions(path, "amazon2014", 0))
    assert [(r["reason"], r["user_id"]) for r in rows] == [(None, "U")]
