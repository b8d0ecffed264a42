"""Stage I over graph partitions: loss, gradients, trained tables and metrics of the run in one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from genrec_dist.artifacts.embeddings import write_embeddings
from genrec_dist.catalog.dataset import Catalog
from genrec_dist.collaborative.fusion import FusionModel
from genrec_dist.collaborative.sharded_fusion import ShardedFusionTask, check_shardable
from genrec_dist.collaborative.stage import DENSE, FusionTask, load_fusion
from genrec_dist.config import FusionConfig, OptimConfig
from genrec_dist.errors import ConfigError
from genrec_dist.graph.interactions import training_interactions
from genrec_dist.graph.partitioners import assign_nodes
from genrec_dist.graph.stage import Partitions, write_partitions
from genrec_dist.testing.graphs import uneven_assignment
from genrec_dist.testing.processes import run_processes
from genrec_dist.testing.tiny import tiny_embeddings, tiny_sequences, write_tiny_catalog
from genrec_dist.training.engine import TorchEngine
from genrec_dist.training.owned import OwnedPrefixBatches, OwnedSequences
from genrec_dist.training.sharded import ShardedEngine
from genrec_dist.training.tasks import PrefixBatches
from genrec_dist.training.worker import Worker

CPU = torch.device("cpu")
OPTIM = OptimConfig(batch_size=16, clip_norm=0.5, weight_decay=0.01, warmup_steps=0)
BASE = {"dim": 8, "max_history": 6, "dropout": 0.0, "optim": OPTIM}
CONFIGS = {
    "sampled": FusionConfig(**BASE, loss="sampled_softmax", num_negatives=7),
    "full": FusionConfig(**BASE, loss="full_softmax"),
    "mlp": FusionConfig(**BASE, loss="sampled_softmax", num_negatives=7, attention="mlp"),
    "sasrec": FusionConfig(**BASE, loss="sampled_softmax", num_negatives=7, backbone="sasrec"),
    "buckets": FusionConfig(
        **BASE | {"optim": OPTIM.model_copy(update={"length_buckets": 3})}, item_input="collaborative"
    ),
}
SEQUENCES = tiny_sequences(50, 30, seed=3)
SEMANTIC = tiny_embeddings(30, 5)
STEPS = 4


def steps(task, engine, worker: Worker) -> tuple[dict, dict]:
    """Losses and gradients of the first step; trains some more."""
    first, gradients = {}, {}
    for step in range(STEPS):
        losses = engine.forward(task.batch(task.order.batch(step), worker))
        engine.backward(losses["loss"])
        if step == 0:
            first = {n: worker.sum(v.detach().clone()) / worker.world_size for n, v in losses.items()}
            gradients = {n: p.grad.clone() for n, p in task.model.named_parameters() if p.grad is not None}
        engine.step(1e-2)
    task.model.eval()
    return first, gradients


def whole(table: torch.Tensor, items: np.ndarray, worker: Worker) -> torch.Tensor:
    out = torch.zeros(30, table.shape[1], dtype=table.dtype)
    out[torch.from_numpy(items.copy())] = table.detach()
    return worker.sum(out)


def work(worker: Worker, root: Path, kind: str) -> None:
    partitions = Partitions(root / f"{kind}-{worker.world_size}")
    partition = partitions[worker.rank]
    for name, config in CONFIGS.items():
        owned = OwnedSequences(Catalog(root / "catalog"), np.asarray(partition.users))
        semantic = torch.from_numpy(SEMANTIC[partition.items]).double()
        task = ShardedFusionTask(config, owned, semantic, partitions, worker, 4, 20)
        task.model.double()
        engine = ShardedEngine(task.model, config.optim, worker)
        losses, gradients = steps(task, engine, worker)
        items = task.model.item_indices
        table = gradients.pop("collaborative.weight")
        found = {
            "losses": losses,
            "gradients": gradients,
            "table": whole(table, items, worker),
            "tables": [whole(t, items, worker) for t in task.model.own_tables()],
            "metrics": task.validate(worker),
        }
        if worker.is_main:
            torch.save(found, root / f"{kind}-{worker.world_size}-{name}.pt")


def work_all(worker: Worker, root: Path) -> None:
    for kind in ("random", "uneven"):
        work(worker, root, kind)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("fusion")
    write_tiny_catalog(root / "catalog", SEQUENCES)
    graph = training_interactions(SEQUENCES)
    for count in (1, 2, 4):
        for kind in ("random", "uneven"):
            assignment = assign_nodes("random", graph, count, 0, 60) if kind == "random" else None
            assignment = uneven_assignment(graph, count) if assignment is None else assignment
            blocks = np.random.default_rng(0).integers(4, size=graph.num_nodes) if kind == "uneven" else None
            write_partitions(root / f"{kind}-{count}", graph, assignment, count, kind, blocks)
    work_all(Worker(), root)
    for count in (2, 4):
        run_processes(work_all, count, root)
    return root


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("kind", ["random", "uneven"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_equals_the_single_process_run(done, name, kind, count):
    config, worker = CONFIGS[name], Worker()
    task = FusionTask(config, SEQUENCES, torch.from_numpy(SEMANTIC).double(), worker, 4, 20)
    task.model.double()
    losses, gradients = steps(task, TorchEngine(task.model, config.optim, worker), worker)
    found = torch.load(done / f"{kind}-{count}-{name}.pt", weights_only=True)
    for key, value in losses.items():
        torch.testing.assert_close(found["losses"][key], value, rtol=1e-9, atol=0)
    torch.testing.assert_close(found["table"], gradients.pop("collaborative.weight"), rtol=1e-8, atol=1e-12)
    assert set(found["gradients"]) == set(gradients)
    for key, value in gradients.items():
        torch.testing.assert_close(found["gradients"][key], value, rtol=1e-8, atol=1e-12, msg=key)
    collaborative, adapted, _ = (t.detach() for t in task.model.items())
    torch.testing.assert_close(found["tables"][1], collaborative, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found["tables"][2], adapted, rtol=1e-6, atol=1e-8)
    assert found["metrics"] == task.validate(worker)


@pytest.mark.parametrize("buckets", [0, 3])
def test_owned_batches_are_the_parts_of_the_global_ones(tmp_path, buckets):
    catalog = Catalog(write_tiny_catalog(tmp_path, SEQUENCES))
    reference = PrefixBatches.build(SEQUENCES, 6, 16, 7, buckets, CPU)
    parts = [
        OwnedPrefixBatches(OwnedSequences(catalog, users), 6, 16, 7, buckets, CPU)
        for users in (np.arange(0, 50, 3), np.setdiff1d(np.arange(50), np.arange(0, 50, 3)), np.arange(0))
    ]
    for step in range(2 * reference.order.steps_per_epoch):
        indices = reference.order.batch(step)
        assert all(np.array_equal(part.order.batch(step), indices) for part in parts)
        rows = sorted(row for part in parts for row in as_rows(part.local(indices, Worker())))
        assert rows == sorted(as_rows(reference.local(indices, Worker())))


def as_rows(batch: dict) -> list:
    return [
        (history[mask].tolist(), int(target))
        for history, mask, target in zip(batch["history"], batch["mask"], batch["target"])
    ]


def test_what_cannot_be_sharded_is_refused():
    half = {"optim": OptimConfig(precision="fp16")}
    other = {"backbone": "sasrec", "loss": "full_softmax"}
    for settings in ({"mode": "concat_pca"}, {"mode": "collaborative"}, other, half, {"time_bumps": 4}):
        with pytest.raises(ConfigError, match="shard_tables"):
            check_shardable(FusionConfig(**settings))


def test_a_sharded_artifact_loads_as_a_whole_model(tmp_path):
    config = CONFIGS[next(iter(CONFIGS))]
    model = FusionModel(config, torch.from_numpy(SEMANTIC).float())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    (tmp_path / "collaborative").mkdir()
    write_embeddings(tmp_path / "collaborative", state.pop("collaborative.weight").numpy())
    save_file(state, tmp_path / DENSE)
    loaded = load_fusion(config, SEMANTIC.astype(np.float32), tmp_path)
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].equal(value), name
