"""k-means on one GPU: iterations a second, share of the measured ceilings, beside flash-kmeans and plain torch.

    python benchmarks/kmeans_gpu.py time  [--rows 8000000] [--dim 128] [--clusters 256] [--iterations 20]
    python benchmarks/kmeans_gpu.py tune  [--rows 8000000]      block shapes of the nearest-centroid kernel

Rows are a mixture of 1000 Gaussians, means and noise N(0, 1), float32, on the device. `flash-kmeans` (Triton, TF32
products) is timed where it is installed. Runs in a plain process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
import triton
from device_rates import copy_bandwidth, matmul_rate, seconds

from genrec_dist.identifiers import triton_passes
from genrec_dist.identifiers.device_points import DevicePoints, TorchPasses
from genrec_dist.identifiers.kmeans import KMeansOptions, KMeansState, kmeans
from genrec_dist.identifiers.points import Grid
from genrec_dist.identifiers.rows import ArrayRows
from genrec_dist.identifiers.triton_passes import Shape

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


def mixture(rows: int, dim: int) -> torch.Tensor:
    torch.manual_seed(RNG_SEED)
    centres = torch.randn(1000, dim, device=GPU)
    out = torch.empty(rows, dim, device=GPU)
    for start in range(0, rows, 1 << 20):
        part = out[start : start + (1 << 20)].normal_()
        part += centres[torch.randint(1000, (len(part),), device=GPU)]
    return out


def objective(values: torch.Tensor, centroids: torch.Tensor) -> float:
    """Sum of squared distances to the nearest centroid, in float64."""
    wide, total = centroids.double(), 0.0
    for start in range(0, len(values), 1 << 18):
        total += float(torch.cdist(values[start : start + (1 << 18)].double(), wide).min(1).values.square().sum())
    return total


def run(points: DevicePoints, start: np.ndarray, iterations: int) -> tuple[np.ndarray, list[float]]:
    """The project's own loop, from given centroids; returns the last ones, and seconds of each iteration."""
    points._sums = None  # forget the labels of the run before
    stamps, last = [time.perf_counter()], [start]

    def note(state: KMeansState) -> None:
        stamps.append(time.perf_counter())
        last[0] = state.centroids

    options = KMeansOptions(iterations, tolerance=-1.0)
    kmeans(points, len(start), options, centroids=start, on_iteration=note)
    return last[0], [after - before for before, after in pairwise(stamps)]


def buffers(values: torch.Tensor, clusters: int) -> dict[str, torch.Tensor]:
    n, dim = values.shape
    return {
        "labels": torch.full((n,), -7, dtype=torch.int32, device=GPU),
        "near": torch.full((n,), torch.nan, device=GPU),
        "errors": torch.zeros(triton_passes.TritonPasses.error_copies, clusters, dtype=torch.float64, device=GPU),
        "sums": torch.zeros(clusters, dim, dtype=torch.float64, device=GPU),
        "counts": torch.zeros(clusters, dtype=torch.int64, device=GPU),
    }


def tune(args: argparse.Namespace) -> None:
    values = mixture(args.rows, args.dim)
    centroids = values[: args.clusters].cpu().numpy()
    passes, out = triton_passes.TritonPasses(GPU), buffers(values, args.clusters)
    squares, largest = values.square().sum(1), float(values.abs().max())
    shift = Grid(args.rows, 4 * args.dim * largest**2).shift
    for shape in NARROW_SHAPES if args.dim <= 128 else WIDE_SHAPES:
        triton_passes.NARROW = triton_passes.WIDE = shape
        table = passes.table(centroids, None, largest)
        try:
            took = seconds(
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
    ceiling = {"copy": copy_bandwidth(GPU)}
    ceiling |= {name: matmul_rate(getattr(torch, name), GPU) for name in ("float16", "float32")}
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
    points = DevicePoints(ArrayRows(values.cpu().numpy()), GPU, 2 * values.nbytes)
    del values
    assert points._kept is not None
    values = points._kept
    found: dict[str, tuple[float, torch.Tensor, list[float]]] = {}

    def ours(passes: TorchPasses) -> tuple[torch.Tensor, list[float]]:
        points._passes = passes
        centroids, times = run(points, start.cpu().numpy(), args.iterations)
        return torch.from_numpy(centroids).to(GPU), times

    def flash() -> tuple[torch.Tensor, list[float]]:
        from flash_kmeans import batch_kmeans_Euclid

        def whole() -> torch.Tensor:
            return batch_kmeans_Euclid(
                values[None], args.clusters, args.iterations, -1.0, init_centroids=start[None].clone()
            )[1][0]

        took = seconds(whole, 3)
        return whole(), [took / args.iterations] * args.iterations

    ways: dict[str, Callable[[], tuple[torch.Tensor, list[float]]]] = {
        "ours": lambda: ours(triton_passes.TritonPasses(GPU)),
        "ours, torch passes": lambda: ours(TorchPasses(GPU)),
    }
    if importlib.util.find_spec("flash_kmeans"):
        ways["flash-kmeans"] = flash
    for turn in range(args.rounds + 1):  # the first round compiles
        for name, way in ways.items():
            centroids, times = way()
            if turn and (name not in found or sum(times) < found[name][0]):
                found[name] = (sum(times), centroids, times)
    reached = {name: objective(values, centroids) for name, (_, centroids, _) in found.items()}
    first = found["ours"][0]
    for name, (total, _, times) in found.items():
        each = total / args.iterations
        print(
            f"{name}: {1 / each:.1f} iterations/s, {each * 1e3:.2f} ms each (ours / it {first / total:.2f}); "
            f"{bytes_read / each / ceiling['copy']:.2f} of copy bandwidth, "
            f"{operations / each / ceiling['float32']:.2f} of the float32 product's rate; objective / ours "
            f"{reached[name] / reached['ours']:.6f}; ms by iteration " + " ".join(f"{1e3 * s:.1f}" for s in times),
            flush=True,
        )
    passes, out = triton_passes.TritonPasses(GPU), buffers(values, args.clusters)
    table = passes.table(found["ours"][1].cpu().numpy(), None, points.largest)
    shift = points.error_grid.shift
    kernel = seconds(
        lambda: passes.nearest(values, points._device_squares, table, out["labels"], out["near"], out["errors"], shift)
    )
    everything = torch.arange(len(values), device=GPU)
    before = torch.roll(out["labels"], 1)
    some = everything[torch.rand(len(values), device=GPU) < 0.05]
    move, move_some, add = (
        seconds(
            lambda r=r, b=b: passes.move(values, r, b, out["labels"], out["sums"], out["counts"], points.grid.shift)
        )
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
    parser.add_argument("what", nargs="+", choices=["time", "tune"])
    parser.add_argument("--rows", type=int, default=8_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--clusters", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for what in args.what:
        {"time": time_command, "tune": tune}[what](args)


if __name__ == "__main__":
    main()
