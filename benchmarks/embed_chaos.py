"""The embedding stage on a Ray cluster whose workers and nodes are killed, beside a run without faults.

Nodes are raylets on this machine. A worker is killed every few seconds; after a third of the shards a node is removed
and another added; after two thirds all worker nodes are removed and new ones added. At the end ids must be complete
and every byte of the array must equal that of the run without faults.

The engine `tiny` sleeps a thirtieth of a second a batch, as a host does whose GPU works, and starts at once: it shows
what this project adds to a lost worker. `llama` is a tiny Llama in transformers, whose start takes seconds of a core.

    python benchmarks/embed_chaos.py --shards 1000 --kill-seconds 5
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

from genrec_dist.artifacts.embeddings import num_shards, pending_shards
from genrec_dist.artifacts.reader import EmbeddingStore
from genrec_dist.cluster import leave_ray, loopback_only
from genrec_dist.config import RuntimeConfig, SemanticConfig
from genrec_dist.pipeline import StageContext
from genrec_dist.semantic import ray_workers
from genrec_dist.semantic.stage import embed_catalog
from genrec_dist.testing.tiny_encoders import write_tiny_encoder
from genrec_dist.testing.tiny_engine import GpuTinyEmbedder


def write_items(folder: Path, num_items: int) -> None:
    """A catalog of made-up titles of different lengths."""
    rng = np.random.default_rng(0)
    words = ["red", "blue", "soft", "large", "cream", "brush", "polish", "set", "of", "organic", "travel"]
    titles = [f"{n} " + " ".join(rng.choice(words, rng.integers(4, 20))) for n in range(num_items)]
    nothing = pa.nulls(num_items, pa.string())
    columns = {
        "item_index": pa.array(np.arange(num_items, dtype=np.int32)),
        "item_id": pa.array([f"I{n:08d}" for n in range(num_items)]),
        "title": pa.array(titles),
        "brand": nothing,
        "categories": pa.nulls(num_items, pa.list_(pa.string())),
        "description": nothing,
    }
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "items.parquet", row_group_size=65_536)


class Chaos:
    """Kills workers all the time, and nodes twice.

    Args:
        cluster: ray.cluster_utils.Cluster with two worker nodes.
        out: work folder of the stage.
        num_items: rows.
        rows: rows of a shard.
        every: seconds between kills.
    """

    def __init__(self, cluster, out: Path, num_items: int, rows: int, every: float) -> None:
        self.cluster, self.out, self.num_items, self.rows, self.every = cluster, out, num_items, rows, every
        self.total = num_shards(num_items, rows)
        self.kills = 0
        self.events: list[str] = []

    def done(self) -> float:
        return 1 - len(pending_shards(self.out, self.num_items, self.rows)) / self.total

    def watch(self, driver: subprocess.Popen) -> None:
        """Do harm until the driver ends."""
        rng = np.random.default_rng(0)
        one = everything = False
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                driver.wait(self.every)
                return
            share = self.done()
            if share > 1 / 3 and not one:
                one = True
                self.lose(self.nodes()[:1])
            elif share > 2 / 3 and not everything:
                everything = True
                self.lose(self.nodes())
            elif share > 0:
                self.kill(rng)

    def nodes(self) -> list:
        return list(self.cluster.worker_nodes)

    def lose(self, nodes: list) -> None:
        """Remove nodes without warning, and put as many new ones in their place."""
        self.events.append(f"{len(nodes)} node(s) removed at {self.done():.0%}")
        print(self.events[-1], flush=True)
        for node in nodes:
            self.cluster.remove_node(node, allow_graceful=False)
        time.sleep(2)
        for _ in nodes:
            add_node(self.cluster)

    def kill(self, rng: np.random.Generator) -> None:
        """Kill one worker that embeds."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if "MapWorker(MapBatches(" in " ".join(process.cmdline()):
                    found.append(process.pid)
        if found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(rng.choice(found)), signal.SIGKILL)
                self.kills += 1


def add_node(cluster) -> None:
    with loopback_only():
        cluster.add_node(num_cpus=1, object_store_memory=100 << 20, node_ip_address="127.0.0.1")


def run(root: Path, name: str, args: argparse.Namespace, chaos: bool) -> dict:
    """One run of the stage, in a process of its own, on a cluster of a head without cores and two worker nodes."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": 200 << 20, "node_ip_address": "127.0.0.1"}
    with loopback_only():
        cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        add_node(cluster)
    out = root / name
    out.mkdir()
    trouble = Chaos(cluster, out, args.shards * args.rows, args.rows, args.kill_seconds)
    options = [
        "--engine",
        args.engine,
        "--rows",
        args.rows,
        "--driver",
        cluster.address,
        "--root",
        root,
        "--name",
        name,
    ]
    began = time.time()
    with open(root / f"{name}.log", "w", encoding="utf-8") as log:
        driver = subprocess.Popen([sys.executable, __file__, *map(str, options)], stdout=log, stderr=log)
        try:
            if chaos:
                trouble.watch(driver)
            driver.wait()
        finally:
            driver.kill()
    seconds = time.time() - began
    cluster.shutdown()
    if driver.returncode:
        raise SystemExit(f"{name} failed:\n{(root / f'{name}.log').read_text()[-3000:]}")
    first = min(file.stat().st_mtime for file in (out / "shards").glob("*.json"))
    result = {"run": name, "seconds": round(seconds, 1), "from_first_shard": round(began + seconds - first, 1)}
    result |= {"kills": trouble.kills, "events": trouble.events}
    print(json.dumps(result), flush=True)
    return result


def drive(args: argparse.Namespace) -> None:
    """The stage itself, as a driver that joins the cluster."""
    if args.engine == "tiny":
        ray_workers.ShardEmbedder = GpuTinyEmbedder  # type: ignore[misc]
    settings = SemanticConfig(
        engine="transformers",
        model=str(args.root / "model"),
        template="{title}",
        rows_per_shard=args.rows,
        max_tokens=128,
    )
    runtime = RuntimeConfig(ray_address=args.driver, num_embed_workers=2, num_threads=1, device="cpu", max_failures=5)
    context = StageContext(
        out=args.root / args.name,
        inputs={"catalog": args.root / "catalog"},
        runtime=runtime,
        events_file=args.root / f"{args.name}.jsonl",
    )
    embed_catalog(context, settings)
    leave_ray()


def compare(root: Path, num_items: int) -> None:
    """Ids exact, ledger empty, bytes equal.

    Raises:
        SystemExit: they are not.
    """
    a, b = root / "calm", root / "chaos"
    for folder in (a, b):
        store = EmbeddingStore(folder)
        problems = store.verify()
        if problems or len(store.failed) or store.num_items != num_items:
            raise SystemExit(f"{folder.name}: {problems} {store.failed[:5]}")
    files, others = _array_files(a), _array_files(b)
    different = [str(p) for p in files if (a / p).read_bytes() != (b / p).read_bytes()]
    if different or files != others:
        raise SystemExit(f"{len(different)} of {len(files)} files differ: {different[:5]}; {len(others)} in the other")
    print(f"{len(files)} files equal to the byte, {num_items:,} ids each once, ledger empty")


def _array_files(folder: Path) -> list[Path]:
    """Files of the array; what a killed writer left half-written is dropped when an artifact is finished."""
    files = (p.relative_to(folder) for p in (folder / "embeddings.zarr").rglob("*") if p.is_file())
    return sorted(p for p in files if p.suffix != ".partial")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=32, help="rows of a shard")
    parser.add_argument("--engine", choices=("tiny", "llama"), default="tiny")
    parser.add_argument("--kill-seconds", type=float, default=5.0)
    for name in ("--driver", "--name"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.driver:
        drive(args)
        return
    root = Path(tempfile.mkdtemp(prefix="chaos-"))
    write_items(root / "catalog", args.shards * args.rows)
    write_tiny_encoder(root / "model", "llama")
    calm = run(root, "calm", args, chaos=False)
    chaos = run(root, "chaos", args, chaos=True)
    compare(root, args.shards * args.rows)
    ratio = chaos["seconds"] / calm["seconds"]
    print(
        f"{args.shards} shards: {chaos['kills']} workers killed, {'; '.join(chaos['events'])}; time ratio {ratio:.2f}"
    )


if __name__ == "__main__":
    main()
