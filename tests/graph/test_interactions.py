"""The graph holds the training interactions, each once, and nothing that is held out; partitions hold the graph."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from genrec_dist.artifacts.files import read_json
from genrec_dist.catalog.dataset import Catalog, Sequences
from genrec_dist.config import GraphConfig, RuntimeConfig
from genrec_dist.errors import ArtifactError, ClusterError, ConfigError, DataError
from genrec_dist.graph.exchange import fetch_rows, gather_ids, request_rows
from genrec_dist.graph.interactions import FILES, Interactions, training_interactions, write_interactions
from genrec_dist.graph.layout import build_partition, renumber
from genrec_dist.graph.propagation import split_halo
from genrec_dist.graph.rows import normal_rows, write_sharded
from genrec_dist.graph.spmm import make_neighbour_sum
from genrec_dist.graph.stage import TARGETS, Partitions, build_graph, build_partitions, write_partitions
from genrec_dist.pipeline import StageContext
from genrec_dist.testing.graphs import community_graph, uneven_assignment
from genrec_dist.testing.tiny import tiny_sequences, write_tiny_catalog
from genrec_dist.training.worker import Worker

CPU = torch.device("cpu")


def pairs_of(graph: Interactions) -> set[tuple[int, int]]:
    users = np.repeat(np.arange(graph.num_users), np.diff(graph.user_indptr))
    return set(zip(users.tolist(), np.asarray(graph.user_items).tolist()))


def with_repeats() -> Sequences:
    """Sequences in which users come back to items, some have fewer than three, and one has none."""
    rng = np.random.default_rng(5)
    lengths = np.array([0, 1, 2, 3, *rng.integers(1, 30, 60)])
    return Sequences(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        rng.integers(12, size=lengths.sum()).astype(np.int32),
        np.arange(lengths.sum()).astype(np.int64),
        15,
    )


@pytest.mark.parametrize("block_edges", [1, 7, 1 << 20])
def test_streamed_graph_is_the_one_in_memory(tmp_path, block_edges):
    sequences = with_repeats()
    folder = write_tiny_catalog(tmp_path / "catalog", sequences)
    table = pq.read_table(folder / "sequences.parquet")
    pq.write_table(table, folder / "sequences.parquet", row_group_size=10)
    report = write_interactions(Catalog(folder), tmp_path, block_edges)
    streamed, whole = Interactions.load(tmp_path), training_interactions(sequences)
    for name in FILES:
        assert np.array_equal(getattr(streamed, name), getattr(whole, name)), name
    assert not list(tmp_path.glob("*.raw"))
    wanted, interactions = set(), 0
    for user in range(sequences.num_users):
        items = sequences.items[sequences.indptr[user] : sequences.indptr[user + 1]].tolist()
        train = items[:-2] if len(items) >= 3 else items
        wanted |= {(user, item) for item in train}
        interactions += len(train)
    assert pairs_of(streamed) == wanted
    assert (report["pairs"], report["repeated"]) == (len(wanted), interactions - len(wanted))
    by_item = {(u, i) for i in range(15) for u in whole.item_users[whole.item_indptr[i] : whole.item_indptr[i + 1]]}
    assert by_item == wanted
    assert report["users_without_edge"] == int((np.diff(whole.user_indptr) == 0).sum()) > 0


def test_held_out_items_are_beside_the_graph_and_not_in_it(tmp_path):
    sequences = tiny_sequences(30, 20, seed=2)
    catalog = write_tiny_catalog(tmp_path / "catalog", sequences)
    out = tmp_path / "out"
    out.mkdir()
    context = StageContext(out=out, inputs={"catalog": catalog}, runtime=RuntimeConfig(backend="local"))
    build_graph(context, {"order": "time"})
    targets, found = np.load(out / TARGETS), pairs_of(Interactions.load(out))
    for user in range(30):
        items = sequences.items[sequences.indptr[user] : sequences.indptr[user + 1]].tolist()
        assert targets[user].tolist() == (items[-2:] if len(items) >= 3 else [-1, -1])
        assert not {(user, item) for item in targets[user]} & found  # no item twice in these sequences


def test_a_catalog_without_training_part_is_refused(tmp_path):
    sequences = Sequences(np.zeros(4, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int64), 3)
    with pytest.raises(DataError, match="no training interaction"):
        write_interactions(Catalog(write_tiny_catalog(tmp_path / "c", sequences)), tmp_path)


def test_an_index_outside_the_graph_is_refused():
    with pytest.raises(DataError, match="item index outside"):
        Interactions.from_pairs(np.array([0]), np.array([5]), 1, 5)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 5])
def test_partitions_hold_every_edge_of_their_nodes(num_parts):
    graph = community_graph(40, 25, 200, seed=3)
    assignment = uneven_assignment(graph, num_parts)
    new_id, offsets = renumber(assignment, num_parts)
    old = np.argsort(new_id)
    found = set()
    for part in range(num_parts):
        partition = build_partition(graph, part, new_id, offsets)
        nodes = np.concatenate([partition.users, 40 + partition.items])
        assert np.array_equal(new_id[nodes], offsets[part] + np.arange(len(nodes)))
        assert np.array_equal(np.flatnonzero(assignment == part), np.sort(nodes))
        assert np.all(assignment[old[partition.halo]] != part)
        assert np.all(np.diff(partition.halo) > 0)
        columns = np.concatenate([offsets[part] + np.arange(len(nodes)), partition.halo])
        for row, node in enumerate(nodes):
            neighbours = old[columns[partition.indices[partition.indptr[row] : partition.indptr[row + 1]]]]
            found |= {(int(node), int(n)) for n in neighbours}
        (inner_ptr, inner), (outer_ptr, outer), boundary = split_halo(partition)
        assert len(inner) + len(outer) == len(partition.indices) == inner_ptr[-1] + outer_ptr[-1]
        assert len(boundary) == len(outer_ptr) - 1
    pairs = {(u, 40 + i) for u, i in pairs_of(graph)}
    assert found == pairs | {(b, a) for a, b in pairs}


def test_as_many_workers_as_partitions(tmp_path):
    graph = community_graph(20, 10, 60)
    parts = write_partitions(tmp_path, graph, uneven_assignment(graph, 2), 2, "random")
    with pytest.raises(ClusterError, match="workers and partitions differ"):
        parts.of_worker(0, 3)
    np.save(tmp_path / "new_id.npy", np.arange(5))
    with pytest.raises(ArtifactError, match="do not cover"):
        Partitions(tmp_path)


def test_without_dgl_the_plain_arrays_are_written(tmp_path, monkeypatch):
    from genrec_dist.graph import stage

    error = ClusterError("DGL cannot be imported", where="dgl")
    monkeypatch.setattr(stage, "dgl_problem", lambda: error)
    graph = community_graph(20, 10, 60)
    for name in FILES:
        np.save(tmp_path / f"{name}.npy", getattr(graph, name))
    out = tmp_path / "out"
    out.mkdir()
    context = StageContext(out=out, inputs={"graph": tmp_path}, runtime=RuntimeConfig(backend="local"))
    build_partitions(context, GraphConfig(partitioner="pymetis").model_dump() | {"num_parts": 2})
    report = read_json(out / "report.json")
    assert not report["dgl_format"]
    assert not (out / "dgl").exists()
    assert sum(p["edges"] for p in report["parts"]) == 2 * graph.num_pairs
    monkeypatch.setattr("genrec_dist.graph.dgl_tools.dgl_problem", lambda: error)
    partition = Partitions(out)[0]
    columns = partition.num_owned + len(partition.halo)
    kernel = make_neighbour_sum(partition.indptr, partition.indices, columns, CPU)
    assert type(kernel).__name__ == "TorchSum"


@pytest.mark.parametrize("kind", ["dgl", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_over_neighbours(kind, dtype):
    rng = np.random.default_rng(0)
    counts = np.array([0, 3, 1, 0, 700, 2])
    indptr = np.concatenate([[0], np.cumsum(counts)])
    indices = rng.integers(9, size=counts.sum()).astype(np.int32)
    x = torch.from_numpy(rng.normal(size=(9, 5))).to(dtype)
    found = make_neighbour_sum(indptr, indices, 9, CPU, kind)(x)
    wanted = torch.stack([x[indices[a:b]].double().sum(0) for a, b in itertools.pairwise(indptr)])
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4 if dtype == torch.float32 else 1e-9)
    empty = make_neighbour_sum(np.zeros(4, np.int64), np.zeros(0, np.int32), 9, CPU, kind)(x)
    assert empty.shape == (3, 5)
    assert not empty.any()


def test_a_kernel_of_another_device_is_refused():
    with pytest.raises(ConfigError, match="does not run on this device"):
        make_neighbour_sum(np.zeros(2, np.int64), np.zeros(0, np.int32), 1, CPU, "triton")


def test_rows_depend_on_the_node_alone():
    whole = normal_rows(np.arange(1000), 8, 0.5, 11)
    some = np.array([3, 999, 17])
    assert torch.equal(normal_rows(some, 8, 0.5, 11), whole[some])
    assert not torch.equal(normal_rows(some, 8, 0.5, 12), whole[some])
    assert float(whole.std()) == pytest.approx(0.5, rel=0.03)
    assert abs(float(whole.mean())) < 0.02
    correlation = np.corrcoef(whole.numpy().T)
    assert np.abs(correlation - np.eye(8)).max() < 0.15


def test_exchange_with_one_worker_is_a_lookup():
    table = torch.arange(12.0).view(6, 2).requires_grad_()
    plan = request_rows(np.array([1, 4]), np.array([0, 6]), Worker())
    rows = fetch_rows(table, plan, Worker())
    assert rows.tolist() == [[2, 3], [8, 9]]
    rows.sum().backward()
    assert table.grad.sum(1).tolist() == [0, 2, 0, 0, 2, 0]
    assert gather_ids(np.array([5, 2]), Worker()).tolist() == [5, 2]


@pytest.mark.parametrize("first_row", [0, 4])
def test_sharded_tables_are_written_in_their_order(tmp_path, first_row):
    from genrec_dist.artifacts.reader import EmbeddingStore

    table = torch.arange(20.0).view(10, 2)
    new_ids = np.array([7, 3, 9, 0, 5]) + first_row
    write_sharded(tmp_path, table, new_ids, np.array([0, 14]), Worker(), first_row=first_row, rows_per_shard=2)
    store = EmbeddingStore(tmp_path)
    assert store.verify() == []
    assert np.array_equal(store.rows(np.arange(5)), table[torch.from_numpy(new_ids - first_row)].numpy())
