"""Partitioners: cuts on planted communities, repeatability, odd graphs, and the report against loops."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess

import numpy as np
import pymetis
import pytest

from genrec_dist.errors import ClusterError, ConfigError, DataError
from genrec_dist.graph import partitioners
from genrec_dist.graph.interactions import FILES, Interactions
from genrec_dist.graph.locality import neighbour_blocks
from genrec_dist.graph.partitioners import KINDS, assign_nodes, assignment_hash, cut_pairs, partition_report
from genrec_dist.testing.graphs import community_graph, iterate_partitions

COMMUNITIES = 4


def planted(num_users: int = 400, num_items: int = 200, draws: int = 4000, noise: float = 0.05) -> Interactions:
    """Users and items in communities by index modulo 4; a share `noise` of the pairs ignores them."""
    rng = np.random.default_rng(0)
    users = rng.integers(0, num_users, draws)
    items = rng.integers(0, num_items // COMMUNITIES, draws) * COMMUNITIES + users % COMMUNITIES
    anywhere = rng.random(draws) < noise
    items[anywhere] = rng.integers(0, num_items, anywhere.sum())
    return Interactions.from_pairs(users, items, num_users, num_items)


def report_of(graph: Interactions, assignment: np.ndarray, num_parts: int) -> dict:
    return partition_report(graph, assignment, num_parts, iterate_partitions(graph, assignment, num_parts))


@pytest.mark.parametrize("kind", ["metis", "pymetis"])
def test_communities_are_found(kind):
    graph = planted()
    assignment = assign_nodes(kind, graph, COMMUNITIES, seed=3)
    assert assignment.dtype == np.int32
    report = report_of(graph, assignment, COMMUNITIES)
    at_random = report_of(graph, assign_nodes("random", graph, COMMUNITIES, seed=3), COMMUNITIES)
    assert at_random["edge_cut"] == pytest.approx(0.75, abs=0.03)
    # The best cut is about 0.0375: of the 5% noise a quarter stays inside by chance.
    assert report["edge_cut"] < 0.1
    assert report["balance"]["edges"] < 1.1
    assert report["balance"]["users"] < 1.25
    assert sum(p["halo"] for p in report["parts"]) < 0.5 * sum(p["halo"] for p in at_random["parts"])


@pytest.mark.parametrize("kind", ["metis", "pymetis"])
def test_edges_are_balanced_where_nodes_alone_would_part_busy_from_idle(kind):
    rng = np.random.default_rng(0)
    busy = rng.integers(0, 100, 3000), rng.integers(0, 50, 3000)
    idle = rng.integers(100, 200, 200), rng.integers(50, 100, 200)
    users, items = (np.concatenate(both) for both in zip(busy, idle, strict=True))
    graph = Interactions.from_pairs(users, items, 200, 100)
    assert report_of(graph, np.repeat([0, 1, 0, 1], [100, 100, 50, 50]), 2)["balance"]["edges"] > 1.8
    assert report_of(graph, assign_nodes(kind, graph, 2, seed=0), 2)["balance"]["edges"] < 1.05


def test_pymetis_is_given_the_whole_graph(monkeypatch):
    graph = Interactions.from_pairs([0, 0, 2], [0, 1, 1], 3, 2)
    calls = []

    def part_graph(num_parts, adjacency, *, vweights, recursive, options):
        calls.append((num_parts, adjacency.adj_starts.tolist(), adjacency.adjacent.tolist(), vweights.tolist()))
        assert {part.dtype for part in (adjacency.adj_starts, adjacency.adjacent, vweights)} == {
            pymetis.zero_copy_dtype()
        }
        return pymetis.GraphPartition(0, [0, 1, 0, 1, 0])

    monkeypatch.setattr(pymetis, "part_graph", part_graph)
    assert partitioners._pymetis(graph, 2, seed=0).tolist() == [0, 1, 0, 1, 0]
    assert calls == [(2, [0, 2, 2, 3, 4, 6], [3, 4, 4, 0, 0, 2], [3, 1, 2, 2, 3])]


def test_pymetis_repeats_itself_and_heeds_the_seed(tmp_path):
    graph = planted()
    first = assign_nodes("pymetis", graph, COMMUNITIES, seed=5)
    for name in FILES:
        np.save(tmp_path / f"{name}.npy", getattr(graph, name))
    assert np.array_equal(first, assign_nodes("pymetis", Interactions.load(tmp_path), COMMUNITIES, seed=5))
    others = [assignment_hash(assign_nodes("pymetis", graph, COMMUNITIES, seed=seed)) for seed in (6, 7, 8)]
    assert any(other != assignment_hash(first) for other in others)


@pytest.mark.parametrize("num_parts", [2, 3, 7, 50])
def test_random_is_balanced_within_one_node_of_each_type(num_parts):
    graph = planted(num_users=41, num_items=24, draws=100)
    assignment = assign_nodes("random", graph, num_parts, seed=1)
    for nodes in (assignment[:41], assignment[41:]):
        counts = np.bincount(nodes, minlength=num_parts)
        assert len(counts) == num_parts
        assert counts.max() - counts.min() <= 1


def test_random_depends_on_seed_and_numbers_alone():
    assignment = assign_nodes("random", planted(), 4, seed=1)
    other_edges = planted(draws=100, noise=1.0)
    assert np.array_equal(assignment, assign_nodes("random", other_edges, 4, seed=1))
    other_seed = assign_nodes("random", planted(), 4, seed=2)
    assert not np.array_equal(assignment[:400], other_seed[:400])
    assert not np.array_equal(assignment[400:], other_seed[400:])
    same_sizes = assign_nodes("random", planted(num_users=200), 4, seed=1)
    assert not np.array_equal(same_sizes[:200], same_sizes[200:])  # users and items are drawn apart


@pytest.mark.parametrize("kind", KINDS)
def test_one_partition_calls_nothing(kind, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("started a process"))
    assignment = assign_nodes(kind, planted(), 1, seed=0)
    assert assignment.dtype == np.int32
    assert assignment.tolist() == [0] * 600


ODD = {
    "isolated nodes, fewer users than parts": (Interactions.from_pairs([0, 0, 1, 1], [0, 1, 2, 3], 3, 40), 4),
    "more parts than nodes": (Interactions.from_pairs([0, 1, 1], [0, 1, 0], 2, 2), 9),
    "no pair": (Interactions.from_pairs([], [], 5, 3), 2),
    "star, hub heavier than a part": (Interactions.from_pairs(range(60), [0] * 60, 60, 1), 4),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("kind", KINDS)
def test_odd_graphs(kind, case):
    graph, num_parts = ODD[case]
    assignment = assign_nodes(kind, graph, num_parts, seed=0)
    assert assignment.shape == (graph.num_nodes,)
    assert 0 <= assignment.min() <= assignment.max() < num_parts
    report = report_of(graph, assignment, num_parts)
    assert len(report["parts"]) == num_parts
    assert sum(part["users"] for part in report["parts"]) == graph.num_users
    assert sum(part["edges"] for part in report["parts"]) == 2 * graph.num_pairs


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"kind": "kahip"}, ConfigError, "metis, pymetis, random"),
        ({"num_parts": 0}, ConfigError, "at least 1"),
        ({"seed": -1}, ConfigError, "negative seed"),
        ({"graph": Interactions.from_pairs([], [], 0, 0)}, DataError, "no node"),
    ],
)
def test_impossible_requests(change, error, text):
    with pytest.raises(error, match=text):
        assign_nodes(**({"kind": "random", "graph": planted(draws=10), "num_parts": 2, "seed": 0} | change))


def test_pymetis_missing_is_said_by_the_child(tmp_path, monkeypatch):
    (tmp_path / "pymetis.py").write_text("raise ImportError('libmetis.so: cannot open')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ClusterError, match=r"libmetis\.so: cannot open") as caught:
        assign_nodes("pymetis", planted(), 2, seed=0)
    assert caught.value.where == "pymetis"
    assert "pip install pymetis" in caught.value.fix


def test_pymetis_over_time_names_other_partitioners():
    with pytest.raises(ClusterError, match=r"pymetis gave no assignment") as caught:
        assign_nodes("pymetis", planted(), 2, seed=0, time_limit=0.01)
    assert "killed after 0.01 s" in caught.value.got
    assert caught.value.fix == "set graph.partitioner=metis or random"


def test_hash_is_of_values_not_of_types():
    expected = hashlib.sha256(struct.pack("<4i", 0, 2, 1, 300)).hexdigest()
    for dtype in ("<i4", ">i4", "<i8", ">i2"):
        assert assignment_hash(np.array([0, 2, 1, 300], dtype)) == expected
    assert assignment_hash(np.array([0, 9, 2, 9, 1, 9, 300, 9])[::2]) == expected
    assert assignment_hash(np.array([2, 0, 1, 300])) != expected
    with pytest.raises(TypeError):
        assignment_hash(np.array([0.0, 1.0]))


def test_report_against_loops():
    graph, num_parts = planted(num_users=30, num_items=12, draws=90), 4
    assignment = np.random.default_rng(2).choice([0, 1, 3], 42).astype(np.int32)  # partition 2 is empty
    pairs = [
        (user, 30 + int(item))
        for user in range(30)
        for item in graph.user_items[graph.user_indptr[user] : graph.user_indptr[user + 1]]
    ]
    cut = sum(assignment[user] != assignment[item] for user, item in pairs)
    report = report_of(graph, assignment, num_parts)
    assert report["cut_pairs"] == cut
    assert report["edge_cut"] == cut / len(pairs)
    directed = pairs + [(item, user) for user, item in pairs]
    for part, entry in enumerate(report["parts"]):
        own = {node for node in range(42) if assignment[node] == part}
        halo = {other for node, other in directed if node in own and other not in own}
        assert entry == {
            "part": part,
            "users": sum(node < 30 for node in own),
            "items": sum(node >= 30 for node in own),
            "halo": len(halo),
            "halo_per_owned": len(halo) / len(own) if own else 0,
            "edges": sum(node in own for node, _ in directed),
            "edges_with_halo": sum(node in own and other not in own for node, other in directed),
        }
    for name in ("users", "items", "edges"):
        counts = [entry[name] for entry in report["parts"]]
        assert report["balance"][name] == pytest.approx(max(counts) / np.mean(counts))
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_cut_in_small_blocks_is_the_same():
    graph = planted(num_users=30, num_items=12, draws=90)
    assignment = np.random.default_rng(2).integers(0, 3, 42)
    whole = cut_pairs(graph, assignment)
    assert 0 < whole < graph.num_pairs
    assert [cut_pairs(graph, assignment, block) for block in (1, 7, graph.num_pairs)] == [whole] * 3


def test_report_refuses_partitions_of_another_assignment():
    graph = planted(num_users=30, num_items=12, draws=90)
    mine = assign_nodes("random", graph, 3, seed=0)
    with pytest.raises(DataError, match="not those of the assignment"):
        partition_report(graph, mine, 3, iterate_partitions(graph, assign_nodes("random", graph, 3, seed=1), 3))
    with pytest.raises(DataError, match="not those of the assignment"):
        partition_report(graph, mine, 3, list(iterate_partitions(graph, mine, 3))[:2])


@pytest.mark.parametrize("num_parts", [1, 2])
def test_blocks_put_neighbours_together(num_parts):
    graph = community_graph(600, 400, 8000, communities=8, mixing=0.05, seed=1)
    assignment = assign_nodes("pymetis", graph, num_parts, 0)
    blocks = neighbour_blocks(graph, assignment, num_parts, 125, 60)
    again = neighbour_blocks(graph, assignment, num_parts, 125, 60)
    assert np.array_equal(blocks, again)
    sizes = np.bincount(assignment * (blocks.max() + 1) + blocks)
    assert sizes.max() < 2 * sizes[sizes > 0].mean()
    users = np.repeat(np.arange(600), np.diff(graph.user_indptr))
    items = 600 + graph.user_items.astype(np.int64)
    same_part = assignment[users] == assignment[items]
    together = (blocks[users] == blocks[items])[same_part].mean()
    assert together > 0.6
    assert neighbour_blocks(graph, assignment, num_parts, 0, 60) is None
    assert neighbour_blocks(graph, assignment, num_parts, 2000, 60) is None
