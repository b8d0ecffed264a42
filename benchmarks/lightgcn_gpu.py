"""LightGCN on GPUs: kernels and bandwidth on a large graph, NCCL parity on two, quality on real data beside PyG.

Runs in plain processes, needs neither Ray nor DGL.

    python benchmarks/lightgcn_gpu.py kernels --nodes 5000000 --pairs 100000000
    for rank in 0 1; do python benchmarks/lightgcn_gpu.py parity --rank $rank --meet /tmp/meet & done; wait
    python benchmarks/lightgcn_gpu.py quality --sequences FOLDER --epochs 60

Without a GPU the same code runs on the CPU, to try it out; its times then say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from device_rates import copy_bandwidth, seconds, synchronize

from genrec_dist.catalog.dataset import Catalog
from genrec_dist.collaborative.lightgcn_stage import LightgcnTask
from genrec_dist.config import LightgcnConfig, LightgcnOptim
from genrec_dist.evaluation.collaborative import owned_user_ranks
from genrec_dist.evaluation.metrics import rank_metrics
from genrec_dist.graph.interactions import Interactions, training_interactions
from genrec_dist.graph.spmm import make_neighbour_sum
from genrec_dist.graph.stage import Partitions, write_partitions
from genrec_dist.testing.graphs import community_graph
from genrec_dist.training.sharded import ShardedEngine
from genrec_dist.training.worker import Worker

CUDA = torch.cuda.is_available()
GPU = torch.device("cuda", 0) if CUDA else torch.device("cpu")
KERNELS = ("triton", "torch") if CUDA else ("dgl", "torch")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="+", choices=["kernels", "parity", "quality"])
    parser.add_argument("--rank", type=int, default=0, help="of two processes (parity); rank 1 does nothing else")
    parser.add_argument("--meet", type=Path, default=Path("/tmp/lightgcn-parity"), help="file the two meet at")
    parser.add_argument("--nodes", type=int, default=5_000_000)
    parser.add_argument("--pairs", type=int, default=100_000_000)
    parser.add_argument("--batch", type=int, default=4_194_304)
    parser.add_argument("--sequences", type=Path, help="folder with items.parquet and sequences.parquet")
    parser.add_argument("--epochs", type=int, default=60)
    args = parser.parse_args()
    if CUDA and not args.rank:
        print(f"{torch.cuda.get_device_name(0)} x {torch.cuda.device_count()}, torch {torch.__version__}", flush=True)
    for what in args.what:
        if what == "parity" or not args.rank:
            {"kernels": kernels, "parity": parity, "quality": quality}[what](args)


def config_of(batch: int, **more) -> LightgcnConfig:
    optim = LightgcnOptim(batch_size=batch, learning_rate=1e-3)
    return LightgcnConfig(optim=optim, **more)


def make_task(graph: Interactions, folder: Path, worker: Worker, config: LightgcnConfig, kind="auto", **more):
    targets = more.pop("targets", np.full((graph.num_users, 2), -1))
    return LightgcnTask(config, graph, Partitions(folder), targets, worker, 0, kind, **more)


def large_graph(num_users: int, num_items: int, num_pairs: int) -> Interactions:
    """Random pairs with some popular items, sorted on the GPU."""
    torch.manual_seed(0)
    items = (num_items * torch.rand(num_pairs, device=GPU, dtype=torch.float64) ** 2).long()
    keys = torch.unique(torch.randint(num_users, (num_pairs,), device=GPU) * num_items + items)
    user, item = keys // num_items, keys % num_items
    by_item = torch.sort(item, stable=True).indices
    pointers = [torch.cumsum(torch.bincount(x, minlength=n), 0) for x, n in ((user, num_users), (item, num_items))]
    zero = np.zeros(1, np.int64)
    users, items = (np.concatenate([zero, p.cpu().numpy()]) for p in pointers)
    return Interactions(users, item.int().cpu().numpy(), items, user[by_item].int().cpu().numpy())


def kernels(args: argparse.Namespace) -> None:
    """Sums over neighbours by kernel, a training step, and the share of the bandwidth that was measured."""
    clock = time.perf_counter()
    users = args.nodes * 7 // 10
    graph = large_graph(users, args.nodes - users, args.pairs)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_partitions(folder, graph, np.zeros(graph.num_nodes, np.int32), 1, "random")
        partition = Partitions(folder)[0]
        print(f"{graph.num_nodes:,} nodes, {graph.num_pairs:,} pairs, made in {time.perf_counter() - clock:.0f} s")
        ceiling = copy_bandwidth(GPU) if CUDA else 1e10
        print(f"copy: {ceiling / 1e12:.3f} TB/s", flush=True)
        x = torch.randn(graph.num_nodes, 64, device=GPU)
        edges = 2 * graph.num_pairs
        gathered = edges * (64 * 4 + 4) + graph.num_nodes * (64 * 4 + 8)
        once = 2 * graph.num_nodes * 64 * 4 + edges * 4
        wanted = None
        for kind in KERNELS:
            kernel = make_neighbour_sum(partition.indptr, partition.indices, graph.num_nodes, GPU, kind)
            took, found = seconds(lambda k=kernel: k(x)), kernel(x)
            wanted = found if wanted is None else wanted
            print(
                f"sum over neighbours, {kind}: {took * 1e3:.2f} ms; rows gathered {gathered / took / 1e12:.3f} TB/s = "
                f"{gathered / took / ceiling:.2f} of copy; every row once {once / took / ceiling:.2f}; largest "
                f"difference {float((found - wanted).abs().max() / wanted.abs().max()):.1e}",
                flush=True,
            )
            del kernel
        for kind in KERNELS:
            task = make_task(graph, folder, Worker(device=GPU), config_of(args.batch), kind)
            engine = ShardedEngine(task.model, task.config.optim, Worker(device=GPU))
            parts: dict[str, list[float]] = {"batch": [], "train": []}
            for step in range(4):
                synchronize()
                began = time.perf_counter()
                batch = task.batch(task.order.batch(step), Worker(device=GPU))
                synchronize()
                middle = time.perf_counter()
                engine.backward(engine.forward(batch)["loss"])
                engine.step(1e-3)
                synchronize()
                parts["batch"].append(middle - began)
                parts["train"].append(time.perf_counter() - middle)
            made, trained = (float(np.median(parts[n][1:])) for n in ("batch", "train"))
            steps = task.order.steps_per_epoch
            peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0
            print(
                f"step of {args.batch:,} pairs, {kind}: batch {made:.3f} s, forward, backward and Adam {trained:.3f} s "
                f"(its six sums gather {6 * gathered / trained / ceiling:.2f} of copy); epoch of {steps} steps "
                f"{steps * (made + trained):.1f} s; peak {peak:.1f} GiB",
                flush=True,
            )
            del task, engine


PARITY = (12_000, 8_000, 400_000)


def parity(args: argparse.Namespace) -> None:
    """Loss, gradient and trained embeddings of two processes beside one."""
    device = torch.device("cuda", args.rank) if CUDA else GPU
    more = {}
    if CUDA:
        torch.cuda.set_device(device)
        more["device_id"] = device
    backend = "nccl" if CUDA else "gloo"
    dist.init_process_group(backend, init_method=f"file://{args.meet}", rank=args.rank, world_size=2, **more)
    graph = community_graph(*PARITY, communities=8)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        rng = np.random.default_rng(0)
        write_partitions(root / "1", graph, np.zeros(graph.num_nodes, np.int32), 1, "random")
        write_partitions(root / "2", graph, rng.integers(2, size=graph.num_nodes), 2, "random")
        two = {overlap: parity_run(graph, Worker(args.rank, 2, device), root, overlap) for overlap in (False, True)}
        dist.barrier()
        if not args.rank:
            for dtype, results in parity_run(graph, Worker(device=device), root).items():
                for overlap, found in two.items():
                    text = ", ".join(f"{n} {relative(found[dtype][n], value):.1e}" for n, value in results.items())
                    print(f"{backend}, 2 processes against 1, {dtype}, overlap {overlap}: {text}", flush=True)
    dist.destroy_process_group()


def parity_run(
    graph: Interactions, worker: Worker, root: Path, overlap: bool = False
) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
        task = make_task(graph, root / str(worker.world_size), worker, config_of(65536), overlap=overlap)
        task.model.to(dtype)
        engine = ShardedEngine(task.model, task.config.optim, worker)
        results: dict[str, torch.Tensor] = {}
        for step in range(50):
            losses = engine.forward(task.batch(task.order.batch(step), worker))
            engine.backward(losses["loss"])
            if not step:
                results["loss"] = worker.sum(losses["loss"].detach().clone()).cpu()[None] / worker.world_size
                results["gradient"] = whole(task, task.model.table.grad, worker)
            engine.step(1e-3)
        results["after 50 steps"] = whole(task, task.model.embeddings(), worker)
        found[name] = results
    return found


def whole(task: LightgcnTask, local: torch.Tensor, worker: Worker) -> torch.Tensor:
    table = torch.zeros(task.partitions.offsets[-1], local.shape[1], dtype=local.dtype, device=worker.device)
    table[torch.from_numpy(task.model.nodes).to(worker.device)] = local.detach()
    return worker.sum(table).cpu()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def quality(args: argparse.Namespace) -> None:
    """Recall of ours and of PyG's LightGCN with the same starting values, batches and settings."""
    from torch_geometric.nn.models import LightGCN

    sequences = Catalog(args.sequences).sequences
    graph = training_interactions(sequences)
    held = np.stack([np.where(p >= 0, sequences.items[np.maximum(p, 0)], -1) for p in sequences.split_ends()[1:]], 1)
    worker = Worker(device=GPU)
    torch.set_num_threads(min(8, os.cpu_count() or 1))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_partitions(folder, graph, np.zeros(graph.num_nodes, np.int32), 1, "random")
        task = make_task(graph, folder, worker, config_of(2048), targets=held)
        users = np.repeat(np.arange(graph.num_users), np.diff(graph.user_indptr))
        pairs = torch.from_numpy(np.stack([users, graph.num_users + graph.user_items.astype(np.int64)])).to(GPU)
        edges = torch.cat([pairs, pairs.flip(0)], 1)
        reference = LightGCN(graph.num_nodes, task.config.dim, task.config.num_layers).to(GPU)
        with torch.no_grad():
            reference.embedding.weight.copy_(task.model.table)
        optimizer = torch.optim.Adam(reference.parameters(), lr=1e-3, fused=True)
        engine = ShardedEngine(task.model, task.config.optim, worker)
        spent = {"ours": 0.0, "PyG": 0.0}
        for step in range(args.epochs * task.order.steps_per_epoch):
            batch = task.pairs.local(task.order.batch(step))
            local = task.model.localize(batch, step)
            offsets = (0, graph.num_users, graph.num_users)
            rows = [n.ravel() + o for n, o in zip((batch.users, batch.positives, batch.negatives), offsets)]
            synchronize()
            began = time.perf_counter()
            engine.backward(engine.forward(local)["loss"])
            engine.step(1e-3)
            synchronize()
            middle = time.perf_counter()
            labels = torch.cat([torch.stack(rows[:2]), torch.stack([rows[0], rows[2]])], 1)
            ranks = reference(edges, labels)
            loss = reference.recommendation_loss(
                *ranks.chunk(2), node_id=torch.cat(rows), lambda_reg=task.config.l2 / 2
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            synchronize()
            spent["ours"] += middle - began
            spent["PyG"] += time.perf_counter() - middle
            epoch, rest = divmod(step + 1, task.order.steps_per_epoch)
            if rest == 0 and (epoch % max(1, args.epochs // 4) == 0):
                with torch.no_grad():
                    tables = {"ours": task.model.embeddings(), "PyG": reference.get_embedding(edges)}
                for who, table in tables.items():
                    every, left = owned_user_ranks(table, task.partitions, worker, held[:, 1])
                    shown = {f"all items {k}": round(v, 5) for k, v in rank_metrics(every, [10, 20]).items()}
                    shown |= {f"seen left out {k}": round(v, 5) for k, v in rank_metrics(left, [10, 20]).items()}
                    print(f"epoch {epoch} {who}: {json.dumps(shown)}, training {spent[who]:.1f} s", flush=True)


if __name__ == "__main__":
    main()
