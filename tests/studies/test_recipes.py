"""Frozen recipes: every file loads, names what it is in its header, and a header is whole or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from genrec_dist.config import load_config
from genrec_dist.errors import ConfigError
from genrec_dist.studies.paper import DATA_SETS, METRICS
from genrec_dist.studies.recipes import CONFIGS, ORDERS, config_file, find_recipe, read_recipe

PENDING = dict.fromkeys(("date", "hardware", "commit", "result"), "not yet run")
DONE = {
    "date": "2026-11-30",
    "hardware": "one NVIDIA H100",
    "commit": "0123456789",
    "result": ", ".join(f"{metric} 0.0{place}00 ± 0.0005" for place, metric in enumerate(METRICS, start=1)),
}


def header(folder: Path, **fields: str) -> Path:
    file = folder / "recipe.yaml"
    lines = [f"# {name}: {value}" for name, value in ({"command": "genrec reproduce prorec"} | fields).items()]
    file.write_text("\n".join(["# A title.", *lines, "method: prorec\n"]))
    return file


@pytest.mark.parametrize("data_set", DATA_SETS)
@pytest.mark.parametrize("order", ORDERS)
def test_every_frozen_recipe_loads_and_says_how_it_was_measured(data_set, order):
    path = find_recipe(data_set, order)
    config = load_config(path)
    assert (config.method, config.name) == ("prorec", f"prorec_{data_set}_{order}")
    assert (config.catalog.path, config.catalog.order) == (data_set, order)
    assert config.report.paper_table == data_set
    assert any(name != "popularity" for name in config.references)
    words = read_recipe(path).command.split()
    assert words[:3] == ["genrec", "reproduce", "prorec"]
    assert words[words.index("--data") + 1] == data_set
    assert words[words.index("--order") + 1] == order


def test_no_other_file_lies_among_the_frozen_recipes():
    wanted = {find_recipe(data_set, order).name for data_set in DATA_SETS for order in ORDERS}
    assert {path.name for path in (CONFIGS / "frozen").iterdir()} == wanted


def test_a_filled_header_is_read(tmp_path):
    recipe = read_recipe(header(tmp_path, **DONE))
    assert recipe.date == "2026-11-30"
    assert recipe.commit == "0123456789"
    assert recipe.result == dict(zip(METRICS, [(0.01, 0.0005), (0.02, 0.0005), (0.03, 0.0005), (0.04, 0.0005)]))
    assert read_recipe(header(tmp_path, **PENDING)).result is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (PENDING | {"command": "make it so"}, "command: make it so"),
        ({name: PENDING[name] for name in ("date", "hardware", "commit")}, "no result"),
        (PENDING | {"date": "2026-11-30"}, "in hardware, commit, result only"),
        (DONE | {"date": "yesterday"}, "date: yesterday"),
        (DONE | {"commit": "main"}, "commit: main"),
        (DONE | {"result": "recall@10 0.09 ± 0.01"}, "result: recall@10"),
    ],
)
def test_half_a_header_is_refused(tmp_path, fields, said):
    with pytest.raises(ConfigError, match=said):
        read_recipe(header(tmp_path, **fields))


def test_the_folder_of_the_call_comes_before_the_programs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_file("quickstart.yaml") == CONFIGS / "quickstart.yaml"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").touch()
    assert config_file("quickstart.yaml") == Path("configs/quickstart.yaml")
