"""Ledger: every row counted, listed up to a limit, written in a stable order."""

from __future__ import annotations

import pyarrow.parquet as pq

from genrec_dist.artifacts.files import read_json
from genrec_dist.artifacts.ledger import Ledger


def test_counts_and_order_on_disk(tmp_path):
    ledger = Ledger()
    ledger.add("b.json", 7, "bad_json")
    ledger.add("a.json", 9, "bad_json")
    ledger.add("a.json", 2, "no_title", action="kept", detail="x" * 500)
    ledger.write(tmp_path)

    rows = pq.read_table(tmp_path / "ledger.parquet").to_pylist()
    assert [(r["source"], r["line"]) for r in rows] == [("a.json", 2), ("a.json", 9), ("b.json", 7)]
    assert rows[0]["detail"] == "x" * 200
    assert read_json(tmp_path / "ledger.json") == {
        "counts": {"bad_json": {"dropped": 2}, "no_title": {"kept": 1}},
        "listed": 3,
        "total": 3,
    }
    assert (ledger.total(), ledger.total("kept"), ledger.total("failed")) == (2, 1, 0)


def test_rows_past_the_limit_are_counted_but_not_listed(tmp_path):
    ledger = Ledger(max_rows=2)
    ledger.extend([{"source": "a", "line": n, "reason": "r"} for n in range(5)])
    ledger.write(tmp_path)
    assert pq.read_metadata(tmp_path / "ledger.parquet").num_rows == 2
    assert read_json(tmp_path / "ledger.json") == {"counts": {"r": {"dropped": 5}}, "listed": 2, "total": 5}


def test_an_empty_ledger_still_has_its_columns(tmp_path):
    Ledger().write(tmp_path)
    table = pq.read_table(tmp_path / "ledger.parquet")
    assert table.num_rows == 0
    assert table.column_names == ["source", "line", "reason", "action", "detail"]
