"""An exported generator: the run's own, from a folder alone, where Ray and DeepSpeed cannot be imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from genrec_dist.artifacts.files import read_json, write_json
from genrec_dist.artifacts.store import MANIFEST
from genrec_dist.catalog.dataset import Catalog
from genrec_dist.config import Config
from genrec_dist.errors import ArtifactError
from genrec_dist.generator.beam import beam_search
from genrec_dist.generator.export import load_exported
from genrec_dist.generator.gpt_stage import load_gpt
from genrec_dist.generator.stage import load_model
from genrec_dist.runs import RunFolder
from genrec_dist.testing.faults import flip_byte
from genrec_dist.testing.tiny import tiny_histories, tiny_trie
from genrec_dist.testing.tiny_runs import tiny_run
from launcher.cli import app

NUM_ITEMS = 25
TRIE = tiny_trie(NUM_ITEMS, 4, seed=1)
CASES = {
    "prorec": ("prorec", {}),
    "prorec_frozen": ("prorec", {"item_embedding_rate": 0, "distill_position": "start"}),
    "prorec_codes": ("prorec", {"encoder_input": "codes", "head": "per_level", "distill_weight": 0.0}),
    "csj_id": ("csj_id", {"head": "child"}),
    "semantic_id": ("semantic_id", {"head": "per_level"}),
}
ALONE = """
import sys
sys.modules["ray"] = sys.modules["deepspeed"] = None
from pathlib import Path
import torch
from safetensors.torch import save_file
from genrec_dist.generator.beam import beam_search
from genrec_dist.generator.export import load_exported
from genrec_dist.testing.tiny import tiny_histories
torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    model = load_exported(folder / "export")
    assert not model.training
    items, scores, _ = beam_search(model, *tiny_histories(8, model.trie.num_items, 6), 10, 0.3)
    save_file({"items": items, "scores": scores}, folder / "alone.safetensors")
"""


def make_run(root: Path, case: str) -> RunFolder:
    """A finished run whose generator has random weights."""
    method, settings = CASES[case]
    return tiny_run(root, case, TRIE, method, **settings)


def model_of(run: RunFolder):
    """As `genrec recommend` loads it."""
    config, identifiers = run.config(), run.artifact("identifiers")
    if config.method == "prorec":
        return load_model(config.generator, run.artifact("fusion"), identifiers, run.artifact("generator"))
    return load_gpt(config.gpt, identifiers, run.artifact("gpt"))


def export(run: RunFolder, out: Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["export", str(run.path), "--out", str(out)])
    return done.exit_code, " ".join(done.output.split())


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """For each case a run and its export, and what a process without Ray and DeepSpeed found with it."""
    root = tmp_path_factory.mktemp("export")
    for case in CASES:
        code, text = export(make_run(root / case, case), root / case / "export")
        assert code == 0, text
        shutil.move(root / case / "store", root / case / "gone")  # nothing of the run is needed
    folders = [str(root / case) for case in CASES]
    done = subprocess.run([sys.executable, "-c", ALONE, *folders], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for case in CASES:
        shutil.move(root / case / "gone", root / case / "store")
    return root


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    """A copy of one export, to be damaged."""
    return Path(shutil.copytree(exported / "csj_id" / "export", tmp_path / "copy"))


@pytest.mark.parametrize("case", list(CASES))
def test_it_recommends_what_the_runs_model_does(exported, case):
    torch.set_num_threads(1)
    model = model_of(RunFolder(exported / case / "runs", case))
    items, scores, _ = beam_search(model, *tiny_histories(8, NUM_ITEMS, 6), 10, 0.3)
    alone = load_file(exported / case / "alone.safetensors")
    assert alone["items"].equal(items)
    assert alone["scores"].equal(scores)
    assert len(items.unique()) > 5


@pytest.mark.parametrize("case", list(CASES))
def test_what_is_in_the_folder(exported, case):
    folder, section = exported / case / "export", "generator" if case.startswith("prorec") else "gpt"
    names = {"model.safetensors", "codebook.safetensors", "items.parquet", "config.json", MANIFEST}
    assert {path.name for path in folder.iterdir()} == names | (
        {"integrated.safetensors"} if section == "generator" else set()
    )
    stored = exported / case / "store" / section / "model.safetensors"
    assert (folder / "model.safetensors").read_bytes() == stored.read_bytes()
    record = read_json(folder / "config.json")
    assert (record["method"], record["section"], record["num_items"]) == (CASES[case][0], section, NUM_ITEMS)
    assert record["keys"][section] == f"key-of-{section}"
    assert record["mix_weight"] == (0.3 if case in ("prorec", "prorec_frozen") else 0.0)  # the others have no token
    assert Catalog(folder).item_ids == [f"item-{i}" for i in range(NUM_ITEMS)]
    done = CliRunner().invoke(app, ["data", "verify", str(folder)])
    assert done.exit_code == 0, done.output


def test_a_folder_with_something_in_it_is_refused(exported, tmp_path):
    run = RunFolder(exported / "csj_id" / "runs", "csj_id")
    (tmp_path / "mine.txt").write_text("mine")
    code, text = export(run, tmp_path)
    assert code == 2
    assert "not an empty folder" in text
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_damaged_artifact_is_not_exported_and_nothing_is_left(tmp_path):
    run = make_run(tmp_path, "prorec")
    flip_byte(run.artifact("generator") / "model.safetensors")
    code, text = export(run, tmp_path / "out" / "export")
    assert code == 3
    assert "model.safetensors: SHA-256 differs" in text
    assert list((tmp_path / "out").iterdir()) == []


def test_a_run_without_a_trained_generator_is_refused(tmp_path):
    run = RunFolder(tmp_path, "other")
    run.create(Config(method="sasrec"), [])
    code, text = export(run, tmp_path / "out")
    assert code == 2
    assert "method prorec, csj_id, semantic_id" in text
    run.create(Config(method="prorec"), [])
    code, text = export(run, tmp_path / "out")
    assert code == 2
    assert "run has no such artifact" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "codebook.safetensors", "items.parquet"])
def test_a_damaged_export_is_refused(folder, name):
    flip_byte(folder / name)
    with pytest.raises(ArtifactError, match=rf"{name}: SHA-256 differs"):
        load_exported(folder)
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=rf"{name}: missing"):
        load_exported(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "format 2"),
        ({"gpt": {"dims": 8}}, "ValidationError"),
        ({"gpt": None}, "TypeError"),
        ({"shapes": {}, "section": "gpt"}, "KeyError"),
    ],
)
def test_a_configuration_of_another_version_is_refused(folder, change, said):
    write_json(folder / "config.json", read_json(folder / "config.json") | change)
    with pytest.raises(ArtifactError, match="not an exported generator") as caught:
        load_exported(folder, check=False)
    assert said in caught.value.got


@pytest.mark.parametrize("text", ["", "[]", json.dumps({"a": 1})])
def test_a_folder_that_is_no_export_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match="not an exported generator"):
        load_exported(tmp_path)
