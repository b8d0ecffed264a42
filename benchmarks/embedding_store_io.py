"""Writing and reading embedding arrays beside plain files: Zarr shards and a plain write of the same bytes to the same
disk, both made durable; random rows through our reader, through Zarr, and through numpy's memory map.

    python benchmarks/embedding_store_io.py --folder DIR --gib 2
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import zarr

from genrec_dist.artifacts.embeddings import (
    ARRAY,
    EmbeddingWriter,
    choose_rows_per_shard,
    to_bfloat16,
)
from genrec_dist.artifacts.reader import EmbeddingStore

DIM = 4096


def write_plain(folder: Path, shards: list[np.ndarray]) -> float:
    """Seconds for one durable file a shard."""
    folder.mkdir()
    began = time.perf_counter()
    for number, values in enumerate(shards):
        with open(folder / f"{number}.tmp", "wb") as file:
            file.write(values.data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(folder / f"{number}.tmp", folder / str(number))
    return time.perf_counter() - began


def write_zarr(folder: Path, shards: list[np.ndarray], rows: int, dtype: str) -> float:
    """Seconds for the shards of the array alone, of values that are rounded already."""
    folder.mkdir()
    writer = EmbeddingWriter(folder, rows * len(shards), DIM, rows, dtype)  # type: ignore[arg-type]
    began = time.perf_counter()
    for number, values in enumerate(shards):
        writer.write_array(number, values)
    return time.perf_counter() - began


def write_shards(folder: Path, shards: list[np.ndarray], rows: int, dtype: str) -> float:
    """Seconds for everything that the stage does with a shard of float32 vectors."""
    folder.mkdir()
    writer = EmbeddingWriter(folder, rows * len(shards), DIM, rows, dtype)  # type: ignore[arg-type]
    began = time.perf_counter()
    for number, values in enumerate(shards):
        writer.write(number, values)
    return time.perf_counter() - began


def drop_caches() -> None:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        print("(the page cache could not be dropped)")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; default: the temporary one")
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="io-", dir=args.folder))
    try:
        for dtype in ("float32", "bfloat16"):
            measure(root, dtype, args.gib, args.rounds)
    finally:
        shutil.rmtree(root)


def measure(root: Path, dtype: str, gib: float, rounds: int) -> None:
    rows = choose_rows_per_shard(DIM, dtype)  # type: ignore[arg-type]
    width = 4 if dtype == "float32" else 2
    count = max(2, round(gib * 2**30 / (rows * DIM * width)))
    rng = np.random.default_rng(0)
    values = [rng.normal(size=(rows, DIM)).astype(np.float32) for _ in range(min(count, 4))]
    shards = [values[n % len(values)] for n in range(count)]
    stored = [v if dtype == "float32" else v.astype(np.float16) for v in values]  # as many bytes as are stored
    plain_shards = [stored[n % len(stored)] for n in range(count)]
    raw = values if dtype == "float32" else [to_bfloat16(v) for v in values]
    encoded = [raw[n % len(raw)] for n in range(count)]
    size = count * rows * DIM * width / 1e6
    writers = {
        "plain": lambda: write_plain(root / "plain", plain_shards),
        "shards": lambda: write_zarr(root / "zarr", encoded, rows, dtype),
        "whole": lambda: write_shards(root / "zarr", shards, rows, dtype),
    }
    speeds: dict[str, list[float]] = {name: [] for name in writers}
    names = list(writers)
    for repeat in range(rounds):
        for name in names[repeat % 3 :] + names[: repeat % 3]:  # what is written after another pays for its flushing
            for folder in ("plain", "zarr"):
                shutil.rmtree(root / folder, ignore_errors=True)
            os.sync()
            speeds[name].append(size / writers[name]())
    shutil.rmtree(root / "zarr", ignore_errors=True)
    writers["whole"]()
    plain, ours, whole = speeds.values()
    ratios = [median(values) / median(plain) for values in (ours, whole)]
    print(f"{dtype}, {count} shards of {rows} x {DIM}, {size:.0f} MB, median of {rounds}")
    print(
        f"  write, made durable: plain files {median(plain):.0f} MB/s, Zarr shards {median(ours):.0f} MB/s (ratio "
        f"{ratios[0]:.2f}), with checks, rounding and records {median(whole):.0f} MB/s (ratio {ratios[1]:.2f})"
    )

    flat = root / f"{dtype}.raw"
    with open(flat, "wb") as file:
        for part in plain_shards:
            file.write(part.data)
    total = count * rows
    memmap = np.memmap(flat, np.float32 if width == 4 else np.float16, "r", shape=(total, DIM))
    array = zarr.open_array(store=str(root / "zarr" / ARRAY), mode="r")
    store = EmbeddingStore(root / "zarr")
    for label, prepare in (("cold", drop_caches), ("warm", lambda: None)):
        seconds: dict[str, list[float]] = {"numpy memmap": [], "our reader": [], "zarr": []}
        for repeat in range(rounds):
            items = np.random.default_rng(repeat).integers(0, total, 1024)
            readers = {
                "numpy memmap": lambda items=items: memmap[items].astype(np.float32),
                "our reader": lambda items=items: store.rows(items),
                "zarr": lambda items=items: array.oindex[np.unique(items)[:64]],
            }
            for name, read in readers.items():
                prepare()
                if label == "warm":
                    read()
                began = time.perf_counter()
                read()
                seconds[name].append((time.perf_counter() - began) / (64 if name == "zarr" else 1024))
        text = ", ".join(f"{name} {median(value) * 1e6:.1f} us" for name, value in seconds.items())
        share = median(seconds["numpy memmap"]) / median(seconds["our reader"])
        print(f"  random rows, {label} cache: {text} a row; memmap / ours {share:.2f}")
    flat.unlink()


if __name__ == "__main__":
    main()
