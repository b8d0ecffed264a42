"""LightGCN on a CPU: one worker beside PyG and torch.sparse, and two workers of one thread beside one of two threads.

A step is a batch of pairs with its negatives, the propagation over the whole graph, BPR and L2, the backward pass and
Adam; every variant trains on the same batches, in a process of its own, and the rounds are interleaved.

    python benchmarks/lightgcn.py --graph beauty --batch 2048
    python benchmarks/lightgcn.py --graph synthetic --batch 1048576 --steps 2 --workers
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F

from genrec_dist.artifacts.files import read_json, write_json
from genrec_dist.catalog.dataset import Catalog
from genrec_dist.collaborative.lightgcn_stage import LightgcnTask
from genrec_dist.config import LightgcnConfig, LightgcnOptim
from genrec_dist.graph.interactions import FILES, Interactions, training_interactions
from genrec_dist.graph.locality import neighbour_blocks
from genrec_dist.graph.partitioners import assign_nodes, partition_report
from genrec_dist.graph.stage import Partitions, write_partitions
from genrec_dist.testing.graphs import community_graph
from genrec_dist.testing.processes import run_processes
from genrec_dist.training.sharded import ShardedEngine
from genrec_dist.training.worker import Worker

MEMORY_LIMIT = 17 << 30
BLOCK_NODES = 8192
RATE = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--graph", default="synthetic", help="synthetic, or a folder with a catalog artifact")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument(
        "--steps", type=int, default=10, help="timed steps of a variant and round, after one of warm-up"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--nodes", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=10_000_000)
    parser.add_argument("--communities", type=int, default=64)
    parser.add_argument("--mixing", type=float, default=0.05)
    parser.add_argument("--workers", action="store_true", help="compare numbers of workers instead of libraries")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        run_variant(args)
        return
    with tempfile.TemporaryDirectory() as name:
        args.folder = Path(name)
        graph = make_graph(args)
        print(f"{graph.num_users:,} users, {graph.num_items:,} items, {graph.num_pairs:,} pairs; batch {args.batch:,}")
        report = cut(graph, args)
        if args.workers:
            print(json.dumps({k: report[k] for k in ("edge_cut", "balance", "parts")}), flush=True)
        compare(graph, report, args)


def make_graph(args: argparse.Namespace) -> Interactions:
    """The graph, as files that the variants map into memory."""
    if args.graph == "synthetic":
        users = args.nodes * 7 // 10
        graph = community_graph(users, args.nodes - users, args.pairs, communities=args.communities, mixing=args.mixing)
    else:
        graph = training_interactions(Catalog(Path(args.graph)).sequences)
    for name in FILES:
        np.save(args.folder / f"{name}.npy", getattr(graph, name), allow_pickle=False)
    return graph


def cut(graph: Interactions, args: argparse.Namespace) -> dict:
    """Partitions for one worker and for two; what the cut costs."""
    nothing = np.zeros(graph.num_nodes, np.int32)
    write_partitions(args.folder / "1", graph, nothing, 1, "random")
    began = time.monotonic()
    blocks = neighbour_blocks(graph, nothing, 1, BLOCK_NODES, 3600)
    print(f"blocks, 1 part: {time.monotonic() - began:.1f} s", flush=True)
    write_partitions(args.folder / "1-blocks", graph, nothing, 1, "random", blocks)
    if not args.workers:
        return {}
    began = time.monotonic()
    assignment = assign_nodes("pymetis", graph, 2, 0)
    print(f"2 parts: {time.monotonic() - began:.1f} s", flush=True)
    parts = write_partitions(args.folder / "2", graph, assignment, 2, "pymetis")
    blocks = neighbour_blocks(graph, assignment, 2, BLOCK_NODES, 3600)
    write_partitions(args.folder / "2-blocks", graph, assignment, 2, "pymetis", blocks)
    return partition_report(graph, assignment, 2, parts)


def compare(graph: Interactions, report: dict, args: argparse.Namespace) -> None:
    """Run the variants in turn and print medians and ratios."""
    if args.workers:
        variants = [
            "1 worker, 2 threads",
            "2 workers, 1 thread",
            "2 workers, 1 thread, overlap",
            "1 worker, 2 threads, blocks",
            "2 workers, 1 thread, blocks",
        ]
    else:
        variants = ["ours, blocks, dgl", "ours, dgl", "ours, torch", "torch.sparse", "PyG, CSR", "PyG, edge index"]
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    facts: dict[str, dict] = {}
    for turn in range(args.rounds):
        for name in variants[turn % len(variants) :] + variants[: turn % len(variants)]:
            if name in facts and "failed" in facts[name]:
                continue
            command = [sys.executable, __file__, *sys.argv[1:], "--variant", name, "--folder", str(args.folder)]
            run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(name, args))
            if run.returncode:
                facts[name] = {"failed": (run.stderr.strip().splitlines() or ["killed"])[-1][:120]}
                continue
            facts[name] = read_json(args.folder / "result.json")
            seconds[name].append(facts[name]["seconds"])
    steps = -(-graph.num_pairs // args.batch)
    print(f"{'variant':<32}{'s/step':>9}{'s/epoch':>10}{'peak GiB':>10}  rounds")
    for name in variants:
        if "failed" in facts[name]:
            print(f"{name:<32}  failed: {facts[name]['failed']}")
            continue
        rounds = ", ".join(f"{s:.4f}" for s in seconds[name])
        step = median(seconds[name])
        print(f"{name:<32}{step:>9.4f}{step * steps:>10.2f}{facts[name]['peak_gib']:>10.2f}  {rounds}")
        if "exchange" in facts[name]:
            print(f"{'':<32}{json.dumps(facts[name]['exchange'])}")
    base = median(seconds[variants[0]])
    for name in variants[1:]:
        if seconds[name]:
            print(f"ratio {variants[0]} / {name}: {base / median(seconds[name]):.2f}", end="   ")
            print(f"(inverse {median(seconds[name]) / base:.2f})")


def environment(name: str, args: argparse.Namespace) -> dict[str, str]:
    threads = "1" if name.startswith("2 workers") else str(args.threads)
    return os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


def settings(args: argparse.Namespace) -> LightgcnConfig:
    optim = LightgcnOptim(batch_size=args.batch, learning_rate=RATE)
    return LightgcnConfig(optim=optim)


def run_variant(args: argparse.Namespace) -> None:
    """One variant in this process; leaves result.json."""
    if args.variant.startswith("2 workers"):
        run_processes(time_ours, 2, args)
        return
    torch.set_num_threads(args.threads)
    if args.variant.startswith(("ours", "1 worker")):
        time_ours(Worker(), args)
        return
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    time_reference(args)


def make_task(worker: Worker, args: argparse.Namespace, kind: str = "dgl", overlap: bool = False) -> LightgcnTask:
    graph = Interactions.load(args.folder)
    partitions = Partitions(args.folder / f"{worker.world_size}{'-blocks' if 'blocks' in args.variant else ''}")
    targets = np.full((graph.num_users, 2), -1)
    return LightgcnTask(settings(args), graph, partitions, targets, worker, 0, kind, overlap)


def time_ours(worker: Worker, args: argparse.Namespace) -> None:
    task = make_task(
        worker, args, "torch" if args.variant.endswith("torch") else "dgl", args.variant.endswith("overlap")
    )
    engine = ShardedEngine(task.model, task.config.optim, worker)
    times = []
    for step in range(args.steps + 1):
        worker.barrier()
        began = time.perf_counter()
        engine.backward(engine.forward(task.batch(task.order.batch(step), worker))["loss"])
        engine.step(RATE)
        worker.barrier()
        times.append(time.perf_counter() - began)
    peak = torch.tensor(float(peak_gib()))
    if worker.world_size > 1:
        torch.distributed.all_reduce(peak, torch.distributed.ReduceOp.MAX)
    if worker.is_main:
        found = {"seconds": median(times[1:]), "peak_gib": float(peak)}
        partition, propagation = task.model.partition, task.model.propagation
        if worker.world_size > 1:
            found["exchange"] = {
                "owned rows": partition.num_owned,
                "halo rows": len(partition.halo),
                "MiB received a step for halos, forward and backward": round(
                    2 * propagation.bytes_per_application * task.config.dim / 2**20, 1
                ),
                "MiB of a worker's table and halo": round(
                    4 * task.config.dim * (partition.num_owned + len(partition.halo)) / 2**20, 1
                ),
            }
        write_json(args.folder / "result.json", found)


def time_reference(args: argparse.Namespace) -> None:
    """PyG or torch.sparse on the same batches."""
    task = make_task(Worker(), args)
    graph, config = Interactions.load(args.folder), task.config
    users = np.repeat(np.arange(graph.num_users), np.diff(graph.user_indptr))
    pairs = torch.from_numpy(np.stack([users, graph.num_users + np.asarray(graph.user_items, np.int64)]))
    edges = torch.cat([pairs, pairs.flip(0)], 1)
    table = torch.nn.Parameter(task.model.table.detach().clone())
    if args.variant.startswith("PyG"):
        from torch_geometric.nn.models import LightGCN
        from torch_geometric.utils import to_torch_csr_tensor

        model = LightGCN(graph.num_nodes, config.dim, config.num_layers)
        model.embedding.weight = table
        adjacency = edges if args.variant.endswith("index") else to_torch_csr_tensor(edges, size=(graph.num_nodes,) * 2)
        propagate = lambda: model.get_embedding(adjacency)  # noqa: E731
    else:
        degree = torch.from_numpy(graph.node_degrees()).double().clamp(min=1)
        values = (degree[edges[0]] * degree[edges[1]]).rsqrt().float()
        matrix = torch.sparse_coo_tensor(edges, values, (graph.num_nodes,) * 2).coalesce().to_sparse_csr()
        propagate = lambda: sparse_propagation(matrix, table, config.num_layers)  # noqa: E731
    optimizer = torch.optim.Adam([table], lr=RATE, fused=True)
    times = []
    for step in range(args.steps + 1):
        began = time.perf_counter()
        batch = task.pairs.local(task.order.batch(step))
        offsets = (0, graph.num_users, graph.num_users)
        nodes = [n.ravel() + o for n, o in zip((batch.users, batch.positives, batch.negatives), offsets)]
        rows = propagate()
        user, positive, negative = (rows[n] for n in nodes)
        loss = F.softplus(((negative - positive) * user).sum(1)).mean()
        loss = loss + config.l2 * 0.5 * table[torch.cat(nodes)].square().sum() / batch.size
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - began)
    write_json(args.folder / "result.json", {"seconds": median(times[1:]), "peak_gib": peak_gib()})


def sparse_propagation(matrix: torch.Tensor, table: torch.Tensor, num_layers: int) -> torch.Tensor:
    layer = total = table
    for _ in range(num_layers):
        layer = matrix @ layer
        total = total + layer
    return total / (num_layers + 1)


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
