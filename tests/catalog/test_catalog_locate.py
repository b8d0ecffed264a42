"""Where input files are looked for, and which names are taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from genrec_dist.catalog.locate import locate_inputs
from genrec_dist.config import CatalogConfig
from genrec_dist.errors import DataError


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


def names(files) -> list[str]:
    return [file.name for file in files]


@pytest.mark.parametrize(
    ("source", "present", "interactions", "items"),
    [
        (
            "parquet",
            ["interactions.parquet", "items.parquet", "b"],
            ["interactions.parquet"],
            ["items.parquet"],
        ),
        (
            "amazon2014",
            ["reviews_B_5.json.gz", "reviews_A_5.json.gz", "ratings_A.csv", "meta_A.json.gz"],
            ["reviews_A_5.json.gz", "reviews_B_5.json.gz"],
            ["meta_A.json.gz"],
        ),
        ("amazon2014", ["ratings_A.csv", "meta_A.json"], ["ratings_A.csv"], ["meta_A.json"]),
        ("amazon2018", ["A_5.json.gz", "meta_A.json.gz"], ["A_5.json.gz"], ["meta_A.json.gz"]),
        ("amazon2023", ["A.jsonl.gz", "meta_A.jsonl.gz"], ["A.jsonl.gz"], ["meta_A.jsonl.gz"]),
    ],
)
def test_usual_names_of_each_source(tmp_path, source, present, interactions, items) -> None:
    touch(tmp_path, *present)
    found = locate_inputs(CatalogConfig(source=source, path=str(tmp_path)))
    assert names(found.interactions) == interactions
    assert names(found.items) == items


def test_relative_path_is_looked_up_in_order(tmp_path, monkeypatch) -> None:
    work = touch(tmp_path / "work")
    monkeypatch.chdir(work)
    config = CatalogConfig(source="parquet", path="toys")
    pair = ("interactions.parquet", "items.parquet")
    places = [tmp_path / "shared/data/toys", work / "data/toys", tmp_path / "named/toys", work / "toys"]
    monkeypatch.setenv("GENREC_DATA", str(tmp_path / "named"))
    for place in places:  # each later place comes before the earlier ones
        touch(place, *pair)
        assert locate_inputs(config).items[0].path == place / "items.parquet"


def test_missing_folder_names_every_place(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GENREC_DATA", str(tmp_path / "named"))
    with pytest.raises(DataError) as caught:
        locate_inputs(CatalogConfig(source="parquet", path="toys"))
    for place in ("toys", "named/toys", "data/toys", "shared/data/toys"):
        assert place in str(caught.value)
    assert caught.value.exit_code == 3


def test_missing_file_names_every_pattern(tmp_path) -> None:
    touch(tmp_path, "meta_A.json.gz")
    with pytest.raises(DataError) as caught:
        locate_inputs(CatalogConfig(source="amazon2014", path=str(tmp_path)))
    assert "reviews_*.json.gz" in str(caught.value)
    assert "ratings_*.csv" in str(caught.value)


def test_globs_and_absolute_files(tmp_path) -> None:
    folder = touch(tmp_path / "set", "part-0/i.parquet", "part-1/i.parquet")
    other = touch(tmp_path / "elsewhere", "meta.parquet")
    config = CatalogConfig(
        source="parquet", path=str(folder), interactions="part-*/i.parquet", items=str(other / "meta.parquet")
    )
    found = locate_inputs(config)
    assert names(found.interactions) == ["part-0/i.parquet", "part-1/i.parquet"]
    assert found.items[0].path == other / "meta.parquet"
