"""Hierarchical k-means by actors of a real Ray: the bits of one process, whoever is lost on the way."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from genrec_dist.artifacts.embeddings import write_embeddings
from genrec_dist.artifacts.files import read_json, read_jsonl
from genrec_dist.config import Config, RuntimeConfig
from genrec_dist.errors import ClusterError
from genrec_dist.identifiers.hierarchical import Subtree, TreeOptions, build_tree
from genrec_dist.identifiers.kmeans import KMeansOptions
from genrec_dist.identifiers.points import chunk_rows
from genrec_dist.identifiers.ray_crew import RayCrew
from genrec_dist.identifiers.residual import residual_kmeans
from genrec_dist.identifiers.rows import ArrayRows, RowSource
from genrec_dist.identifiers.stage import identifier_stage
from genrec_dist.identifiers.trie import Trie
from genrec_dist.pipeline import Stage, StageContext

DIM = 2048
"""So wide that a chunk has 1,024 rows: actors are processes of their own, whose constants no test can lower."""
OPTIONS = TreeOptions(8, 5, KMeansOptions(iterations=4), task_bytes=4 * DIM * 1000)


def cloud(n: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (3 * rng.standard_normal((12, DIM)))[rng.integers(12, size=n)].astype(np.float32) + rng.standard_normal(
        (n, DIM), np.float32
    )


ROWS = cloud(3500)


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    write_embeddings(folder, ROWS, rows_per_shard=500)
    return folder


@pytest.fixture(scope="module")
def wanted() -> Subtree:
    assert chunk_rows(DIM) == 1024
    return build_tree(ArrayRows(ROWS), OPTIONS)


def context(folder: Path, workers: int, **more) -> StageContext:
    folder.mkdir(parents=True, exist_ok=True)
    runtime = RuntimeConfig.model_validate({"num_workers": workers, "num_threads": 1, "device": "cpu", **more})
    return StageContext(folder, {}, runtime, events_file=folder / "events.jsonl")


def same(found: Subtree, wanted: Subtree) -> None:
    assert np.array_equal(found.codes, wanted.codes)
    assert [(s.path, s.item, s.log) for s in found.splits] == [(s.path, s.item, s.log) for s in wanted.splits]
    assert all(np.array_equal(a.centroids, b.centroids) for a, b in zip(found.splits, wanted.splits, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "resident"), [(1, 1 << 30), (2, 0), (4, 1 << 30)])
def test_one_two_and_four_actors_give_the_bits_of_one_process(tmp_path, ray_session, table, wanted, workers, resident):
    ctx = context(tmp_path, workers)
    crew = RayCrew(ctx, resident)
    try:
        same(build_tree(RowSource({"text": table}), OPTIONS, crew, ctx.scratch), wanted)
    finally:
        crew.close()
    assert read_jsonl(tmp_path / "events.jsonl") == []


def test_actors_killed_in_an_iteration_and_in_a_subtree_cost_no_bit(tmp_path, ray_session, table, wanted):
    ctx = context(tmp_path, 2)
    crew = RayCrew(ctx, 1 << 30)
    told: list[int] = []

    def kill(worker: int) -> None:
        os.kill(ray_session.get(crew.actors[worker].ready.remote()), signal.SIGKILL)
        told.append(worker)

    gather = crew._gather

    def gather_and_kill(calls):
        answers = gather(calls)
        if not told and calls[0][0] == "open":  # it has answered, but the largest value has not been told yet
            kill(0)
        return answers

    crew._gather = gather_and_kill

    def on_iteration(path, state) -> None:
        if len(state.objective) in (1, 3) and path == ():
            kill((len(told) + 1) % 2)

    def on_split(done: int) -> None:
        if len(told) == 3:
            kill(1)

    try:
        tree = build_tree(RowSource({"text": table}), OPTIONS, crew, ctx.scratch, on_split, on_iteration)
    finally:
        crew.close()
    same(tree, wanted)
    assert len(told) == 4
    lost = [event["worker"] for event in read_jsonl(tmp_path / "events.jsonl")]
    assert lost == [0, 0, 1, 1]


@pytest.mark.slow
def test_losses_beyond_the_budget_end_the_build_and_it_goes_on(tmp_path, ray_session, table, wanted):
    ctx = context(tmp_path, 2, max_preemptions=0)
    crew = RayCrew(ctx, 1 << 30)

    def kill(path, state) -> None:
        if len(state.objective) == 2:
            os.kill(ray_session.get(crew.actors[0].ready.remote()), signal.SIGKILL)

    try:
        with pytest.raises(ClusterError, match="max_preemptions"):
            build_tree(RowSource({"text": table}), OPTIONS, crew, ctx.scratch, on_iteration=kill)
    finally:
        crew.close()
    seen: list[int] = []
    crew = RayCrew(ctx, 1 << 30)
    try:
        tree = build_tree(
            RowSource({"text": table}),
            OPTIONS,
            crew,
            ctx.scratch,
            on_iteration=lambda p, s: seen.append(len(s.objective)),
        )
    finally:
        crew.close()
    same(tree, wanted)
    assert seen[0] == 3


@pytest.mark.slow
def test_residual_levels_by_actors(tmp_path, ray_session, table):
    how = {"seed": 1, "options": KMeansOptions(iterations=3)}
    wanted = residual_kmeans(ArrayRows(ROWS), 2, 8, **how)
    ctx = context(tmp_path, 2)
    crew = RayCrew(ctx, 1 << 30)
    kills = [0]

    def kill(level: int, state) -> None:
        if level == 1 and not kills[0]:
            kills[0] += 1
            os.kill(ray_session.get(crew.actors[1].ready.remote()), signal.SIGKILL)

    try:
        found = residual_kmeans(RowSource({"text": table}), 2, 8, crew=crew, on_iteration=kill, **how)
    finally:
        crew.close()
    assert np.array_equal(found.codes, wanted.codes)
    assert np.array_equal(found.codebooks, wanted.codebooks)


@pytest.mark.parametrize("tokenizer", ["hierarchical_kmeans", pytest.param("residual_kmeans", marks=pytest.mark.slow)])
def test_the_stage_gives_the_same_artifact_with_and_without_ray(tmp_path, ray_session, table, tokenizer):
    section = {"tokenizer": tokenizer, "num_clusters": 8, "num_levels": 3, "iterations": 3, "metric": "cosine"}
    config = Config.model_validate({"identifiers": section})
    stage = identifier_stage(config, {"text": Stage("text", 1, {}, {}, lambda _: None)})
    folders = {}
    for backend in ("local", "ray"):
        ctx = context(tmp_path / backend, 2, backend=backend, task_mib=1)
        ctx.inputs["text"] = table
        stage.build(ctx)
        folders[backend] = tmp_path / backend
    one, two = (Trie.load(folder) for folder in folders.values())
    assert np.array_equal(one.codes, two.codes)
    assert read_json(folders["local"] / "quality.json") == read_json(folders["ray"] / "quality.json")
    assert read_jsonl(folders["local"] / "kmeans.jsonl") == read_jsonl(folders["ray"] / "kmeans.jsonl")
    kinds = [event["event"] for event in read_jsonl(folders["ray"] / "events.jsonl")]
    assert set(kinds) == {"kmeans_iteration"}
    kept = "splits.safetensors" if tokenizer == "hierarchical_kmeans" else "codebooks.safetensors"
    assert (folders["local"] / kept).read_bytes() == (folders["ray"] / kept).read_bytes()
