"""`genrec doctor` on clusters and storage, without a cluster: what its checks make of what they find."""

from __future__ import annotations

from pathlib import Path

import pytest

from genrec_dist.artifacts.bucket import Bucket
from genrec_dist.artifacts.places import parse_url
from launcher.doctor_cluster import Nodes, as_reached, guarded, listening_here
from launcher.doctor_probe import Probe, scope
from launcher.doctor_storage import bucket_check, storage


def listening(who: str, address: str, port: int = 6379, mode: str = "token") -> dict:
    return {"who": who, "address": address, "port": port, "scope": scope(address), "mode": mode}


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("0.0.0.0", "all"),
        ("::", "all"),
    ]
    + [("10.0.0.1", "private"), ("192.168.1.1", "private"), ("fe80::1", "private"), ("fd00::1", "private")]
    + [("8.8.8.8", "public"), ("2600::1", "public")],
)
def test_who_can_reach_an_address(address, expected):
    assert scope(address) == expected


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "8.8.8.8"])
def test_a_wide_bind_without_a_token_is_refused(address):
    sockets = [listening("agent or worker", "0.0.0.0", 4000), listening("GCS", address)]
    check = guarded("Ray", True, sockets)
    assert (check.state, "GCS" in check.found) == ("missing", True)
    assert "RAY_AUTH_MODE=token" in check.fix
    assert guarded("Ray", False, [listening("GCS", "0.0.0.0")]).state == "ok"


def test_binds_that_only_warn():
    assert guarded("Ray", True, [listening("GCS", "127.0.0.1")]).state == "warning"
    assert guarded("Ray", False, [listening("GCS", "8.8.8.8")]).state == "warning"
    dashboard = guarded("Ray", False, [listening("dashboard and Jobs", "0.0.0.0", 8265)])
    assert (dashboard.state, "--dashboard-host=127.0.0.1" in dashboard.fix) == ("warning", True)
    assert guarded("Ray", False, [listening("dashboard and Jobs", "127.0.0.1", 8265)]).state == "ok"


def test_an_open_cluster_whose_nodes_say_nothing_is_refused():
    assert guarded("Ray", True, [as_reached("10.0.0.1:6379")]).state == "missing"
    assert guarded("Ray", True, [as_reached("127.0.0.1:6379")]).state == "warning"


def test_processes_of_this_machine_are_judged_by_their_mode():
    assert listening_here([]).state == "ok"
    worker = listening("agent or worker", "0.0.0.0", mode="unknown")
    assert listening_here([worker, listening("raylet", "0.0.0.0")]).state == "ok"
    assert listening_here([worker, listening("raylet", "0.0.0.0", mode="")]).state == "missing"


class FakeNodes(Nodes):
    """Two nodes, one of which differs."""

    def __init__(self, versions: dict, skew: float) -> None:
        mine = Probe().look()
        self.seen = {"a": mine, "b": mine | {"versions": mine["versions"] | versions}}
        self.skew = skew

    def ask(self, method, arguments, probes=None, seconds=0.0):
        return {name: Probe().now() + (self.skew if name == "b" else 0.0) for name in arguments}


def test_versions_and_clocks_that_differ_are_named():
    odd = FakeNodes({"torch": "1.0"}, skew=-60.0)
    assert odd._versions().state == "missing"
    assert "b: torch 1.0, here" in odd._versions().found
    assert odd._clocks().state == "warning"
    assert odd._clocks().found == "at least 60.0 s apart: b"
    same = FakeNodes({}, skew=0.0)
    assert (same._versions().state, same._clocks().state) == ("ok", "ok")


def on_nodes(broken: str = "", how: str = ""):
    """Probes of two nodes in this process; one may be deaf, mute, or gone."""

    def ask(method, arguments):
        answers = {}
        for node, given in arguments.items():
            if node == broken and how == "gone":
                answers[node] = TimeoutError("no answer")
            elif node == broken and method == how:
                answers[node] = "FileNotFoundError: no such file" if method == "read" else ""
            else:
                answers[node] = getattr(Probe(), method)(*given)
        return answers

    return ask


def test_a_shared_folder_is_written_and_read_by_all(tmp_path, monkeypatch):
    monkeypatch.setattr(Probe.read, "__defaults__", (0.1,))
    (check,) = storage({"--store": str(tmp_path / "store")}, ["a", "b"], on_nodes())
    assert (check.state, "2 nodes" in check.found) == ("ok", True)
    for how in ("read", "write", "gone"):
        (check,) = storage({"--store": str(tmp_path / "store")}, ["a", "b"], on_nodes("b", how))
        assert (check.name, check.state) == ("--store", "missing")
        assert "b" in check.found.split(": ", 1)[1]
        assert " a " not in check.found
    assert list((tmp_path / "store").iterdir()) == []


def test_a_folder_that_cannot_be_written_and_a_place_that_is_none(tmp_path):
    (tmp_path / "file").touch()
    (check,) = storage({"--runs": str(tmp_path / "file" / "runs")}, [], on_nodes())
    assert (check.state, "NotADirectoryError" in check.found) == ("missing", True)
    (check,) = storage({"--runs": "gs://bucket/x"}, [], on_nodes())
    assert check.state == "missing"
    (check,) = storage({"--runs": str(Path(tmp_path / "new" / "runs"))}, [], on_nodes())
    assert check.state == "ok"


def test_a_bucket_that_keeps_to_conditions_and_one_that_does_not(s3, monkeypatch):
    place = f"{s3}/team/store"
    assert [check.state for check in storage({"--store": place}, [], on_nodes())] == ["ok", "ok"]
    assert list(Bucket(parse_url(place)).names()) == []
    write = Bucket.write
    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "write", lambda self, name, data, **conditions: write(self, name, data))
        check = bucket_check("--store", place)
    assert (check.state, "conditions" in check.found) == ("missing", True)
    (check,) = storage({"--store": "s3://no-such-bucket/store"}, [], on_nodes())
    assert (check.state, "NoSuchBucket" in check.found) == ("missing", True)
