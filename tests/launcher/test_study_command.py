"""`genrec study`: refusals before anything starts, and a tiny real study that a second call only reuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from markupsafe import escape
from tiny_study import tiny_config
from typer.testing import CliRunner

from genrec_dist.artifacts.files import read_json, read_jsonl
from genrec_dist.studies import catalogue
from launcher.cli import app

runner = CliRunner()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scratch folder with tiny.yaml, whose text embeddings come from a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_config(tmp_path)))
    return tmp_path


def test_unknown_study_names_the_nearest() -> None:
    done = runner.invoke(app, ["study", "csj-man"])
    assert done.exit_code == 2
    assert "nearest: csj-main" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["clusters", "tiny.yaml", "--seeds", "0,x"], "not seeds"),
        (["clusters", "tiny.yaml", "--seeds", "1,01"], "not seeds"),
        (["clusters", "tiny.yaml", "--data", "toys"], "two configurations"),
        (["clusters", "tiny.yaml", "--set", "identifiers.num_clusters=9"], "the study sets this itself"),
        (["clusters", "tiny.yaml", "--set", "seed=9", "--seeds", "1"], "the study sets this itself"),
        (["clusters", "tiny.yaml", "--identifiers-only"], "csj-lambda"),
        (["clusters", "tiny.yaml", "--set", "fusion.dims=9"], "nearest: fusion.dim"),
        (["clusters", "tiny.yaml", "--report-only"], "the study has no run yet"),
        (["clusters", "none.yaml"], "no such configuration file"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_starts(here: Path, arguments: list[str], said: str) -> None:
    done = runner.invoke(app, ["study", *arguments])
    assert done.exit_code == 2
    assert said in done.stderr
    assert not (here / "store").exists()
    assert not (here / "runs").exists()


def test_dry_run_counts_a_shared_stage_once(here: Path) -> None:
    done = runner.invoke(app, ["study", "csj-unique", "tiny.yaml", "--dry-run"], env={"COLUMNS": "160"})
    assert done.exit_code == 0
    lines = [line.strip().split(maxsplit=3) for line in done.stdout.splitlines() if line.startswith("csj-unique-tiny")]
    assert lines[0][:2] == ["csj-unique-tiny-csj_id-s0", "6"]
    assert lines[0][3] == "catalog, semantic, graph, partitions, lightgcn, identifiers"
    assert lines[1][1:] == ["1", "2", "identifiers"]
    assert not (here / "store").exists()


def test_a_second_call_reuses_everything(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = catalogue.STUDIES["tokenizers"]
    monkeypatch.setitem(
        catalogue.STUDIES, "tokenizers", replace(study, variants=(study.variants[0], study.variants[2]))
    )
    call = ["study", "tokenizers", "tiny.yaml"]
    first = runner.invoke(app, call)
    assert first.exit_code == 0, first.stderr
    names = [f"tokenizers-tiny-{variant}-s0" for variant in ("hierarchical_kmeans", "random")]
    assert [kinds(here, name).count("stage_built") for name in names] == [6, 3]  # the second takes what they share
    record = read_json(here / "runs" / "tokenizers-tiny" / "study.json")
    for name, row in zip(names, record["tables"]["tokenizers"], strict=False):
        metrics = read_json(here / "runs" / name / "metrics.json")["main"]["test"]
        assert row["values"]["recall@20"]["mean"] == metrics["recall@20"]
    assert str(escape(record["verdict"]["sentence"])) in (here / "runs" / "tokenizers-tiny" / "study.html").read_text()

    second = runner.invoke(app, call)
    assert second.exit_code == 0, second.stderr
    assert [kinds(here, name).count("stage_built") for name in names] == [0, 0]
    assert [kinds(here, name).count("stage_reused") for name in names] == [6, 6]
    assert read_json(here / "runs" / "tokenizers-tiny" / "study.json")["tables"] == record["tables"]

    (here / "runs" / "tokenizers-tiny" / "study.html").unlink()
    assert runner.invoke(app, [*call, "--report-only"]).exit_code == 0
    assert (here / "runs" / "tokenizers-tiny" / "study.html").exists()
    other = runner.invoke(app, [*call, "--report-only", "--set", "fusion.dim=16"])
    assert other.exit_code == 2
    assert "fusion.dim = 8" in other.stderr


def test_identifiers_only_ends_early_and_leaves_a_whole_run_as_it_is(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = catalogue.STUDIES["csj-lambda"]
    monkeypatch.setitem(catalogue.STUDIES, "csj-lambda", replace(study, variants=study.variants[2:3]))
    call = ["study", "csj-lambda", "tiny.yaml", "--identifiers-only", "--set", "identifiers.tokenizer=rqvae"]
    done = runner.invoke(app, call)
    assert done.exit_code == 0, done.stderr
    run = here / "runs" / "csj-lambda-tiny-lambda-0.5-s0"
    assert "gpt" not in read_json(run / "artifacts.json")
    values = read_json(here / "runs" / "csj-lambda-tiny" / "study.json")["tables"]["lambda"][0]["values"]
    assert values["total"]["mean"] > 0
    assert values["recall@10"] is None
    (run / "metrics.json").write_text("{}")  # as a whole run leaves one
    before = (run / "events.jsonl").read_bytes()
    again = runner.invoke(app, call)
    assert "left as it is" in again.stdout
    assert (run / "events.jsonl").read_bytes() == before


def kinds(here: Path, name: str) -> list[str]:
    """Events of a run's last command."""
    events = [event["event"] for event in read_jsonl(here / "runs" / name / "events.jsonl")]
    return events[len(events) - events[::-1].index("run_started") :]
