"""LightGCN over partitions equals LightGCN in one process and PyG's, whoever owns what."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from genrec_dist.artifacts.files import read_json
from genrec_dist.collaborative.lightgcn_stage import LightgcnTask
from genrec_dist.config import LightgcnConfig, LightgcnOptim, RuntimeConfig
from genrec_dist.errors import CheckpointError
from genrec_dist.evaluation.collaborative import COUNTS, evaluate_counts
from genrec_dist.graph.interactions import Interactions
from genrec_dist.graph.partitioners import assign_nodes
from genrec_dist.graph.spmm import SpmmKind
from genrec_dist.graph.stage import Partitions, write_partitions
from genrec_dist.pipeline import StageContext
from genrec_dist.testing.graphs import community_graph, uneven_assignment
from genrec_dist.testing.processes import run_processes
from genrec_dist.training.checkpoints import Checkpoints
from genrec_dist.training.sharded import ShardedEngine
from genrec_dist.training.worker import Worker

USERS, ITEMS = 150, 90
OPTIM = {"batch_size": 64, "epochs": 1}
CONFIGS = {
    "bpr": LightgcnConfig(dim=16, l2=1e-2, optim=LightgcnOptim(**OPTIM)),
    "bpr_many": LightgcnConfig(
        dim=16, l2=1e-2, num_negatives=3, negatives="popularity", optim=LightgcnOptim(**OPTIM | {"clip_norm": 0.01})
    ),
    "softmax": LightgcnConfig(
        dim=16, l2=1e-2, loss="sampled_softmax", num_negatives=20, negatives="popularity", similarity="cosine",
        optim=LightgcnOptim(**OPTIM),
    ),
    "sampled": LightgcnConfig(dim=16, l2=1e-2, mode="sampled", fanouts=[4, 3, 2], optim=LightgcnOptim(**OPTIM)),
}  # fmt: skip


def graph() -> Interactions:
    return community_graph(USERS, ITEMS, 900, seed=1)


def cut(folder: Path, kind: str, num_parts: int) -> Path:
    """Partitions of the graph by a partitioner, or unevenly with an empty part."""
    chosen = graph()
    if kind == "uneven":
        assignment = uneven_assignment(chosen, num_parts)
    elif kind == "blocks":
        assignment = np.zeros(chosen.num_nodes, np.int32)
    else:
        assignment = assign_nodes(kind, chosen, num_parts, 0, 120)
    blocks = np.random.default_rng(0).integers(5, size=chosen.num_nodes) if kind in ("uneven", "blocks") else None
    write_partitions(folder, chosen, assignment, num_parts, kind, blocks)
    return folder


def make_task(
    folder: Path, worker: Worker, config: LightgcnConfig, dtype: torch.dtype, kind: SpmmKind = "auto", overlap=False
) -> LightgcnTask:
    targets = np.stack([np.arange(USERS) % ITEMS, (np.arange(USERS) * 7) % ITEMS], 1)
    targets[::9] = -1
    task = LightgcnTask(config, graph(), Partitions(folder), targets, worker, 5, kind, overlap)
    task.model.to(dtype)
    return task


def whole(task: LightgcnTask, local: torch.Tensor, worker: Worker) -> torch.Tensor:
    """A sharded table in node order."""
    table = torch.zeros(USERS + ITEMS, local.shape[1], dtype=local.dtype)
    table[torch.from_numpy(task.model.nodes)] = local.detach()
    return worker.sum(table)


CASES = [
    *(("metis", 2, name) for name in CONFIGS),
    *(("uneven", 4, name) for name in CONFIGS),
    ("pymetis", 4, "bpr"),
    ("random", 2, "bpr"),
    ("random", 4, "bpr"),
    ("uneven", 2, "bpr"),
]
"""Every loss and mode on two partitions, every partition with one loss."""


def work(worker: Worker, folder: Path, out: Path, config: LightgcnConfig, steps: int = 3, **how) -> dict:
    """First losses and gradient, embeddings after some steps, metrics."""
    task = make_task(folder, worker, config, how.pop("dtype", torch.float64), **how)
    engine = ShardedEngine(task.model, config.optim, worker)
    result: dict = {"start": whole(task, task.model.embeddings(), worker)}
    for step in range(steps):
        losses = engine.forward(task.batch(task.order.batch(step), worker))
        engine.backward(losses["loss"])
        if step == 0:
            result["losses"] = {n: worker.sum(v.detach().clone()) / worker.world_size for n, v in losses.items()}
            gradient = task.model.table.grad
            gradient = gradient.to_dense() if gradient.is_sparse else gradient
            result["gradient"] = whole(task, gradient, worker)
        engine.step(1e-2)
    result["table"] = whole(task, task.model.table, worker)
    result["final"] = whole(task, task.model.embeddings(), worker)
    result["counts"] = torch.from_numpy(task.rank_counts(task.model.embeddings(), worker, 0, 20))
    if worker.is_main:
        torch.save(result, out)
    return result


LONG = {"steps": 50, "dtype": torch.float32}


def work_all(worker: Worker, root: Path) -> None:
    """Every case of this world size, in one set of processes."""
    for kind, num_parts, name in CASES:
        if num_parts == worker.world_size:
            work(worker, root / f"{kind}-{num_parts}", root / f"{kind}-{num_parts}-{name}.pt", CONFIGS[name])
    if worker.world_size == 2:
        for spmm in ("torch", "dgl"):
            work(worker, root / "random-2", root / f"overlap-{spmm}.pt", CONFIGS["bpr"], kind=spmm, overlap=True)
    work(worker, root / f"pymetis-{worker.world_size}", root / f"long-{worker.world_size}.pt", CONFIGS["bpr"], **LONG)
    resume_work(worker, root, worker.world_size, (1, 2)[: worker.world_size // 2])


def resume_work(worker: Worker, root: Path, num_parts: int, sources: tuple = ()) -> None:
    """From the checkpoints of `sources` at step 3, to step 6; and a checkpoint at step 3 for the others."""
    config, folder = CONFIGS["bpr"], root / f"pymetis-{num_parts}"
    for source in (*sources, None):
        task = make_task(folder, worker, config, torch.float64)
        engine = ShardedEngine(task.model, config.optim, worker)
        if source is not None:
            found = Checkpoints(root / f"checkpoint-{source}").latest_sharded(worker)
            assert found is not None
            assert found[0] == {"step": 3}
            engine.load_parts(found[1])
        for step in range(3) if source is None else range(3, 6):
            engine.backward(engine.forward(task.batch(task.order.batch(step), worker))["loss"])
            engine.step(1e-2)
        if source is None:
            with Checkpoints(root / f"checkpoint-{num_parts}") as checkpoints:
                checkpoints.save_sharded(3, {"step": 3}, engine.state(), engine.best(), 3, worker)
        table = whole(task, task.model.table, worker)
        if worker.is_main and source is not None:
            torch.save(table, root / f"resumed-{source}-{num_parts}.pt")


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """Folder with the results of all world sizes."""
    root = tmp_path_factory.mktemp("lightgcn")
    for kind, num_parts in sorted({case[:2] for case in CASES} | {("pymetis", 1), ("pymetis", 2)}):
        cut(root / f"{kind}-{num_parts}", kind, num_parts)
    resume_work(Worker(), root, 1)
    for world_size in (2, 4):
        run_processes(work_all, world_size, root)
    return root


def one_process(root: Path, name: str, **how) -> dict:
    return work(Worker(), root / "pymetis-1", root / "one.pt", CONFIGS[name], **how)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def assert_same(found: dict, wanted: dict, tolerance: float, after_steps: float) -> None:
    for key in ("start", "gradient"):
        assert relative(found[key], wanted[key]) < tolerance, key
    for key, value in wanted["losses"].items():
        assert relative(found["losses"][key], value) < tolerance, key
    for key in ("table", "final"):
        assert relative(found[key], wanted[key]) < after_steps, key


@pytest.mark.parametrize(("kind", "num_parts", "name"), CASES)
def test_any_partition_equals_one_process_in_float64(done, kind, num_parts, name):
    one = one_process(done, name)
    found = torch.load(done / f"{kind}-{num_parts}-{name}.pt", weights_only=True)
    assert_same(found, one, 1e-9, 1e-8)
    assert found["counts"].equal(one["counts"])
    assert int(one["counts"].sum()) > 0


@pytest.mark.parametrize("name", list(CONFIGS))
def test_blocks_change_nothing(tmp_path, done, name):
    found = work(Worker(), cut(tmp_path / "parts", "blocks", 1), tmp_path / "result.pt", CONFIGS[name])
    one = one_process(done, name)
    assert_same(found, one, 1e-9, 1e-8)
    assert np.array_equal(found["counts"], one["counts"])


@pytest.mark.parametrize("world_size", [2, 4])
def test_float32_and_fifty_steps(done, world_size):
    found = torch.load(done / f"long-{world_size}.pt", weights_only=True)
    assert_same(found, one_process(done, "bpr", **LONG), 1e-5, 1e-5)


@pytest.mark.parametrize("spmm", ["torch", "dgl"])
def test_overlap_and_kernels_change_nothing(done, spmm):
    found = torch.load(done / f"overlap-{spmm}.pt", weights_only=True)
    assert_same(found, one_process(done, "bpr", kind="dgl"), 1e-9, 1e-8)


@pytest.mark.parametrize("parts", [(1, 2), (1, 4), (2, 4), (4, 1)])
def test_another_number_of_partitions_goes_on_from_a_checkpoint(done, parts):
    straight = one_process(done, "bpr", steps=6)["table"]
    if parts == (4, 1):
        resume_work(Worker(), done, 1, sources=(4,))
    found = torch.load(done / "resumed-{}-{}.pt".format(*parts), weights_only=True)
    assert relative(found, straight) < 1e-8


@pytest.mark.parametrize("spmm", ["torch", "dgl"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_pyg(tmp_path, spmm, dtype):
    """Forward, loss and gradient of PyG's LightGCN with the same weights and the same batch."""
    from torch_geometric.nn.models import LightGCN as Reference

    config = CONFIGS["bpr"]
    task = make_task(cut(tmp_path / "parts", "random", 1), Worker(), config, dtype, spmm)
    model, chosen = task.model, graph()
    reference = Reference(chosen.num_nodes, config.dim, config.num_layers).to(dtype)
    with torch.no_grad():
        reference.embedding.weight.copy_(model.table)
    users = np.repeat(np.arange(USERS), np.diff(chosen.user_indptr))
    pairs = torch.from_numpy(np.stack([users, USERS + chosen.user_items]))
    edges = torch.cat([pairs, pairs.flip(0)], 1)
    samples = task.order.batch(0)
    batch = task.pairs.local(samples)
    loss = model(task.batch(samples, Worker()))["loss"]
    loss.backward()
    nodes = (batch.users, USERS + batch.positives, USERS + batch.negatives.ravel())
    labels = torch.cat([torch.stack(nodes[:2]), torch.stack([nodes[0], nodes[2]])], 1)
    ranks = reference(edges, labels)
    wanted = reference.recommendation_loss(*ranks.chunk(2), node_id=torch.cat(nodes), lambda_reg=config.l2 / 2)
    wanted.backward()
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert relative(model.embeddings(), reference.get_embedding(edges).detach()) < tolerance
    assert relative(loss.detach(), wanted.detach()) < tolerance
    assert relative(model.table.grad, reference.embedding.weight.grad) < tolerance


def test_fanouts_as_large_as_degrees_give_the_full_propagation(tmp_path):
    folder = cut(tmp_path / "parts", "random", 1)
    full = make_task(folder, Worker(), CONFIGS["bpr"], torch.float64)
    sampled = make_task(
        folder, Worker(), CONFIGS["bpr"].model_copy(update={"mode": "sampled", "fanouts": [1000] * 3}), torch.float64
    )
    losses, gradients = [], []
    for task in (full, sampled):
        out = task.model(task.batch(task.order.batch(0), Worker()))
        out["loss"].backward()
        losses.append(out["loss"].detach())
        gradients.append(task.model.table.grad)
    assert relative(losses[1], losses[0]) < 1e-12
    assert gradients[1].is_sparse
    assert relative(gradients[1].to_dense(), gradients[0]) < 1e-9


def test_sampled_propagation_is_unbiased(tmp_path):
    """The mean over many samples of the seeds' rows nears the full propagation."""
    from genrec_dist.graph.sampling import NeighbourSampler, sampled_layers

    task = make_task(cut(tmp_path / "parts", "random", 1), Worker(), CONFIGS["bpr"], torch.float64)
    model = task.model
    sampler = NeighbourSampler(model.partition, Worker(), [3, 3])
    seeds = np.arange(20)
    y = model.table.detach() * model.inverse_root
    estimates = []
    for key in range(1500):
        blocks, outer = sampler.blocks(seeds, key)
        estimates.append(sampled_layers(blocks, y[torch.from_numpy(outer)])[1])
    stack = torch.stack(estimates)
    rows = model.propagation
    degrees = torch.from_numpy(np.maximum(model.partition.degrees, 1))[:, None]
    exact = rows.sum(rows.sum(y) / degrees) / degrees
    error = (stack.mean(0) - exact[: len(seeds)]) / (stack.std(0) / 1500**0.5 + 1e-12)
    assert float(error.abs().max()) < 5
    assert float(stack.std()) > 0


def test_negatives_are_no_items_of_the_user(tmp_path):
    task = make_task(cut(tmp_path / "parts", "random", 1), Worker(), CONFIGS["bpr_many"], torch.float32)
    chosen = graph()
    batch = task.pairs.local(task.order.batch(0))
    for user, positive, negatives in zip(batch.users, batch.positives, batch.negatives):
        items = chosen.user_items[chosen.user_indptr[user] : chosen.user_indptr[user + 1]]
        assert int(positive) in items
        assert not set(negatives.tolist()) & set(items.tolist())
    again = task.pairs.local(task.order.batch(task.order.steps_per_epoch))
    assert not again.negatives.ravel().sort().values.equal(batch.negatives.ravel().sort().values)


def test_popular_items_are_drawn_by_the_power_of_their_degree(tmp_path):
    task = make_task(cut(tmp_path / "parts", "random", 1), Worker(), CONFIGS["softmax"], torch.float32)
    degrees = np.diff(graph().item_indptr) ** 0.75
    drawn = task.pairs.draw(torch.arange(200_000), 9)
    share = np.bincount(drawn, minlength=ITEMS) / 200_000
    np.testing.assert_allclose(share, degrees / degrees.sum(), atol=5 * (0.03 / 200_000) ** 0.5)
    np.testing.assert_allclose(task.pairs.chances(torch.arange(ITEMS)), degrees / degrees.sum(), atol=1e-12)


def test_ranks_against_brute_force(tmp_path):
    task = make_task(cut(tmp_path / "parts", "random", 1), Worker(), CONFIGS["bpr"], torch.float32)
    rows, chosen, cutoffs = task.model.embeddings(), graph(), [1, 5, 20]
    scores = rows[:USERS] @ rows[USERS:].T
    hits = {True: [], False: []}
    for user in range(USERS):
        target = task.targets[user, 1]
        if target < 0:
            continue
        seen = chosen.user_items[chosen.user_indptr[user] : chosen.user_indptr[user + 1]]
        for masked in hits:
            row = scores[user].clone()
            if masked:
                keep = row[target].clone()
                row[torch.from_numpy(np.array(seen, np.int64))] = -torch.inf
                row[target] = keep
            hits[masked].append(int((row > row[target]).sum()) + 1)
    counts = np.stack([task.rank_counts(task.model.embeddings(), Worker(), column, 1000) for column in (0, 1)])
    np.save(tmp_path / COUNTS, counts)
    context = StageContext(out=tmp_path, inputs={"model": tmp_path}, runtime=RuntimeConfig())
    settings = {"method": "lightgcn", "order": "time", "seed": 0, "cutoffs": cutoffs, "bootstrap_samples": 50}
    evaluate_counts(context, settings)
    result = read_json(tmp_path / "metrics.json")
    assert result["users"] == len(hits[True])
    for name, (low, high) in result["intervals"].items():
        assert low <= result["test"][name] <= high
    some = task.rank_counts(task.model.embeddings(), Worker(), 1, 20, limit=50)
    assert some[1].sum() == 50
    assert some[1, 1:21].sum() == np.sum(np.array(hits[True][:50]) <= 20)
    for masked, name in ((True, "masked_seen"), (False, "test")):
        ranks = np.array(hits[masked])
        for k in cutoffs:
            assert result[name][f"recall@{k}"] == pytest.approx((ranks <= k).mean())
            assert result[name][f"ndcg@{k}"] == pytest.approx(np.where(ranks <= k, 1 / np.log2(ranks + 1), 0).mean())


def test_starting_values_belong_to_nodes(tmp_path):
    one = make_task(cut(tmp_path / "parts", "random", 1), Worker(), CONFIGS["bpr"], torch.float32).model.table
    assert abs(float(one.mean())) < 0.01
    assert float(one.std()) == pytest.approx(0.1, rel=0.05)
    norm = F.normalize(one.detach(), dim=1)
    assert float((norm @ norm.T - torch.eye(len(one))).abs().max()) < 0.98


def test_a_checkpoint_without_a_part_is_refused(tmp_path):
    task = make_task(cut(tmp_path / "one", "random", 1), Worker(), CONFIGS["bpr"], torch.float32)
    engine = ShardedEngine(task.model, task.config.optim, Worker())
    state = engine.state()
    half = {name: value[: len(value) // 2] if value.ndim else value for name, value in state.items()}
    Checkpoints(tmp_path / "c", background=False).save_sharded(1, {}, half, None, 0, Worker())
    files = Checkpoints(tmp_path / "c").latest_sharded(Worker())[1]
    with pytest.raises(CheckpointError, match="not all rows"):
        engine.load_parts(files)
