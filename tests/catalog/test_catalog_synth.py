"""The synthetic catalog: determinism, the planted structure, and the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from catalog_files import sequences_by_id

from genrec_dist.catalog import synth, synth_world
from genrec_dist.catalog.synth import write_synthetic
from genrec_dist.catalog.synth_world import make_users, make_world, next_item_probabilities
from genrec_dist.errors import ConfigError


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def default(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("synthetic")
    return folder, write_synthetic(folder, 1200, 3000, 0)


def test_a_seed_fixes_every_byte(tmp_path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_synthetic(tmp_path / name, 60, 100, seed)
    first, again, other = (all_bytes(tmp_path / name) for name in "abc")
    assert set(first) == {"reviews_Synthetic_5.json.gz", "meta_Synthetic.json.gz", "oracle.json", "oracle.parquet"}
    assert first == again
    assert all(first[name] != other[name] for name in first)


def test_more_users_leave_the_first_block_as_it_is(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(synth, "BLOCK", 64)
    write_synthetic(tmp_path / "few", 60, 64, 0)
    write_synthetic(tmp_path / "many", 60, 150, 0)
    few = pq.read_table(tmp_path / "few" / "oracle.parquet").to_pylist()
    many = pq.read_table(tmp_path / "many" / "oracle.parquet").to_pylist()
    assert len(many) == 150
    assert many[:64] == few


def test_too_small() -> None:
    with pytest.raises(ConfigError):
        write_synthetic("unused", 49, 100, 0)


def test_oracle_recall_is_what_its_probabilities_promise(default) -> None:
    _, oracle = default
    users, expected = oracle["oracle_users"], oracle["expected_recall@10"]
    assert users == 3000
    assert abs(oracle["recall@10"] - expected) < 4 * np.sqrt(expected * (1 - expected) / users)
    assert 0.25 < oracle["recall@10"] < 0.45
    assert oracle["recall@1"] < oracle["recall@5"] < oracle["recall@10"] < oracle["recall@20"]


def test_oracle_table_agrees_with_the_reported_metrics(default) -> None:
    folder, oracle = default
    ranks = pq.read_table(folder / "oracle.parquet")["rank"].to_numpy()
    assert (ranks <= 10).mean() == oracle["recall@10"]
    assert np.where(ranks <= 20, 1 / np.log2(1 + ranks), 0).mean() == pytest.approx(oracle["ndcg@20"])
    assert json.loads((folder / "oracle.json").read_text()) == oracle


def test_probabilities_are_those_of_the_sampler() -> None:
    """Draw the next item of one user many times and compare with the formula."""
    world = make_world(60, 1)
    user = make_users(world, 0, 1)
    history = user.items[0, :6]
    chance = next_item_probabilities(world, user.taste_leaves[0], user.taste[0], user.style[0], history)
    assert chance.sum() == pytest.approx(1)
    assert (chance[history] == 0).all()
    draws = 200_000
    repeat = [np.repeat(part, draws, axis=0) for part in (user.taste_leaves, user.taste, user.style)]
    drawn = synth_world._step(world, np.tile(history, (draws, 1)), *repeat, np.random.default_rng(0))
    seen = np.bincount(drawn, minlength=60)
    expected = chance * draws
    likely = expected > 0
    chi_square = ((seen - expected)[likely] ** 2 / expected[likely]).sum()
    assert seen[~likely].sum() == 0
    assert chi_square < likely.sum() + 5 * np.sqrt(2 * likely.sum())


def test_used_up_leaves_get_no_probability() -> None:
    world = make_world(60, 1)
    user = make_users(world, 0, 1)
    leaf = user.taste_leaves[0, 0]
    whole_leaf = np.flatnonzero(world.leaf == leaf)
    chance = next_item_probabilities(world, user.taste_leaves[0], user.taste[0], user.style[0], whole_leaf)
    assert chance[whole_leaf].sum() == 0
    assert chance.sum() == pytest.approx(1)


def test_users_never_repeat_and_days_increase() -> None:
    users = make_users(make_world(50, 0), 0, 2000)  # few items: leaves are used up on the way
    for items, days, length in zip(users.items, users.days, users.lengths):
        assert len(set(items[:length].tolist())) == length
        assert (items[length:] == -1).all()
        assert (np.diff(days) > 0).all()
    assert users.lengths.min() == 5
    assert users.lengths.max() == 25


def test_structure_survives_the_catalog_stage(default, build) -> None:
    folder, oracle = default
    catalog = build(source="amazon2014", path=str(folder), min_user_interactions=5, min_item_interactions=5)
    sequences = catalog.sequences
    assert sequences.num_users > 0.98 * 3000
    assert sequences.num_items > 0.98 * 1200
    assert len(sequences.items) > 0.98 * oracle["num_interactions"]
    assert 8 < sequences.lengths.mean() < 10
    assert not sequences.tied_users().any()

    train_end, _, test = sequences.split_ends()
    parts = [sequences.items[a:b] for a, b in zip(sequences.indptr[:-1], train_end)]
    counts = np.bincount(np.concatenate(parts), minlength=sequences.num_items)
    popular = np.argsort(-counts)[:10]
    targets, last = sequences.items[test], sequences.items[test - 1]
    assert np.isin(targets, popular).mean() < 0.06

    # order matters: what follows in the training parts beats popularity by far
    follows: dict[int, dict[int, int]] = {}
    for part in parts:
        for a, b in zip(part[:-1].tolist(), part[1:].tolist()):
            follows.setdefault(a, {})[b] = follows.setdefault(a, {}).get(b, 0) + 1
    hits = 0
    for before, target in zip(last.tolist(), targets.tolist()):
        counted = follows.get(before, {})
        hits += target in sorted(counted, key=counted.get, reverse=True)[:10]
    assert hits / len(targets) > 0.12


def test_oracle_targets_are_the_last_items_of_the_catalog(default, build) -> None:
    folder, _ = default
    catalog = build(source="amazon2014", path=str(folder))
    ends = {user: items[-1] for user, items in sequences_by_id(catalog).items()}
    rows = pq.read_table(folder / "oracle.parquet").to_pylist()
    assert all(ends[row["user_id"]] == row["item_id"] for row in rows)


def test_text_reflects_the_structure(default, build) -> None:
    folder, _ = default
    catalog = build(source="amazon2014", path=str(folder))
    items = pq.read_table(catalog.folder / "items.parquet").to_pylist()
    for item in items:
        (path,) = item["categories"]
        leaf = path.split(" > ")[2]
        assert leaf in item["title"]
        assert " & " in item["title"]
        assert item["brand"] is None or item["title"].startswith(item["brand"])
    tops_of_brand: dict[str, set[str]] = {}
    for item in items:
        if item["brand"]:
            tops_of_brand.setdefault(item["brand"], set()).add(item["categories"][0].split(" > ")[0])
    assert all(len(tops) == 1 for tops in tops_of_brand.values())
    assert len(tops_of_brand) > 20
