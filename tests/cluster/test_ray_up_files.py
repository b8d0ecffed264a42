"""The files for `ray up`: against the schema that Ray brings, through its own preparation, and closed to others."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from typer.testing import CliRunner

from genrec_dist.config import load_config
from launcher.cli import app

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cluster" / "ray-up"
FILES = sorted(FOLDER.glob("*.yaml"))
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_files_are_valid(file, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = yaml.safe_load(file.read_text())
    jsonschema.validate(settings, SCHEMA)
    validate_config(prepare_config(settings))


def test_both_kinds_are_there():
    assert [file.name for file in FILES] == ["aws.yaml", "on-premise.yaml"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(FILES[0].read_text()) | {"workers": 3}, SCHEMA)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_token_on_dashboard_on_loopback_and_no_rights(file):
    settings = yaml.safe_load(file.read_text())
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in settings[key]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ray start" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert settings["file_mounts"] == {"/var/lib/genrec/.ray/auth_token": "~/.ray/auth_token"}
    assert "--cap-drop=ALL" in settings["docker"]["run_options"]
    assert "--privileged" not in settings["docker"]["run_options"]
    assert "--volume=/shared:/shared" in settings["docker"]["run_options"]


def test_disks_are_encrypted_and_metadata_needs_a_session():
    for kind in yaml.safe_load((FOLDER / "aws.yaml").read_text())["available_node_types"].values():
        node = kind["node_config"]
        assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])
        assert node["MetadataOptions"]["HttpTokens"] == "required"


@pytest.mark.parametrize(("device", "kind", "other"), [("cuda", "gpu", "cpu"), ("cpu", "cpu", "gpu")])
def test_rendered_files(tmp_path, monkeypatch, device, kind, other):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--set", "runtime.num_workers=2", "--set", f"runtime.device={device}", "--store", "/shared/s"]
    command = ["submit", str(ROOT / "configs" / "quickstart.yaml"), *words, "--runs", "/shared/r", "--render", "ray-up"]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "genrec submit" in done.output
    made = yaml.safe_load((tmp_path / "out" / "aws.yaml").read_text())
    validate_config(prepare_config(json.loads(json.dumps(made))))
    original = yaml.safe_load((FOLDER / "aws.yaml").read_text())
    counts = made["available_node_types"]
    assert (made["max_workers"], counts[kind]["min_workers"], counts[kind]["max_workers"]) == (2, 2, 2)
    assert counts[other] == original["available_node_types"][other]
    assert (tmp_path / "out" / "on-premise.yaml").read_text() == (FOLDER / "on-premise.yaml").read_text()
    config = load_config(tmp_path / "out" / "config.yaml")
    assert (config.name, config.runtime.num_workers, config.runtime.device) == ("quickstart", 2, device)
