"""Trees of codes: whoever builds them, interrupted or not; and codes for items that came later."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import mixture

from genrec_dist.artifacts.embeddings import write_embeddings
from genrec_dist.errors import ArtifactError, DataError
from genrec_dist.identifiers import points as points_module
from genrec_dist.identifiers.crew import LocalCrew
from genrec_dist.identifiers.hierarchical import Subtree, TreeOptions, build_tree, child_seed, load_state, save_state
from genrec_dist.identifiers.kmeans import KMeansOptions, KMeansState, kmeans
from genrec_dist.identifiers.residual import residual_kmeans
from genrec_dist.identifiers.rows import ArrayRows, FileRows, Part, RowSource, parts_by_cluster, write_by_cluster
from genrec_dist.identifiers.tree import Splits, _free_below, extend_codes
from genrec_dist.identifiers.trie import Trie, build_trie


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(points_module, "CHUNK_BYTES", 1)


cloud = partial(mixture, dim=5)


def stored(folder: Path, rows: np.ndarray) -> RowSource:
    write_embeddings(folder, rows, rows_per_shard=300)
    return RowSource({"text": folder})


def same(one: Subtree, other: Subtree) -> None:
    assert np.array_equal(one.codes, other.codes)
    assert np.array_equal(one.depth, other.depth)
    assert [(s.path, s.item, s.log) for s in one.splits] == [(s.path, s.item, s.log) for s in other.splits]
    assert all(np.array_equal(a.centroids, b.centroids) for a, b in zip(one.splits, other.splits, strict=True))


OPTIONS = KMeansOptions(iterations=5)


@pytest.mark.parametrize("balanced", [False, True])
def test_memory_files_threads_and_task_sizes_change_nothing(tmp_path, balanced):
    rows = cloud(2000)
    kind = KMeansOptions(iterations=5, balanced=balanced)
    whole = build_tree(ArrayRows(rows), TreeOptions(8, 3, kind))
    source = stored(tmp_path / "table", rows)
    for task_bytes, resident, threads in ((0, 1 << 30, 1), (6000, 0, 2), (2000, 0, 1), (6000, 1 << 30, 3)):
        scratch = tmp_path / f"{task_bytes}-{resident}-{threads}"
        options = TreeOptions(8, 3, kind, task_bytes)
        same(build_tree(source, options, LocalCrew(threads, resident), scratch), whole)
        assert (scratch / "rows").exists() == (resident == 0)
    assert whole.codes.shape[1] >= 4


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 90), k=st.integers(2, 9), seed=st.integers(0, 5), distinct=st.integers(1, 90))
def test_every_item_has_one_leaf_and_sizes_add_up(n, k, seed, distinct):
    rows = cloud(n)[np.arange(n) % distinct]
    tree = build_tree(ArrayRows(rows), TreeOptions(k, seed, OPTIONS, task_bytes=100))
    assert ((tree.codes >= 0) == (np.arange(tree.codes.shape[1]) < tree.depth[:, None])).all()
    assert tree.codes.max() < k
    trie = build_trie(tree.codes, tree.depth)  # refuses codes that are not unique, and prefixes of one another
    assert sorted(trie.node_item[trie.node_item >= 0].tolist()) == list(range(n))
    for level in range(tree.codes.shape[1]):
        reached = trie.item_path[tree.depth > level, level]
        assert len(reached) == (tree.depth > level).sum()
        assert (trie.level[reached] == level + 1).all()
    for split in tree.splits:
        inside = (tree.codes[:, : len(split.path)] == np.array(split.path, int)).all(1)
        assert inside[split.item]
        assert inside.sum() == split.log["rows"] > k
        sizes = np.bincount(tree.codes[inside, len(split.path)])
        assert split.codes.tolist() == np.flatnonzero(sizes > 1).tolist()
        assert len(split.centroids) == len(split.codes)


@pytest.mark.parametrize("task_bytes", [0, 1 << 30])
@pytest.mark.parametrize("balanced", [False, True])
def test_rows_that_are_alike_are_shared_out_evenly(task_bytes, balanced):
    """4,000 times one row, and 100 others: a tree of the least depth, not a comb."""
    rows = np.concatenate([np.full((4000, 5), 0.3, np.float32), cloud(100)])
    options = KMeansOptions(iterations=5, balanced=balanced)
    tree = build_tree(ArrayRows(rows), TreeOptions(8, 0, options, task_bytes))
    assert tree.depth.max() <= 8  # a comb would have hundreds of levels
    build_trie(tree.codes, tree.depth)
    alone = build_tree(ArrayRows(rows[:4000]), TreeOptions(8, 0, options, task_bytes))
    assert alone.depth.max() == 4
    assert np.bincount(alone.codes[:, 0]).tolist() == [500] * 8


def test_a_node_is_one_kmeans_seeded_by_its_path():
    rows = cloud(900)
    tree = build_tree(ArrayRows(rows), TreeOptions(6, 11, OPTIONS, task_bytes=1))
    below = tree.codes[:, 0] == 2
    assert below.sum() > 6
    found = kmeans(rows[below], 6, OPTIONS, seed=child_seed(11, 2))
    assert np.array_equal(found.labels, tree.codes[below, 1])


class Stopped(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("when", [2, 5, 7, 13])
def test_a_killed_build_goes_on_where_it_was(tmp_path, monkeypatch, when, balanced):
    """Killed after an iteration of a node, or after a subtree; the rest gives the bits of an uninterrupted build."""
    rows, kind = cloud(2000), KMeansOptions(iterations=5, balanced=balanced, num_starts=2)
    options = TreeOptions(8, 3, kind, task_bytes=8000)
    source = stored(tmp_path / "table", rows)
    whole = build_tree(ArrayRows(rows), options)
    seen: list = []

    def count(*what) -> None:
        seen.append(what)
        if len(seen) == when:
            raise Stopped

    with pytest.raises(Stopped):
        build_tree(source, options, LocalCrew(1, 0), tmp_path / "scratch", count, count)
    assigned = []
    assign = points_module.LocalPoints.assign
    monkeypatch.setattr(
        points_module.LocalPoints, "assign", lambda self, *a: (assigned.append(self.num_rows), assign(self, *a))[1]
    )
    same(build_tree(source, options, LocalCrew(2, 0), tmp_path / "scratch"), whole)
    if not balanced:  # which makes several passes an iteration
        assert sum(rows == 2000 for rows in assigned) == max(0, 11 - when)


def test_a_damaged_or_cut_scratch_file_is_made_again(tmp_path):
    rows, options = cloud(1500), TreeOptions(8, 3, OPTIONS, task_bytes=8000)
    source = stored(tmp_path / "table", rows)
    whole = build_tree(ArrayRows(rows), options)
    build_tree(source, options, LocalCrew(1, 0), tmp_path / "scratch")
    files = [f for f in (tmp_path / "scratch").iterdir() if f.is_file()]
    assert len(files) > 8
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    same(build_tree(source, options, LocalCrew(1, 0), tmp_path / "scratch"), whole)


def test_a_build_holds_no_file_per_subtree_open(tmp_path):
    rows, options = cloud(3000), TreeOptions(8, 3, OPTIONS, task_bytes=4000)
    tree = build_tree(stored(tmp_path / "table", rows), options, LocalCrew(1, 0), tmp_path / "scratch")
    files = len(list((tmp_path / "scratch").glob("subtree*.safetensors")))
    held = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_link(fd)]
    assert files > 20
    assert not [name for name in held if name.startswith(str(tmp_path / "scratch"))]
    same(tree, build_tree(ArrayRows(rows), options))


def _is_link(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_parts_of_a_table_that_is_streamed_do_not_pile_up_in_memory(tmp_path, monkeypatch):
    """Clusters that would fit are written to files too, or all of them together would be the table in memory."""
    rows, options = cloud(3000), TreeOptions(8, 3, OPTIONS, task_bytes=2000)
    sources = []
    grow_all = LocalCrew.grow
    monkeypatch.setattr(
        LocalCrew,
        "grow",
        lambda self, jobs, work: (sources.extend(j.source for j in jobs), grow_all(self, jobs, work))[1],
    )
    build_tree(stored(tmp_path / "table", rows), options, LocalCrew(1, 30_000), tmp_path / "scratch")
    assert len(sources) > 20
    assert all(isinstance(source, RowSource) for source in sources)


def test_state_survives_its_file(tmp_path):
    best = KMeansState(cloud(4, seed=1), 0, [2.0], [1.0], [0])
    state = KMeansState(cloud(4), 1, [3.5, 1.25], [1.0, 2.0], [0, 3], best)
    save_state(state, tmp_path / "state.safetensors")
    found = load_state(tmp_path / "state.safetensors")
    assert found is not None
    assert np.array_equal(found.centroids, state.centroids)
    assert (found.start, found.objective, found.imbalance, found.splits) == (1, [3.5, 1.25], [1.0, 2.0], [0, 3])
    assert found.best is not None
    assert np.array_equal(found.best.centroids, best.centroids)
    assert found.best.objective == [2.0]
    assert load_state(tmp_path / "none") is None


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 60), k=st.integers(1, 6), at_once=st.integers(1, 70), files=st.integers(1, 3))
def test_rows_written_by_cluster_are_read_in_their_order(tmp_path_factory, n, k, at_once, files):
    rows, labels = cloud(max(1, n))[:n], np.random.default_rng(n).integers(k, size=n)
    folder = tmp_path_factory.mktemp("rows")
    names, sizes = [], []
    for number, (part, label) in enumerate(
        zip(np.array_split(rows, files), np.array_split(labels, files), strict=True)
    ):
        names.append(folder / f"{number}.f32")
        sizes.append(write_by_cluster(ArrayRows(part), label, k, names[-1], at_once))
    for cluster, parts in enumerate(parts_by_cluster(names, sizes)):
        found = FileRows(parts, 5)
        wanted = rows[labels == cluster]
        assert np.array_equal(found.read(0, found.num_rows), wanted)
        if len(wanted) > 2:
            assert np.array_equal(found.read(1, len(wanted) - 1), wanted[1:-1])
            assert np.array_equal(found.take(np.array([2, 0])), wanted[[2, 0]])


def test_a_cut_file_of_rows_is_named(tmp_path):
    file = tmp_path / "rows.f32"
    cloud(10).tofile(file)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ArtifactError, match=r"rows\.f32"):
        FileRows([Part(str(file), 0, 10)], 5).read(0, 10)


def test_residual_levels_from_memory_and_from_files_and_after_a_kill(tmp_path):
    rows = cloud(1200)
    source = stored(tmp_path / "table", rows)
    whole = residual_kmeans(ArrayRows(rows), 3, 8, seed=4, options=OPTIONS)
    streamed = residual_kmeans(source, 3, 8, seed=4, options=OPTIONS, crew=LocalCrew(2, 0))
    assert np.array_equal(whole.codes, streamed.codes)
    assert np.array_equal(whole.codebooks, streamed.codebooks)

    def stop(level: int, state: KMeansState) -> None:
        if level == 1 and len(state.objective) == 3:
            raise Stopped

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(Stopped):
        residual_kmeans(source, 3, 8, seed=4, options=OPTIONS, scratch=scratch, on_iteration=stop)
    levels: list[int] = []
    again = residual_kmeans(
        source, 3, 8, seed=4, options=OPTIONS, scratch=scratch, on_iteration=lambda level, _: levels.append(level)
    )
    assert np.array_equal(whole.codes, again.codes)
    assert set(levels) == {1, 2}
    assert levels.count(1) == len(whole.logs[1]["objective"]) - 1 - 3
    left = rows - whole.codebooks[0][whole.codes[:, 0]]
    assert np.square(left).sum() == pytest.approx(whole.logs[0]["objective"][-1], rel=1e-4)


# New items


def grown(folder: Path, rows: np.ndarray, k: int, metric: str = "euclidean") -> tuple[Splits, Trie]:
    options = KMeansOptions(iterations=5, metric=metric)
    tree = build_tree(ArrayRows(rows), TreeOptions(k, 0, options))
    return Splits.write(folder, tree.splits, k, metric, rows.shape[1]), build_trie(tree.codes, tree.depth)


def check_extension(trie: Trie, found, new: int, k: int) -> None:
    old = trie.num_items
    width = trie.codes.shape[1]
    assert np.array_equal(found.codes[:old, :width], trie.codes)
    assert found.report["changed"] == 0
    assert found.codes.max() < k
    both = build_trie(found.codes, found.depth)  # unique, and no code is the beginning of another
    assert both.num_items == old + new


@settings(max_examples=30, deadline=None)
@given(old=st.integers(2, 120), new=st.integers(0, 40), k=st.integers(3, 9), seed=st.integers(0, 3))
def test_new_items_get_codes_of_their_own_and_no_old_code_changes(tmp_path_factory, old, new, k, seed):
    splits, trie = grown(tmp_path_factory.mktemp("tree"), cloud(old, seed=seed), k)
    rows = cloud(new, seed=seed + 100) if new else np.empty((0, 5), np.float32)
    free = _free_below(splits, trie)[0]
    if new > free:
        with pytest.raises(DataError, match="free codes"):
            extend_codes(splits, trie, rows)
        return
    found = extend_codes(splits, trie, rows)
    check_extension(trie, found, new, k)
    assert found.report["free_codes_before"] - new == found.report["free_codes_after"]


def test_a_copy_of_an_item_joins_its_cluster(tmp_path):
    rows = cloud(600)
    splits, trie = grown(tmp_path, rows, 64)
    trie.save(tmp_path)
    splits, trie = Splits.load(tmp_path), Trie.load(tmp_path)
    chosen = np.flatnonzero(trie.depth == 2)[:200:7]
    found = extend_codes(splits, trie, rows[chosen])
    check_extension(trie, found, len(chosen), 64)
    assert (found.codes[600:, 0] == trie.codes[chosen, 0]).all()
    assert found.report["off_nearest_path"] == 0
    again = extend_codes(splits, build_trie(found.codes, found.depth), rows[chosen])  # and once more
    check_extension(build_trie(found.codes, found.depth), again, len(chosen), 64)
    assert (again.codes[-len(chosen) :, 0] == trie.codes[chosen, 0]).all()


def test_a_full_cluster_sends_new_items_to_the_next_nearest():
    rows = np.concatenate([np.zeros((4, 2)), np.full((3, 2), 10.0), np.full((2, 2), 30.0)]).astype(np.float32)
    rows += np.arange(9)[:, None].astype(np.float32) / 100
    centroids = np.array([[0, 0], [10, 10], [30, 30]], np.float32)
    splits = Splits(4, "euclidean", np.array([0]), np.array([0], np.int32), np.array([0, 3]), np.arange(3), centroids)
    codes = np.array([[0, 0], [0, 1], [0, 2], [0, 3], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1]], np.int32)
    trie = build_trie(codes, np.full(9, 2, np.int32))
    found = extend_codes(splits, trie, np.array([[1, 1], [0.5, 0.5], [29, 29]], np.float32))
    # cluster 0 is full, cluster 1 has room for one: (1, 1) loses more by going on to cluster 2 than (0.5, 0.5) does
    assert sorted(found.codes[9:].tolist()) == [[1, 3], [2, 2], [2, 3]]
    assert found.codes[11].tolist()[0] == 2
    assert found.report["off_nearest_path"] == 2
    assert (found.report["free_codes_before"], found.report["free_codes_after"]) == (3, 0)


def test_cosine_trees_place_by_direction(tmp_path):
    rows = cloud(400)
    splits, trie = grown(tmp_path, rows / np.linalg.norm(rows, axis=1, keepdims=True), 40, "cosine")
    chosen = np.flatnonzero(trie.depth == 2)[:60:3]
    found = extend_codes(splits, trie, 7 * rows[chosen])
    assert (found.codes[400:, 0] == trie.codes[chosen, 0]).all()


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (np.zeros((2, 4), np.float32), "width"),
        (np.full((2, 5), np.nan, np.float32), "not finite"),
        (np.zeros((100_000, 5), np.float32), "free codes"),
    ],
)
def test_new_items_that_cannot_be_placed_are_refused(tmp_path, rows, what):
    splits, trie = grown(tmp_path, cloud(50), 8)
    with pytest.raises(DataError, match=what):
        extend_codes(splits, trie, rows)


def test_missing_splits_are_named(tmp_path):
    with pytest.raises(ArtifactError, match="splits"):
        Splits.load(tmp_path)
    (tmp_path / "splits.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="splits"):
        Splits.load(tmp_path)
