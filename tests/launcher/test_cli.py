"""Help, start-up cost, configuration commands, dry run and data commands of the real command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cli_process import REAL
from typer.testing import CliRunner

from genrec_dist import __version__
from launcher.cli import app

runner = CliRunner()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text("catalog: {source: synthetic, synthetic: {num_items: 60, num_users: 80}}\n")
    return path


def test_import_loads_nothing_heavy() -> None:
    code = (
        "import sys, launcher.cli\n"
        "print([m for m in ('torch', 'ray', 'pandas', 'numpy', 'pyarrow', 'zarr', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version() -> None:
    assert runner.invoke(app, ["--version"]).output == f"genrec {__version__}\n"


@pytest.mark.parametrize(
    "command",
    [
        "",
        "run",
        "status",
        "report",
        "recommend",
        "export",
        "submit",
        "job status",
        "job logs",
        "job stop",
        "doctor",
        "config show",
        "config validate",
        "data synth",
        "data describe",
    ],
)
def test_every_command_has_help(command: str) -> None:
    done = runner.invoke(app, [*command.split(), "--help"])
    assert done.exit_code == 0
    assert "Usage" in done.output


def test_usage_error_is_exit_2() -> None:
    assert runner.invoke(app, ["run"]).exit_code == 2
    assert runner.invoke(app, ["run", "x.yaml", "--resume", "perhaps"]).exit_code == 2


def test_config_show_resolves_every_key(small: Path) -> None:
    done = runner.invoke(app, ["config", "show", str(small), "--set", "fusion.dim=64"])
    shown = yaml.safe_load(done.output)
    assert shown["fusion"]["dim"] == 64
    assert shown["catalog"]["synthetic"]["num_items"] == 60
    assert shown["generator"]["optim"]["batch_size"] == 256


@pytest.mark.parametrize("command", [["run"], ["run", "--dry-run"], ["config", "validate"], ["config", "show"]])
def test_unknown_key_names_the_nearest_and_starts_nothing(cli, small: Path, command: list[str]) -> None:
    done = cli(*command, str(small), "--set", "generator.optim.learning_rat=1", script=REAL)
    assert done.returncode == 2
    assert "generator.optim.learning_rat: unknown key; nearest: generator.optim.learning_rate" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in cli.folder.iterdir()) == ["a.yaml", "small.yaml"]


def test_missing_data_is_exit_3_and_starts_nothing(cli, small: Path) -> None:
    done = cli("run", str(small), "--set", "catalog.source=parquet", "--set", "catalog.path=nowhere", script=REAL)
    assert done.returncode == 3
    assert "catalog.path" in done.stderr
    assert sorted(p.name for p in cli.folder.iterdir()) == ["a.yaml", "small.yaml"]


def test_batch_that_workers_cannot_share_is_refused(cli, small: Path) -> None:
    arguments = [str(small), "--set", "runtime.num_workers=3"]
    for command in (["run"], ["run", "--dry-run"], ["config", "validate"]):
        done = cli(*command, *arguments, script=REAL)
        assert done.returncode == 2
        assert "fusion.optim.batch_size" in done.stderr
        assert "255 or 258" in done.stderr


def test_config_validate_lists_the_stages(small: Path) -> None:
    done = runner.invoke(app, ["config", "validate", str(small)])
    assert done.exit_code == 0
    assert done.output.startswith("ok: small, method prorec, 9 stages")


def test_dry_run_prints_sizes_and_writes_nothing(cli, small: Path) -> None:
    done = cli("run", str(small), "--dry-run", "--set", "generator.optim.batch_size=100", script=REAL)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in cli.folder.iterdir()) == ["a.yaml", "small.yaml"]
    for text in ("catalog", "build", "~80 users", "node embeddings", "FLOP", "memory a worker", "100 samples a worker"):
        assert text in done.stdout


def test_synth_and_describe(cli, small: Path) -> None:
    done = cli("data", "synth", "--items", "60", "--users", "80", "--seed", "3", "--out", "raw", script=REAL)
    assert done.returncode == 0, done.stderr
    assert "num_interactions" in done.stdout
    assert {"meta_Synthetic.json.gz", "reviews_Synthetic_5.json.gz"} <= {p.name for p in (cli.folder / "raw").iterdir()}
    again = cli("data", "synth", "--items", "60", "--users", "80", "--out", "raw", script=REAL)
    assert again.returncode == 2
    assert "--out" in again.stderr
    plain = ["--set", "runtime.backend=local"]
    built = cli("data", "describe", "small.yaml", "--json", *plain, script=REAL)
    assert built.returncode == 0, built.stderr
    stats = json.loads(built.stdout)["stats"]
    assert 0 < stats["num_items"] <= 60
    assert "catalog: built" in built.stderr
    artifact = next((cli.folder / "store" / "catalog").glob("*/MANIFEST.json")).parent
    text = cli("data", "describe", str(artifact), script=REAL)
    assert text.returncode == 0, text.stderr
    assert f"{stats['num_interactions']:,}" in text.stdout
    exact = cli("run", "small.yaml", "--dry-run", script=REAL)
    assert f" {stats['num_users']:,} users" in exact.stdout
    assert "~" not in exact.stdout.split("Counts")[1].splitlines()[0]
    wrong = cli("data", "describe", "raw", script=REAL)
    assert wrong.returncode == 2
    assert "not a catalog artifact" in wrong.stderr


@pytest.mark.data
def test_dry_run_counts_a_parquet_pair_before_it_is_built(cli, real_data: Path) -> None:
    (cli.folder / "beauty.yaml").write_text(f"catalog: {{source: parquet, path: {real_data / 'beauty'}}}\n")
    done = cli("run", "beauty.yaml", "--dry-run", script=REAL)
    assert done.returncode == 0, done.stderr
    assert "~22,363 users, ~12,101 items, ~198,502 interactions, ~131,413 training prefixes" in done.stdout
