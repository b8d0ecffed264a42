"""Hierarchical codes and the trie: uniqueness, independence of subtrees, and a trie made of dicts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec_dist.errors import DataError
from genrec_dist.identifiers.hierarchical import hierarchical_codes
from genrec_dist.identifiers.kmeans import kmeans
from genrec_dist.identifiers.trie import Trie, build_trie


def cloud(n: int, dim: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)


def paths(codes: np.ndarray, depth: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(row[:d].tolist()) for row, d in zip(codes, depth)]


def check_codes(codes: np.ndarray, depth: np.ndarray, num_clusters: int) -> None:
    """Unique, prefix-free, padded with -1 and nothing else, at most K children a node, no child alone."""
    own = paths(codes, depth)
    assert len(set(own)) == len(own)
    assert codes.shape[1] == depth.max()
    assert ((codes == -1) == (np.arange(codes.shape[1]) >= depth[:, None])).all()
    assert codes.max() < num_clusters
    prefixes = {path[:n] for path in own for n in range(len(path))}
    assert not prefixes & set(own)
    for prefix in prefixes:
        assert len({path[len(prefix)] for path in own if path[: len(prefix)] == prefix}) <= num_clusters


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize(("items", "clusters"), [(1, 4), (4, 4), (5, 4), (60, 4), (100, 2), (90, 16)])
def test_codes_are_a_tree(items, clusters, balanced):
    codes, depth = hierarchical_codes(cloud(items), clusters, seed=1, balanced=balanced)
    check_codes(codes, depth, clusters)
    if balanced:  # sizes within one of each other at every split: no branch is much deeper than log_K n
        assert depth.max() <= np.ceil(np.log(items) / np.log(clusters)) + 1


def test_a_catalog_no_larger_than_k_has_one_level():
    codes, depth = hierarchical_codes(cloud(7), 8)
    assert codes.tolist() == [[0], [1], [2], [3], [4], [5], [6]]
    assert set(depth) == {1}


@pytest.mark.parametrize("balanced", [False, True])
def test_codes_are_deterministic_for_a_seed(balanced):
    points = cloud(120)
    first, second, other = (hierarchical_codes(points, 4, seed=s, balanced=balanced)[0] for s in (5, 5, 6))
    assert np.array_equal(first, second)
    assert first.shape != other.shape or (first != other).any()


def test_first_level_is_one_kmeans():
    points = cloud(100)
    codes, _ = hierarchical_codes(points, 5, seed=9)
    assert (codes[:, 0] == kmeans(points, 5, seed=9).labels).all()


def test_subtrees_do_not_know_each_other():
    """Moving the items of one cluster leaves the codes below the others alone."""
    truth = np.repeat(np.arange(3), 40)
    centre = 1000 * np.eye(3, dtype=np.float32)[truth]
    points, moved = centre + cloud(120), centre + cloud(120)
    moved[truth == 2] = centre[truth == 2] + cloud(40, seed=7)
    first, second = (hierarchical_codes(p, 3, seed=1)[0] for p in (points, moved))
    groups = [{row[0] for row in codes[truth == g].tolist()} for codes in (first, second) for g in range(3)]
    assert all(len(group) == 1 for group in groups)
    width = min(first.shape[1], second.shape[1])
    for group in (0, 1):
        assert (first[truth == group, 1:width] == second[truth == group, 1:width]).all()
    assert (first[truth == 2, 1:width] != second[truth == 2, 1:width]).any()


def test_neighbours_share_their_first_code():
    truth = np.repeat(np.arange(4), 20)
    points = (100 * np.eye(4)[truth] + cloud(80, 4)).astype(np.float32)
    codes, _ = hierarchical_codes(points, 4, seed=0)
    assert len(set(zip(truth.tolist(), codes[:, 0].tolist()))) == 4


@pytest.mark.parametrize("balanced", [False, True])
def test_identical_embeddings_make_a_flat_even_tree(balanced):
    codes, depth = hierarchical_codes(np.ones((200, 3), np.float32), 4, balanced=balanced)
    check_codes(codes, depth, 4)
    assert depth.max() <= 5  # log_4 200 is 3.8
    assert np.bincount(codes[:, 0]).tolist() == [50] * 4


def test_a_group_of_identical_embeddings_among_others_stays_shallow():
    """Items without text, or copies of one product."""
    points = np.concatenate([np.zeros((100, 3), np.float32), cloud(60)])
    codes, depth = hierarchical_codes(points, 4, seed=2)
    check_codes(codes, depth, 4)
    assert depth.max() < 20


def test_progress_counts_settled_items():
    seen: list[int] = []
    hierarchical_codes(cloud(60), 4, on_split=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 60


def dict_trie(own: list[tuple[int, ...]]) -> dict:
    """Nested dicts; a leaf holds its item."""
    root: dict = {}
    for item, path in enumerate(own):
        node = root
        for code in path[:-1]:
            node = node.setdefault(code, {})
        node[path[-1]] = item
    return root


def check_trie(trie: Trie, own: list[tuple[int, ...]]) -> None:
    """Walk the arrays and the dicts side by side, breadth first."""
    level, number = [(0, dict_trie(own), -1, -1)], 0
    depth = 0
    while level:
        below = []
        for node, branch, parent, code in level:
            assert node == number
            assert (trie.parent[node], trie.code[node], trie.level[node]) == (parent, code, depth)
            number += 1
            if isinstance(branch, int):
                assert trie.node_item[node] == branch
                assert trie.num_children[node] == 0
                continue
            assert trie.node_item[node] == -1
            assert trie.num_children[node] == len(branch)
            first = int(trie.first_child[node])
            below += [(first + i, branch[c], node, c) for i, c in enumerate(sorted(branch))]
        assert trie.max_children(depth) == max((int(trie.num_children[n]) for n, *_ in level), default=0)
        level, depth = below, depth + 1
    assert number == trie.num_nodes
    for item, path in enumerate(own):
        nodes = trie.item_path[item]
        assert trie.code[nodes[: len(path)]].tolist() == list(path)
        assert (nodes[len(path) - 1 :] == nodes[len(path) - 1]).all()
        assert trie.node_item[nodes[-1]] == item


@settings(max_examples=80, deadline=None)
@given(st.sets(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), min_size=1, max_size=25), st.randoms())
def test_trie_against_dicts(candidates, random):
    own = [p for p in candidates if not any(p != q and q[: len(p)] == p for q in candidates)]
    random.shuffle(own)
    depth = np.array([len(p) for p in own], np.int32)
    codes = np.full((len(own), depth.max()), -1, np.int32)
    for row, path in zip(codes, own):
        row[: len(path)] = path
    trie = build_trie(codes, depth)
    assert (trie.num_items, trie.max_depth) == (len(own), depth.max())
    check_trie(trie, own)


def test_trie_of_hierarchical_codes():
    codes, depth = hierarchical_codes(cloud(150), 5, seed=3)
    check_trie(build_trie(codes, depth), paths(codes, depth))


def test_children_are_ranges_sorted_by_code():
    trie = build_trie(np.array([[2, 1], [0, 7], [2, 0], [0, 3]], np.int32), np.full(4, 2, np.int32))
    assert trie.code.tolist() == [-1, 0, 2, 3, 7, 0, 1]
    assert trie.parent.tolist() == [-1, 0, 0, 1, 1, 2, 2]
    assert (trie.first_child[:3].tolist(), trie.num_children[:3].tolist()) == ([1, 3, 5], [2, 2, 2])
    assert trie.node_item.tolist() == [-1, -1, -1, 3, 1, 2, 0]
    assert trie.item_path.tolist() == [[2, 6], [1, 4], [2, 5], [1, 3]]


@pytest.mark.parametrize(
    ("codes", "depth"),
    [
        ([[0, 1], [0, 1], [1, 0]], [2, 2, 2]),  # two items, one code
        ([[0, -1], [0, 1]], [1, 2]),  # an item's code begins another's
        ([[0, 5], [0, 1]], [1, 1]),  # equal up to their depth
    ],
)
def test_codes_that_are_not_one_leaf_an_item_are_refused(codes, depth):
    with pytest.raises(DataError, match="not unique"):
        build_trie(np.array(codes, np.int32), np.array(depth, np.int32))


def test_entries_past_the_depth_are_ignored():
    depth = np.array([1, 2, 2], np.int32)
    first = build_trie(np.array([[0, -1], [1, 0], [1, 1]], np.int32), depth)
    second = build_trie(np.array([[0, 3], [1, 0], [1, 1]], np.int32), depth)
    for name in ("item_path", "first_child", "num_children", "parent", "level", "code", "node_item"):
        assert np.array_equal(getattr(first, name), getattr(second, name))


def test_trie_survives_saving(tmp_path):
    trie = build_trie(*hierarchical_codes(cloud(40), 4))
    trie.save(tmp_path)
    back = Trie.load(tmp_path)
    for name, value in vars(trie).items():
        assert np.array_equal(getattr(back, name), value)
        assert getattr(back, name).dtype == value.dtype
