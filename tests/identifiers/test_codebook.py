"""Hierarchical codes: uniqueness, independence of subtrees, degenerate inputs."""

from __future__ import annotations

import numpy as np
import pytest

from genrec_dist.identifiers.hierarchical import hierarchical_codes
from genrec_dist.identifiers.kmeans import KMeansOptions, kmeans
from genrec_dist.identifiers.trie import build_trie


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
    codes, depth = hierarchical_codes(cloud(items), clusters, seed=1, options=KMeansOptions(balanced=balanced))
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
    first, second, other = (
        hierarchical_codes(points, 4, seed=s, options=KMeansOptions(balanced=balanced))[0] for s in (5, 5, 6)
    )
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
    codes, depth = hierarchical_codes(np.ones((200, 3), np.float32), 4, options=KMeansOptions(balanced=balanced))
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


def test_every_item_has_a_leaf_of_its_own():
    codes, depth = hierarchical_codes(cloud(150), 5, seed=3)
    trie = build_trie(codes, depth)
    assert trie.find(codes).tolist() == list(range(150))
    assert [tuple(trie.code[nodes[:d]].tolist()) for nodes, d in zip(trie.item_path, depth)] == paths(codes, depth)
