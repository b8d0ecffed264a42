"""k-means beside faiss and scikit-learn; trees of codes in memory, under a memory cap, and as rows grow; tries of them.

    python benchmarks/kmeans.py faiss    [--rows 1000000] [--rounds 3] [--sklearn]
    python benchmarks/kmeans.py tree     [--rows 1000000] [--task-mib 256]
    python benchmarks/kmeans.py stream   [--rows 8000000] [--cap-gib 2] [--folder DIR] [--check]
    python benchmarks/kmeans.py growth   [--sizes 125000,250000,500000,1000000,2000000]
    python benchmarks/kmeans.py balanced [--rows 200000]
    python benchmarks/kmeans.py trie     [--rows 1000000]
    python benchmarks/kmeans.py build    ...one tree in this process: what the others start, and what to profile

Rows are drawn from a mixture of Gaussians: 1000 means N(0, 1) in each of 128 coordinates, noise N(0, 1), float32. Each
command prints a table and one line of JSON. `stream` needs disk for twice the rows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from genrec_dist.artifacts.embeddings import stream_embeddings
from genrec_dist.identifiers.crew import LocalCrew
from genrec_dist.identifiers.hierarchical import TreeOptions, build_tree
from genrec_dist.identifiers.kmeans import KMeansOptions, kmeans
from genrec_dist.identifiers.points import LocalPoints
from genrec_dist.identifiers.rows import ArrayRows, RowSource, unit
from genrec_dist.identifiers.trie import Trie, build_trie

BLOCK = 2048
POLL_SECONDS = 0.02
LEAST_CAP = 1 << 29
CGROUPS = Path("/sys/fs/cgroup")


class Mixture:
    """Rows of a mixture of Gaussians; each block of rows has a generator of its own, so any range can be made alone."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.rows, self.seed = args.rows, args.seed
        self.means = np.random.default_rng([args.seed, 0]).standard_normal((args.components, args.dim), np.float32)

    def range(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop - 1, (n, dim) float32."""
        out = np.empty((stop - start, self.means.shape[1]), np.float32)
        for low in range(start - start % BLOCK, stop, BLOCK):
            rng = np.random.default_rng([self.seed, 1, low // BLOCK])
            block = rng.standard_normal((BLOCK, self.means.shape[1]), np.float32)
            block += self.means[rng.integers(len(self.means), size=BLOCK)]
            first, last = max(start, low), min(stop, low + BLOCK)
            out[first - start : last - start] = block[first - low : last - low]
        return out

    def all(self) -> np.ndarray:
        return self.range(0, self.rows)


def report(facts: dict[str, Any], header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A markdown table, and everything as a line of JSON."""
    for line in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(str(cell) for cell in line) + " |")
    print(json.dumps(facts), flush=True)


def timed(work: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    found = work(*args, **options)
    return found, time.perf_counter() - began


def facts_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if isinstance(value, (str, int, float))}


# One k-means


def nearest_objective(values: np.ndarray, centroids: np.ndarray) -> float:
    """Sum of squared distances to the nearest centroid, all in float64."""
    wide, total = centroids.astype(np.float64), 0.0
    half = (wide**2).sum(1) / 2
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK].astype(np.float64)
        total += float((block**2).sum() + 2 * (half - block @ wide.T).min(1).sum())
    return total


def label_objective(values: np.ndarray, labels: np.ndarray, num_clusters: int) -> tuple[float, np.ndarray]:
    """Sum of squared distances to the means of clusters, in float64, and those means."""
    sums, squares = np.zeros((num_clusters, values.shape[1])), 0.0
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK].astype(np.float64)
        np.add.at(sums, labels[start : start + BLOCK], block)
        squares += float((block**2).sum())
    means = sums / np.maximum(np.bincount(labels, minlength=num_clusters), 1)[:, None]
    return squares - float((sums * means).sum()), means


def start_of(values: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    chosen = np.random.default_rng([args.seed, 2]).choice(len(values), args.clusters, replace=False)
    return values[chosen]


def faiss_command(args: argparse.Namespace) -> None:
    """Lloyd's iteration from the same start; ours ends with labels, so faiss is also timed with an assignment added."""
    import faiss

    faiss.omp_set_num_threads(args.threads)
    values = Mixture(args).all()
    start = start_of(values, args)
    labelling: list[float] = []

    def ours() -> np.ndarray:
        options = KMeansOptions(iterations=args.iterations, tolerance=0)
        return kmeans(LocalPoints(ArrayRows(values), args.threads), args.clusters, options, centroids=start).centroids

    def theirs() -> np.ndarray:
        model = faiss.Kmeans(args.dim, args.clusters, niter=args.iterations, max_points_per_centroid=args.rows)
        model.train(values, init_centroids=start)
        assert model.centroids is not None
        return model.centroids

    def sklearn() -> np.ndarray:
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits

        with threadpool_limits(args.threads):
            model = KMeans(args.clusters, init=start, n_init=1, max_iter=args.iterations, tol=0, algorithm="lloyd")
            return model.fit(values).cluster_centers_

    variants = {"ours": ours, "faiss": theirs} | ({"scikit-learn": sklearn} if args.sklearn else {})
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    centroids: dict[str, np.ndarray] = {}
    names = list(variants)
    for turn in range(args.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            used = time.process_time()
            centroids[name], spent = timed(variants[name])
            seconds[name].append(spent)
            cpu[name].append(time.process_time() - used)
            print(f"round {turn + 1}, {name}: {spent:.2f} s", file=sys.stderr, flush=True)
        index = faiss.IndexFlatL2(args.dim)
        index.add(centroids["faiss"])
        labelling.append(timed(index.search, values, 1)[1])
    seconds["faiss with labels"] = [a + b for a, b in zip(seconds["faiss"], labelling)]
    objective = {name: nearest_objective(values, found) for name, found in centroids.items()}
    objective["faiss with labels"] = objective["faiss"]
    rows, ratios = [], {}
    for name, each_round in seconds.items():
        shares = [a / b for a, b in zip(seconds["ours"], each_round)]
        ratios[name] = {"seconds": median(shares), "objective": objective["ours"] / objective[name]}
        cells = [name, ", ".join(f"{s:.2f}" for s in each_round), f"{median(cpu[name]):.2f}" if name in cpu else ""]
        rows.append([*cells, f"{median(shares):.3f}", f"{objective[name]:.6g}", f"{ratios[name]['objective']:.6f}"])
    facts = facts_of(args) | {"seconds": seconds, "cpu_seconds": cpu, "objectives": objective, "ours_by": ratios}
    header = [
        "",
        "seconds of each round",
        "CPU seconds, median",
        "ours / it, median of rounds",
        "objective",
        "ours / it",
    ]
    report(facts, header, rows)


def balanced_command(args: argparse.Namespace) -> None:
    """Each variant's clusters are judged alike: by their means, of the rows and of the rows at length 1."""
    values = Mixture(args).all()
    scaled = unit(values)
    start = start_of(values, args)
    rows, facts, base = [], facts_of(args), (0.0, 0.0, 0.0)
    for name, balanced, metric in (
        ("plain", False, "euclidean"),
        ("balanced", True, "euclidean"),
        ("cosine", False, "cosine"),
        ("cosine, balanced", True, "cosine"),
    ):
        options = KMeansOptions(iterations=args.iterations, tolerance=0, balanced=balanced, metric=metric)
        data, first = (values, start) if metric == "euclidean" else (scaled, unit(start))
        points = LocalPoints(ArrayRows(data), args.threads)
        found, spent = timed(kmeans, points, args.clusters, options, centroids=first)
        error = label_objective(values, found.labels, args.clusters)[0]
        # at length 1 the best centroid of a cluster is its mean at length 1: n - 2 sum |S| + n
        means = label_objective(scaled, found.labels, args.clusters)[1]
        angle = float(2 * (len(values) - (np.linalg.norm(means, axis=1) * found.sizes).sum()))
        base = base if any(base) else (spent, error, angle)
        shares = [a / b for a, b in zip((spent, error, angle), base)]
        sizes = [int(found.sizes.min()), int(found.sizes.max())]
        iterations = len(found.objective) - 1
        rows.append(
            [name, f"{spent:.2f}", iterations, *(f"{share:.3f}" for share in shares), f"{sizes[0]}..{sizes[1]}"]
        )
        facts[name] = {"seconds": spent, "iterations": iterations, "ratios": shares, "sizes": sizes}
        facts[name] |= {"course": found.objective, "imbalance": found.imbalance}
    header = ["", "seconds", "iterations", "seconds / plain", "objective / plain", "by cosine / plain", "sizes"]
    report(facts, header, rows)


# Whole trees, each in a process of its own


def memory(process: int | str = "self") -> dict[str, int]:
    """Bytes by name of /proc/PID/status; empty when the process has ended. Peak: VmHWM, as ru_maxrss of a process also
    counts what its parent held when it was started."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    lines = (line.split() for line in text.splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


def build_command(args: argparse.Namespace) -> None:
    """One tree, in this process; prints JSON."""
    source: Any
    if args.store is None:
        base = memory()["VmRSS"]
        source = ArrayRows(Mixture(args).all())
    else:
        source = RowSource(tables={"t": args.store})
        source.open()  # imports what reading takes
        base = memory()["VmRSS"]
    loaded = memory()["VmRSS"]
    options = TreeOptions(args.clusters, args.seed, KMeansOptions(args.iterations, args.tolerance), args.task_mib << 20)
    crew = LocalCrew(args.threads, args.resident_bytes)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        cpu = time.process_time()
        tree, spent = timed(build_tree, source, options, crew, Path(scratch))
        cpu = time.process_time() - cpu
    if args.codes is not None:
        np.savez(args.codes, codes=tree.codes, depth=tree.depth)
    facts = {
        "seconds": spent,
        "cpu_seconds": cpu,
        "depth": int(tree.depth.max()),
        "mean_depth": float(tree.depth.mean()),
        "splits": len(tree.splits),
        "centroids": sum(len(split.centroids) for split in tree.splits),
        "base": base,
        "loaded": loaded,
        "peak": memory()["VmHWM"],
        "codes": hashlib.sha256(tree.codes.tobytes()).hexdigest()[:16],
    }
    print(json.dumps(facts))


def built(args: argparse.Namespace, cap: int | None = None, **changes: Any) -> dict[str, Any]:
    """What `build` prints, and the peak of anonymous memory, looked at every 20 ms.

    Args:
        cap: bytes of memory that the process may have.
        changes: options that differ from `args`.
    """
    given = vars(args) | changes
    names = "rows dim components clusters seed threads iterations tolerance task_mib resident_bytes folder store codes"
    options = [f"--{n.replace('_', '-')}={given[n]}" for n in names.split() if given.get(n) is not None]
    with capped(cap, args) as (enforced, enter):
        process = subprocess.Popen(
            [sys.executable, __file__, "build", *options], stdout=subprocess.PIPE, text=True, preexec_fn=enter
        )
        peaks = {"RssAnon": 0, "VmData": 0}
        try:
            while process.poll() is None:
                now = memory(process.pid)
                peaks = {name: max(peak, now.get(name, 0)) for name, peak in peaks.items()}
                if cap is not None and peaks["RssAnon"] > cap:
                    raise SystemExit(
                        f"FAILED: {peaks['RssAnon']:,} bytes of anonymous memory, cap {cap:,} ({enforced})"
                    )
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()
            out = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"FAILED: exit code {process.returncode}, memory cap {enforced}")
    return json.loads(out) | {"peak_anonymous": peaks["RssAnon"], "peak_data": peaks["VmData"], "cap": enforced}


@contextmanager
def capped(cap: int | None, args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], None] | None]]:
    """How the cap is enforced, and what a new process calls to be held to it.

    A cgroup (v2) counts the page cache too, which the kernel takes back when it must. Where none can be made, the limit
    is on private writable memory (RLIMIT_DATA), touched or not; maps of files do not count, unlike under RLIMIT_AS.
    """
    if cap is None:
        yield "none", None
        return
    parent = args.cgroup or own_cgroup()
    group = parent / f"kmeans-{os.getpid()}"
    try:
        if "memory" not in (parent / "cgroup.subtree_control").read_text().split():
            raise OSError("no memory controller below")
        group.mkdir()
    except OSError:
        yield "RLIMIT_DATA", lambda: resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))
        return
    try:
        (group / "memory.max").write_text(str(cap))
        if (group / "memory.swap.max").exists():
            (group / "memory.swap.max").write_text("0")
        yield "cgroup memory.max", lambda: _enter(group)
    finally:
        group.rmdir()


def _enter(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


def own_cgroup() -> Path:
    """Folder of this process's cgroup of version 2."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return CGROUPS / next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"


def tree_command(args: argparse.Namespace) -> None:
    """Each number of threads in a process of its own that makes its rows, so that they are in memory once."""
    size, rows, facts = 4 * args.rows * args.dim, [], facts_of(args)
    if size <= args.task_mib << 20:
        print(f"the rows fit one task of {args.task_mib} MiB, which is grown by one thread\n")
    for threads in args.variants:
        found = built(args, threads=threads)
        facts[f"threads_{threads}"] = found
        first = facts[f"threads_{args.variants[0]}"]
        cells = [f"{found['seconds']:.1f}", f"{first['seconds'] / found['seconds']:.2f}", f"{found['cpu_seconds']:.1f}"]
        cells += [found["depth"], found["splits"], *(mib(found[name]) for name in ("base", "loaded", "peak"))]
        cells += [f"{found['peak'] / size:.2f}", f"{(found['peak'] - found['base']) / size:.2f}"]
        rows.append([threads, *cells, "same" if found["codes"] == first["codes"] else "DIFFERENT"])
    header = [
        "threads",
        "seconds",
        "speedup",
        "CPU seconds",
        "depth",
        "splits",
        "base MiB",
        "with rows MiB",
        "peak MiB",
    ]
    report(facts, [*header, "peak / rows", "(peak - base) / rows", "codes"], rows)


def stream_command(args: argparse.Namespace) -> None:
    """Rows in an embedding table, read anew in every pass, under a cap on memory."""
    size, cap = 4 * args.rows * args.dim, int(args.cap_gib * 2**30)
    if cap < LEAST_CAP:
        raise SystemExit(f"--cap-gib {args.cap_gib}: the imports alone take about 0.4, give at least 0.5")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        (folder / "scratch").mkdir()
        writing = timed(stream_embeddings, folder / "table", args.rows, args.dim, Mixture(args).range)[1]
        found = built(args, cap, store=folder / "table", folder=folder / "scratch", resident_bytes=0)
    facts = facts_of(args) | found | {"writing": writing, "bytes": size}
    cells = [mib(size), found["cap"], mib(cap), f"{found['seconds']:.1f}", found["depth"], found["splits"]]
    cells += [mib(found[name]) for name in ("base", "peak_anonymous", "peak_data", "peak")]
    header = ["rows MiB", "enforced by", "cap MiB", "seconds", "depth", "splits", "base MiB", "peak anonymous MiB"]
    header += ["peak private MiB, touched or not", "peak MiB, mapped files too"]
    if args.check:
        kept = built(args)
        facts["in_memory"] = kept
        cells += [
            f"{found['seconds'] / kept['seconds']:.2f}",
            "same" if kept["codes"] == found["codes"] else "DIFFERENT",
        ]
        header += ["seconds / from memory", "codes"]
    report(facts, header, [cells])


def growth_command(args: argparse.Namespace) -> None:
    """Exponent of a straight line through the logarithms of seconds and rows.

    Tasks are small, so that trees of all sizes begin with a split by all threads.
    """
    sizes = [int(size) for size in args.sizes.split(",")]
    found = [built(args, rows=size) for size in sizes]
    seconds = [one["seconds"] for one in found]
    exponent = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
    rows = [
        [f"{size:,}", f"{s:.2f}", f"{s / size * 1e6:.1f}", f"{one['cpu_seconds']:.1f}", one["depth"], one["splits"]]
        for size, s, one in zip(sizes, seconds, found)
    ]
    facts = facts_of(args) | {"rows": sizes, "seconds": seconds, "exponent": exponent, "builds": found}
    print(f"seconds ~ rows ** {exponent:.3f}\n")
    report(facts, ["rows", "seconds", "us / row", "CPU seconds", "depth", "splits"], rows)


def trie_command(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        built(args, codes=folder / "codes.npz")
        with np.load(folder / "codes.npz", allow_pickle=False) as arrays:
            codes, depth = arrays["codes"], arrays["depth"]
        trie, building = timed(build_trie, codes, depth)
        saving = timed(trie.save, folder)[1]
        kept, loading = timed(Trie.load, folder)
        mapped, mapping = timed(Trie.load, folder, mapped=True)
        found, finding = timed(mapped.find, codes)
        if not (found == np.arange(args.rows)).all() or not (kept.codes == trie.codes).all():
            raise SystemExit("FAILED: the trie does not find its own codes")
        on_disk = sum(file.stat().st_size for file in folder.iterdir() if file.name != "codes.npz")
    facts = facts_of(args) | {"depth": trie.max_depth, "nodes": trie.num_nodes, "bytes_per_item": trie.bytes_per_item}
    facts |= {"disk_bytes_per_item": on_disk / args.rows, "build": building, "save": saving, "load": loading}
    facts |= {"map": mapping, "find": finding}
    cells = [trie.max_depth, f"{trie.num_nodes:,}", f"{trie.bytes_per_item:.1f}", f"{on_disk / args.rows:.1f}"]
    cells += [f"{s:.3f}" for s in (building, saving, loading)]
    header = ["depth", "nodes", "bytes an item", "on disk", "build s", "save s", "load s", "map ms", "find all s"]
    report(facts, header, [[*cells, f"{mapping * 1e3:.1f}", f"{finding:.3f}"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, work: Callable[[argparse.Namespace], None], rows: int = 1_000_000) -> Any:
        added = commands.add_parser(name)
        added.set_defaults(work=work)
        added.add_argument("--rows", type=int, default=rows)
        added.add_argument("--dim", type=int, default=128)
        added.add_argument("--components", type=int, default=1000)
        added.add_argument("--clusters", type=int, default=256, help="K")
        added.add_argument("--iterations", type=int, default=20, help="of a k-means, at most")
        added.add_argument("--threads", type=int, default=2)
        added.add_argument("--seed", type=int, default=0)
        return added

    def tree(added: Any, tolerance: float = 1e-4, task: int = 256) -> Any:
        added.add_argument("--tolerance", type=float, default=tolerance)
        added.add_argument(
            "--task-mib", type=int, default=task, help="rows of a subtree that one thread grows, at most"
        )
        added.add_argument("--folder", type=Path, help="for temporary files; default: the temporary one")
        return added

    beside = command("faiss", faiss_command)
    beside.add_argument("--rounds", type=int, default=3)
    beside.add_argument("--sklearn", action="store_true", help="scikit-learn too")
    variants = tree(command("tree", tree_command))
    variants.add_argument("--variants", type=int, nargs="+", default=[1, 2], help="numbers of threads")
    stream = tree(command("stream", stream_command, 8_000_000))
    stream.add_argument("--cap-gib", type=float, default=2.0)
    stream.add_argument("--cgroup", type=Path, help="cgroup v2 folder to make a capped group in; default: the own one")
    stream.add_argument("--check", action="store_true", help="build from memory too and compare the codes")
    growth = tree(command("growth", growth_command), tolerance=0, task=16)
    growth.add_argument("--sizes", default="125000,250000,500000,1000000,2000000")
    command("balanced", balanced_command, 200_000)
    tree(command("trie", trie_command))
    build = tree(command("build", build_command))
    build.add_argument("--store", type=Path, help="embedding table to read instead of making rows")
    build.add_argument("--resident-bytes", type=int, default=4 << 30)
    build.add_argument("--codes", type=Path, help="npz file to write codes and depths to")
    args = parser.parse_args()
    args.work(args)


if __name__ == "__main__":
    main()
