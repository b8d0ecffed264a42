"""File primitives: atomic replacement, strict JSON, a JSON Lines tail cut by a kill."""

from __future__ import annotations

import hashlib
import os

import pytest

from genrec_dist.artifacts import files


def test_sha256_of_a_file_longer_than_one_piece(tmp_path):
    data = os.urandom((4 << 20) + 17)
    (tmp_path / "a").write_bytes(data)
    assert files.sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_canonical_json_ignores_key_order_and_refuses_nan():
    assert files.canonical_json({"b": [1, 2], "a": None}) == files.canonical_json({"a": None, "b": [1, 2]})
    assert files.canonical_json([1, 2]) != files.canonical_json([2, 1])
    with pytest.raises(ValueError):
        files.canonical_json({"a": float("nan")})


def test_failed_write_keeps_the_old_content_and_leaves_nothing(tmp_path, monkeypatch):
    target = tmp_path / "value.json"
    files.write_json(target, {"a": 1})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_json(target, {"a": 2})
    assert files.read_json(target) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


def test_jsonl_leaves_out_an_unfinished_last_line(tmp_path):
    file = tmp_path / "events.jsonl"
    assert files.read_jsonl(file) == []
    files.append_jsonl(file, {"n": 1})
    files.append_jsonl(file, {"n": 2})
    with open(file, "a", encoding="utf-8") as handle:
        handle.write('{"n": 3, "cut')
    assert files.read_jsonl(file) == [{"n": 1}, {"n": 2}]


def test_jsonl_written_after_a_cut_line_is_not_lost(tmp_path):
    file = tmp_path / "events.jsonl"
    files.append_jsonl(file, {"n": 1})
    with open(file, "a", encoding="utf-8") as handle:
        handle.write('{"n": 2, "cut')
    files.append_jsonl(file, {"n": 3})
    assert {"n": 3} in files.read_jsonl(file)
