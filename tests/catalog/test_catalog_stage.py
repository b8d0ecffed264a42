"""The stage as a whole: content hash, both backends, resuming, the store, and the real data sets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from catalog_files import gzip_lines, ledger_rows

from genrec_dist.artifacts.store import ArtifactStore
from genrec_dist.catalog import ingest
from genrec_dist.catalog.dataset import Catalog
from genrec_dist.catalog.describe import describe
from genrec_dist.catalog.stage import catalog_stage
from genrec_dist.config import CatalogConfig, Config, RuntimeConfig, SyntheticConfig
from genrec_dist.errors import DataError
from genrec_dist.pipeline import StageContext, execute
from genrec_dist.runs import RunFolder

FILES = ("items.parquet", "sequences.parquet", "stats.json", "ledger.parquet", "ledger.json")


def content(catalog: Catalog) -> dict[str, bytes]:
    return {name: (catalog.folder / name).read_bytes() for name in FILES}


def raw_2014(folder: Path) -> Path:
    """Two review files with bad lines and repeats, and one of metadata."""
    folder.mkdir(exist_ok=True)
    for part in range(2):
        lines = [
            {"reviewerID": f"U{n % 7}", "asin": f"B{n * 3 % 11}", "unixReviewTime": 1000 - n * part} for n in range(60)
        ]
        gzip_lines(folder / f"reviews_{part}.json.gz", [*lines, "{broken", b"\xff"])
    gzip_lines(folder / "meta_X.json.gz", [f"{{'asin': 'B{n}', 'title': 'T{n}'}}" for n in range(9)] + ["{'asin': ''}"])
    return folder


def test_ray_and_plain_process_give_the_same_bytes(tmp_path, build, ray_session) -> None:
    settings = {"source": "amazon2014", "path": str(raw_2014(tmp_path / "raw")), "max_bad_fraction": 0.2}
    local, ray = build("local", **settings), build("ray", **settings)
    assert content(local) == content(ray)
    bad = [row for row in ledger_rows(ray.folder) if row[2] not in ("unknown_item", "duplicate_pair")]
    assert bad == [
        ("meta_X.json.gz", 10, "missing_field", "dropped"),
        ("reviews_0.json.gz", 61, "broken_line", "dropped"),
        ("reviews_0.json.gz", 62, "non_utf8", "dropped"),
        ("reviews_1.json.gz", 61, "broken_line", "dropped"),
        ("reviews_1.json.gz", 62, "non_utf8", "dropped"),
    ]
    (tmp_path / "raw" / "interactions.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match="Parquet"):  # the worker's own error, not Ray's wrapping of it
        build("ray", path=str(tmp_path / "raw"), items="interactions.parquet")


def test_a_killed_build_continues_to_the_same_bytes(tmp_path, build, monkeypatch) -> None:
    settings = {"source": "amazon2014", "path": str(raw_2014(tmp_path / "raw")), "max_bad_fraction": 0.2}
    whole = build(**settings)
    stage = catalog_stage(Config(catalog=CatalogConfig(**settings, min_user_interactions=0, min_item_interactions=0)))
    out = tmp_path / "resumed"
    out.mkdir()
    context = StageContext(out=out, inputs={}, runtime=RuntimeConfig(backend="local"))
    parse = ingest.parse_file
    for death in (("interactions", 1), ("items", 0), None):  # the last attempt lives

        def parse_until(path, file, source, role, death=death):
            if (role, file) == death:
                raise KeyboardInterrupt
            return parse(path, file, source, role)

        monkeypatch.setattr(ingest, "parse_file", parse_until)
        if death:
            with pytest.raises(KeyboardInterrupt):
                stage.build(context)
        else:
            stage.build(context)
    assert content(Catalog(out)) == content(whole)


def test_content_hash_follows_the_bytes_not_the_place(tmp_path) -> None:
    first = raw_2014(tmp_path / "a")
    second = tmp_path / "b"
    shutil.copytree(first, second)

    def key(path: Path, **settings) -> str:
        return catalog_stage(Config(catalog=CatalogConfig(source="amazon2014", path=str(path), **settings))).key

    assert key(first) == key(second)
    assert key(first) == key(first, order="file")  # the order is a view that readers take
    assert key(first) != key(first, duplicates="keep")
    assert key(first) == key(first, synthetic=SyntheticConfig(seed=5))
    before = key(second)
    gzip_lines(second / "meta_X.json.gz", ["{'asin': 'B1'}"])
    assert key(second) != before


def test_synthetic_stage_through_the_store(tmp_path) -> None:
    config = Config(catalog=CatalogConfig(source="synthetic", synthetic=SyntheticConfig(num_items=200, num_users=600)))
    store, run = ArtifactStore(tmp_path / "store"), RunFolder(tmp_path / "runs", "r")
    run.create(config, ["test"])
    folder = execute([catalog_stage(config)], store, run, RuntimeConfig(backend="local"))["catalog"]
    assert {path.name for path in folder.iterdir()} == {*FILES, "oracle.json", "oracle.parquet", "MANIFEST.json"}
    shown = describe(folder, num_examples=2)
    json.dumps(shown)
    assert shown["oracle"]["num_users"] == 600
    assert len(shown["items"]) == len(shown["sequences"]) == 2
    first = shown["sequences"][0]["items"]
    stamps = [item["timestamp"] for item in first]
    assert stamps == sorted(stamps)
    assert all(item["title"] for item in first)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "users", "items", "interactions", "titles", "brands"),
    [
        ("beauty", 22_363, 12_101, 198_502, 12_094, 9_991),
        ("sports", 35_598, 18_357, 296_337, 18_317, 11_040),
        ("toys", 19_412, 11_924, 167_597, 11_865, 0),
    ],
)
def test_published_statistics(real_data, build, name, users, items, interactions, titles, brands) -> None:
    catalog = build(path=str(real_data / name), min_user_interactions=5, min_item_interactions=5, max_bad_fraction=0.0)
    stats = json.loads((catalog.folder / "stats.json").read_text())
    assert (stats["num_users"], stats["num_items"], stats["num_interactions"]) == (users, items, interactions)
    assert (stats["titles"], stats["brands"]) == (titles, brands)
    assert stats["sequence_length"]["min"] == 5
    assert stats["missing_timestamps"] == (2350 if name == "toys" else 0)
    if name == "beauty":
        assert stats["users_with_tied_targets"] == 9_719
    assert ledger_rows(catalog.folder) == []


@pytest.mark.data
def test_position_of_the_real_data_is_the_time_order(real_data, tmp_path, build) -> None:
    import pyarrow.parquet as pq

    folder = tmp_path / "beauty"
    folder.mkdir()
    table = pq.read_table(real_data / "beauty" / "interactions.parquet")
    pq.write_table(table.drop_columns(["position"]), folder / "interactions.parquet")
    by_time = build(path=str(folder), items=str(real_data / "beauty" / "items.parquet"))
    by_position = build(path=str(real_data / "beauty"))
    assert (by_time.sequences.items == by_position.sequences.items).all()
