"""`genrec reproduce`: what is planned and refused before anything starts, and a tiny real reproduction (slow)."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tiny_study import OPTIM, tiny_config
from typer.testing import CliRunner

from genrec_dist.artifacts.files import read_json, read_jsonl
from launcher.cli import app
from launcher.reproduce import make_plan

HEADER = "# command: genrec reproduce prorec\n" + "".join(
    f"# {field}: not yet run\n" for field in ("date", "hardware", "commit", "result")
)
runner = CliRunner()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scratch folder with frozen recipes and CSJ-ID configurations of its own, all tiny."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs" / "frozen"
    folder.mkdir(parents=True)
    values = tiny_config(tmp_path) | {"references": ["sasrec_cosine"], "sasrec": {"dim": 8, "optim": OPTIM}}
    for seed, data_set in enumerate(("beauty", "sports", "toys")):
        values["catalog"] = {"source": "synthetic", "synthetic": {"num_items": 60, "num_users": 80, "seed": seed}}
        values["report"] = {"tsne_items": 0, "paper_table": data_set}
        for order in ("time", "file"):
            values["catalog"] = values["catalog"] | {"order": order}
            (folder / f"prorec_{data_set}_{order}.yaml").write_text(HEADER + yaml.safe_dump(values))
        values["catalog"] = values["catalog"] | {"order": "time"}
        (folder.parent / f"csj_id_{data_set}.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def planned(paper: str, asked: list[str], data: str | None = None, order: str = "time", seeds: str = "0"):
    return make_plan(paper, asked, data, order, [], seeds, {})


def test_by_default_a_table_is_run_on_what_its_paper_prints(here: Path) -> None:
    asked = ["Table 3", "Table 6"]
    plan = planned("prorec", asked, order="both", seeds="0,1,2")
    found = [(item.title, item.data_set, item.order) for item in plan.items]
    assert found == [
        ("Table 3", data, order) for data in ("beauty", "sports", "toys") for order in ("time", "file")
    ] + [("Table 6", "beauty", order) for order in ("time", "file")]
    names = [run.config.name for run in plan.runs]
    assert len(names) == len(set(names)) == 6 * 3 + 2 * 3 * 3  # Table 6 takes its row with both tasks from Table 3
    assert "performance-prorec_toys_file-prorec-s2" in names
    everywhere = planned("prorec", asked, data="all")
    assert [item.data_set for item in everywhere.items if item.title == "Table 6"] == ["beauty", "sports", "toys"]


def test_rows_that_are_the_same_run_are_made_once(here: Path) -> None:
    plan = planned("prorec", ["Table 3", "Table 4", "Table 5", "Table 6", "Figure 9"], data="beauty")
    by_table = {item.title: {run.variant.name: run.config.name for run in item.plan.runs} for item in plan.items}
    own = "performance-prorec_beauty_time-prorec-s0"
    assert own == by_table["Table 3"]["prorec"] == by_table["Table 5"]["ours"] == by_table["Table 6"]["both"]
    assert own == by_table["Table 4"]["ours"]  # which ends early: a part of the whole run
    assert by_table["Table 4"]["concat"] == by_table["Table 5"]["concat"] == by_table["Table 6"]["neither"]
    assert by_table["Figure 9"]["k512"] == "clusters-prorec_beauty_time-k512-s0"
    assert len(plan.runs) == 1 + 3 + 2 + 3


def test_csj_id_is_its_studies(here: Path) -> None:
    plan = planned("csj_id", [], order="both")
    assert [item.plan.name for item in plan.items[::2]] == ["csj-main", "csj-lambda", "csj-unique", "csj-tsne"]
    assert {item.plan.base.name for item in plan.items} == {"csj_id_beauty", "csj_id_beauty_file"}
    assert {item.plan.base.catalog.order for item in plan.items if item.order == "file"} == {"file"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prorec", "--table", "7"], "Table 3, Table 4"),
        (["prorec", "--figure", "6"], "Figure 7, Figure 8"),
        (["csj_id", "--table", "1"], "numbers neither"),
        (["prorec", "--set", "catalog.order=file"], "use --order and --data"),
        (["prorec", "--table", "5", "--set", "generator.distill_weight=0"], "the study sets this itself"),
        (["prorec", "--table", "3", "--seeds", "a"], "not seeds"),
        (["prorec", "--table", "3", "--encoder", "e5=x"], "only Figure 7"),
        (["prorec", "--figure", "7", "--encoder", "e5"], "NAME=PATH"),
        (["prorec", "--table", "3", "--report-only"], "no run yet"),
        (["prorec", "--table", "3", "--parallel", "2", "--set", "runtime.backend=ray"], "runtime.backend=local"),
    ],
)
def test_what_cannot_be_reproduced_is_refused_before_anything_starts(
    here: Path, arguments: list[str], said: str
) -> None:
    done = runner.invoke(app, ["reproduce", *arguments])
    assert done.exit_code == 2
    assert said in done.stderr
    assert not (here / "store").exists()
    assert not (here / "runs").exists()


def test_a_recipe_with_half_a_header_is_refused_before_anything_starts(here: Path) -> None:
    file = here / "configs" / "frozen" / "prorec_toys_time.yaml"
    file.write_text(file.read_text().replace("# date: not yet run", "# date: 2026-11-30"))
    done = runner.invoke(app, ["reproduce", "prorec", "--table", "3"])
    assert done.exit_code == 2
    assert "header of a frozen recipe" in done.stderr


def test_dry_run_names_encoders_whose_weights_are_not_here(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "cache"))
    call = ["reproduce", "prorec", "--figure", "7", "--order", "time", "--seeds", "0", "--dry-run"]
    call += ["--set", "semantic.engine=transformers", "--encoder", f"bert={here / 'vectors.parquet'}"]
    done = runner.invoke(app, call, env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.stderr
    assert "Llama2-7b: the weights of meta-llama/Llama-2-7b-hf are not on this machine; `hf download" in done.stdout
    assert done.stdout.count("not on this machine, see below") == 2
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("encoders-")}
    assert "semantic, fusion" in rows["encoders-prorec_beauty_time-bert-s0"]


@pytest.mark.slow
def test_a_tiny_reproduction_with_two_runs_at_once(here: Path) -> None:
    call = ["reproduce", "prorec", "--table", "4", "--table", "6", "--data", "beauty", "--order", "time"]
    call += ["--seeds", "0", "--parallel", "2"]
    done = runner.invoke(app, call)
    assert done.exit_code == 0, done.output
    record = read_json(here / "runs" / "reproduce-prorec" / "reproduce.json")
    assert [part["item"] for part in record["parts"]] == ["Table 4", "Table 6"]
    assert not any(part["missing"] for part in record["parts"])
    rows = record["parts"][1]["tables"]["tasks"]
    assert rows[0]["values"]["recall@10"]["mean"] > 0
    assert record["parts"][0]["verdict"]["holds"] in ("yes", "no", "in part")
    built = [
        (event["stage"], event["key"])
        for file in (here / "runs").glob("*/events.jsonl")
        for event in read_jsonl(file)
        if event["event"] == "stage_built"
    ]
    assert len(built) == len(set(built))  # nothing that two runs share was built twice
    assert len(list((here / "runs").glob("tasks-*"))) == 4
    assert not list((here / "runs").glob("similarity-*"))  # both are part of whole runs

    again = runner.invoke(app, [*call[:-2], "--report-only"])
    assert again.exit_code == 0, again.output
    assert "page: " in again.stdout
