"""Leases: one owner at a time, stale ones taken over, by a clock that the test turns."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from genrec_dist.artifacts.files import read_json, write_json
from genrec_dist.studies.scaling.leases import Leases, Owner


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def leases(tmp_path, clock):
    """Leases of an owner on another host, of which nothing can be seen but its files."""
    return lambda name, host="elsewhere": Leases(tmp_path, Owner(name, host, os.getpid(), 0.0), 60.0, clock)


def test_one_owner_at_a_time(leases):
    a, b = leases("a"), leases("b")
    assert a.take("t")
    assert a.take("t")
    assert not b.take("t")
    assert b.holder("t")["owner"] == "a"
    a.release("t")
    assert b.take("t")
    a.release("t")  # no longer a's
    assert b.holder("t")["owner"] == "b"


def test_a_beating_claim_is_respected_for_ever_and_a_silent_one_for_a_lease(leases, clock):
    a, b = leases("a"), leases("b")
    a.take("t")
    for _ in range(20):
        assert not b.take("t")
        clock.now += 30
        assert a.beat() == []
    assert not b.take("t")
    clock.now += 59
    assert not b.take("t")
    clock.now += 2
    assert b.holder("t") is None
    assert b.take("t")
    assert a.beat() == ["t"]
    assert a.held == set()


def test_beats_are_no_more_frequent_than_needed(leases, clock, tmp_path):
    a = leases("a")
    a.take("t")
    first = read_json(tmp_path / "t.json")["heartbeat"]
    clock.now += 5
    a.beat()
    assert read_json(tmp_path / "t.json")["heartbeat"] == first
    clock.now += 6
    a.beat()
    assert read_json(tmp_path / "t.json")["heartbeat"] > first


def test_the_claim_of_a_process_of_this_host_that_is_gone_is_free_at_once(tmp_path, clock):
    code = (
        "import sys; from pathlib import Path\n"
        "from genrec_dist.studies.scaling.leases import Leases, Owner\n"
        "Leases(Path(sys.argv[1]), Owner.this_process()).take('t')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    me = Leases(tmp_path, Owner.this_process(), clock=clock)
    assert me.names() == ["t"]
    assert me.holder("t") is None
    assert me.take("t")
    me.clear()  # what lives stays
    assert me.names() == ["t"]
    assert not Leases(tmp_path, Owner.this_process(), clock=clock).take("t")


def test_a_broken_claim_is_taken_over(leases, tmp_path):
    (tmp_path / "t.json").write_text("{")
    write_json(tmp_path / "u.json", {"owner": "x"})
    assert leases("a").take("t")
    assert leases("a").take("u")
