"""k-means on one GPU: iterations a second, share of the measured ceilings, beside flash-kmeans and plain torch.

    python benchmarks/kmeans_gpu.py check                       against float64, and against torch's own passes
    python benchmarks/kmeans_gpu.py time  [--rows 8000000] [--dim 128] [--clusters 256] [--iterations 20]
    python benchmarks/kmeans_gpu.py tune  [--rows 8000000]      block shapes of the nearest-centroid kernel

Rows are a mixture of 1000 Gaussians, means and noise N(0, 1), float32, on the device. `flash-kmeans` (Triton, TF32
products) is timed where it is installed. Runs in a plain process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
import triton

from genrec_dist.identifiers import device_points, triton_passes
from genrec_dist.identifiers.device_points import DevicePoints, TorchPasses, on_grid
from genrec_dist.identifiers.kmeans import means
from genrec_dist.identifiers.points import Grid
from genrec_dist.identifiers.triton_passes import Shape
from genrec_dist.training.worker import exact_products

GPU = torch.device("cuda", 0)
RNG_SEED = 7
NARROW_SHAPES = [
    Shape(*shape)
    for shape in (
        (128, 128, 128, 8, 2), (128, 64, 128, 8, 1), (128, 64, 128, 4, 1), (64, 64, 128, 4, 1), (256, 64, 128, 8, 2),
    )
]  # fmt: skip
WIDE_SHAPES = [
    Shape(*shape)
    for shape in (
        (128, 128, 64, 8, 3), (128, 256, 32, 8, 3), (128, 128, 32, 8, 4), (256, 128, 32, 8, 3), (128, 64, 64, 4, 3),
    )
]  # fmt: skip


class DeviceRows:
    """A table that is on the device already, for `DevicePoints`: it is read once, to be kept there."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self.num_rows, self.dim = values.shape

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.values[start:stop].cpu().numpy()

    def take(self, rows: np.ndarray) -> np.ndarray:
        return self.values[torch.from_numpy(rows).to(self.values.device)].cpu().numpy()


def mixture(rows: int, dim: int, seed: int = RNG_SEED) -> torch.Tensor:
    torch.manual_seed(seed)
    centres = torch.randn(1000, dim, device=GPU)
    out = torch.empty(rows, dim, device=GPU)
    for start in range(0, rows, 1 << 20):
        part = out[start : start + (1 << 20)].normal_()
        part += centres[torch.randint(1000, (len(part),), device=GPU)]
    return out


def timed(work: Callable[[], Any], repeats: int = 9) -> float:
    """Median seconds of a piece of device work."""
    work()
    found = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return median(found)


def copy_rate(pair: torch.Tensor) -> float:
    return pair.nbytes / timed(lambda: pair[0].copy_(pair[1]))


def ceilings() -> dict[str, float]:
    """Bytes a second of a copy, read and written; operations a second of matrix products."""
    out = {"copy": copy_rate(torch.empty(2, 1 << 29, device=GPU).normal_())}
    for name, dtype in (("float16", torch.float16), ("float32", torch.float32)):
        a, b = (torch.randn(8192, 8192, device=GPU, dtype=dtype) for _ in range(2))
        with exact_products():
            out[name] = 2 * 8192**3 / timed(lambda a=a, b=b: a @ b, 5)
    return out


def objective(values: torch.Tensor, centroids: torch.Tensor) -> float:
    """Sum of squared distances to the nearest centroid, in float64."""
    wide, total = centroids.double(), 0.0
    for start in range(0, len(values), 1 << 18):
        total += float(torch.cdist(values[start : start + (1 << 18)].double(), wide).min(1).values.square().sum())
    return total


def run(points: DevicePoints, centroids: np.ndarray, iterations: int) -> tuple[np.ndarray, list[float], list[float]]:
    """Lloyd's iteration as `kmeans` does it; returns centroids, seconds of each iteration, and its objective."""
    seconds, objectives = [], []
    points._sums = None
    for _ in range(iterations):
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        moments = points.assign(centroids)
        centroids = means(moments, centroids)
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
        objectives.append(moments.objective)
    return centroids, seconds, objectives


def buffers(values: torch.Tensor, clusters: int) -> dict[str, torch.Tensor]:
    n, dim = values.shape
    return {
        "labels": torch.full((n,), -7, dtype=torch.int32, device=GPU),
        "near": torch.full((n,), torch.nan, device=GPU),
        "errors": torch.zeros(triton_passes.TritonPasses.error_copies, clusters, dtype=torch.float64, device=GPU),
        "sums": torch.zeros(clusters, dim, dtype=torch.float64, device=GPU),
        "counts": torch.zeros(clusters, dtype=torch.int64, device=GPU),
    }


def check(args: argparse.Namespace) -> None:
    """Labels against float64, sums against torch's, in odd shapes, with and without prices."""
    passes, plain = triton_passes.TritonPasses(GPU), TorchPasses(GPU)
    rng = np.random.default_rng()
    for n, dim, clusters, spread in (
        (200_003, 128, 256, 1.0),
        (100_001, 384, 250, 1e-3),
        (70_001, 64, 1000, 1e3),
        (20_001, 4096, 256, 1.0),
        (50_000, 20, 7, 1.0),
        (1_000, 1, 3, 1.0),
    ):
        for priced in (False, True):
            values = mixture(n, dim, int(rng.integers(1 << 30))) * spread
            centroids = values[torch.from_numpy(rng.choice(n, clusters, replace=False)).to(GPU)]
            centroids = (centroids + 0.3 * spread * torch.randn_like(centroids)).cpu().numpy()
            prices = 0.1 * spread**2 * dim * rng.random(clusters) if priced else None
            largest, squares = float(values.abs().max()), values.square().sum(1)
            grids = Grid(n, 4 * dim * largest**2), Grid(n, largest)
            out, before = buffers(values, clusters), torch.from_numpy(rng.integers(0, clusters, n, np.int32)).to(GPU)
            passes.nearest(
                values, squares, passes.table(centroids, prices, largest), out["labels"], out["near"], out["errors"],
                grids[0].shift,
            )  # fmt: skip
            changed = (before != out["labels"]).nonzero()[:, 0]
            passes.move(values, changed, before, out["labels"], out["sums"], out["counts"], grids[1].shift)
            wide, table = values.double(), torch.from_numpy(centroids).to(GPU).double()
            cost = wide.square().sum(1)[:, None] - 2 * wide @ table.T + table.square().sum(1)
            cost += 0 if prices is None else torch.from_numpy(prices.astype(np.float32)).to(GPU)
            best = cost.min(1)
            label = out["labels"].long()
            chosen = cost.gather(1, label[:, None])[:, 0]
            other = buffers(values, clusters)
            plain.nearest(
                values, squares, plain.table(centroids, prices, largest), other["labels"], other["near"],
                other["errors"], grids[0].shift,
            )  # fmt: skip
            theirs = cost.gather(1, other["labels"].long()[:, None])[:, 0]
            scale = float(values.square().sum(1).mean())
            loss, their_loss = (float((cost_of - best.values).max()) / scale for cost_of in (chosen, theirs))
            wanted = buffers(values, clusters)
            plain.move(values, changed, before, out["labels"], wanted["sums"], wanted["counts"], grids[1].shift)
            errors = torch.zeros(clusters, dtype=torch.float64, device=GPU)
            errors.index_add_(0, label, on_grid(out["near"], grids[0].shift))
            ok = (
                torch.equal(out["sums"], wanted["sums"])
                and torch.equal(out["counts"], wanted["counts"])
                and torch.equal(errors, out["errors"].sum(0))
                and bool(torch.isfinite(out["near"]).all())
            )
            print(
                f"{n} x {dim}, K {clusters}, scale {spread:g}, prices {priced}: not the nearest of float64 "
                f"{float((label != best.indices).double().mean()):.1e} (torch float32 "
                f"{float((other['labels'] != best.indices).double().mean()):.1e}), "
                f"costing at most {loss:.1e} ({their_loss:.1e}) "
                f"of a squared length; sums, counts and errors exact: {ok}",
                flush=True,
            )
            assert ok


def tune(args: argparse.Namespace) -> None:
    values = mixture(args.rows, args.dim)
    centroids = values[: args.clusters].cpu().numpy()
    passes, out = triton_passes.TritonPasses(GPU), buffers(values, args.clusters)
    squares, largest = values.square().sum(1), float(values.abs().max())
    shift = Grid(args.rows, 4 * args.dim * largest**2).shift
    narrow = args.dim <= 128
    for shape in NARROW_SHAPES if narrow else WIDE_SHAPES:
        triton_passes.NARROW = triton_passes.WIDE = shape
        table = passes.table(centroids, None, largest)
        try:
            took = timed(
                lambda table=table: passes.nearest(
                    values, squares, table, out["labels"], out["near"], out["errors"], shift
                )
            )
        except triton.runtime.errors.OutOfResources as error:
            print(f"{shape}: {str(error)[:80]}", flush=True)
            continue
        print(
            f"{shape}: {took * 1e3:.2f} ms, {values.nbytes / took / 1e12:.2f} TB/s read, "
            f"{6 * values.numel() * args.clusters / took / 1e12:.0f} TFLOP/s",
            flush=True,
        )


def time_command(args: argparse.Namespace) -> None:
    ceiling = ceilings()
    print(
        f"{torch.cuda.get_device_name(0)}: copy {ceiling['copy'] / 1e12:.2f} TB/s, products float16 "
        f"{ceiling['float16'] / 1e12:.0f}, float32 {ceiling['float32'] / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    values = mixture(args.rows, args.dim)
    chosen = np.random.default_rng(2).choice(args.rows, args.clusters, replace=False)
    start = values[torch.from_numpy(chosen).to(GPU)].clone()
    operations, bytes_read = 2 * values.numel() * args.clusters, values.nbytes
    floors = {
        "bandwidth": bytes_read / ceiling["copy"],
        "three float16 products": 3 * operations / ceiling["float16"],
        "one float32 product": operations / ceiling["float32"],
    }
    print("floors of a pass, ms: " + ", ".join(f"{n} {s * 1e3:.2f}" for n, s in floors.items()), flush=True)
    points = DevicePoints(DeviceRows(values), GPU, 2 * values.nbytes)
    del values
    assert points._kept is not None
    values = points._kept
    found: dict[str, tuple[float, torch.Tensor, list[float]]] = {}

    def ours(passes: device_points.Passes) -> tuple[torch.Tensor, list[float]]:
        points._passes = passes
        centroids, seconds, _ = run(points, start.cpu().numpy(), args.iterations)
        return torch.from_numpy(centroids).to(GPU), seconds

    def flash() -> tuple[torch.Tensor, list[float]]:
        from flash_kmeans import batch_kmeans_Euclid

        def whole() -> torch.Tensor:
            return batch_kmeans_Euclid(
                values[None], args.clusters, args.iterations, -1.0, init_centroids=start[None].clone()
            )[1][0]

        took = timed(whole, 3)
        return whole(), [took / args.iterations] * args.iterations

    ways: dict[str, Callable[[], tuple[torch.Tensor, list[float]]]] = {
        "ours": lambda: ours(triton_passes.TritonPasses(GPU)),
        "ours, torch passes": lambda: ours(TorchPasses(GPU)),
    }
    if importlib.util.find_spec("flash_kmeans"):
        ways["flash-kmeans"] = flash
    for turn in range(args.rounds + 1):  # the first round compiles
        for name, way in ways.items():
            centroids, seconds = way()
            if turn:
                total = min(sum(seconds), found[name][0]) if name in found else sum(seconds)
                found[name] = (total, centroids, seconds)
    reached = {name: objective(values, centroids) for name, (_, centroids, _) in found.items()}
    first = found["ours"][0]
    for name, (total, _, seconds) in found.items():
        each = total / args.iterations
        print(
            f"{name}: {1 / each:.1f} iterations/s, {each * 1e3:.2f} ms each (ours / it {first / total:.2f}); "
            f"{bytes_read / each / ceiling['copy']:.2f} of copy bandwidth, "
            f"{operations / each / ceiling['float32']:.2f} of the float32 product's rate; objective / ours "
            f"{reached[name] / reached['ours']:.6f}; ms by iteration " + " ".join(f"{1e3 * s:.1f}" for s in seconds),
            flush=True,
        )
    passes, out = triton_passes.TritonPasses(GPU), buffers(values, args.clusters)
    table = passes.table(found["ours"][1].cpu().numpy(), None, points.largest)
    shift = points.error_grid.shift
    kernel = timed(
        lambda: passes.nearest(values, points._device_squares, table, out["labels"], out["near"], out["errors"], shift)
    )
    everything = torch.arange(len(values), device=GPU)
    before = torch.roll(out["labels"], 1)
    some = everything[torch.rand(len(values), device=GPU) < 0.05]
    move, move_some, add = (
        timed(lambda r=r, b=b: passes.move(values, r, b, out["labels"], out["sums"], out["counts"], points.grid.shift))
        for r, b in ((everything, before), (some, before), (everything, None))
    )
    floor = max(floors["bandwidth"], floors["three float16 products"])
    print(
        f"nearest kernel {kernel * 1e3:.2f} ms: {floor / kernel:.2f} of its floor, "
        f"{bytes_read / kernel / ceiling['copy']:.2f} of copy bandwidth; sums of all rows {add * 1e3:.2f} ms, "
        f"all rows moved {move * 1e3:.2f}, a twentieth {move_some * 1e3:.2f}",
        flush=True,
    )
    print(json.dumps({"kernel": kernel, "move": move, "ceiling": ceiling, **{n: f[0] for n, f in found.items()}}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["check", "time", "tune"])
    parser.add_argument("--rows", type=int, default=8_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--clusters", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for what in args.what:
        {"check": check, "time": time_command, "tune": tune}[what](args)


if __name__ == "__main__":
    main()
