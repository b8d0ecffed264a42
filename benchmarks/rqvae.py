"""Residual k-means beside faiss's ResidualQuantizer at equal levels and codes; time to a usable RQ-VAE codebook.

    python benchmarks/rqvae.py --semantic store/semantic/KEY [--collaborative store/lightgcn/KEY] [--epochs 100]

The first table is of the raw vectors (no network): what is left of them after L levels of K codes, training and coding
time. faiss codes with its beam of 1 (greedy, as ours) and with its default beam of 5.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import torch

from genrec_dist.artifacts.reader import EmbeddingStore
from genrec_dist.config import IdentifierConfig, RuntimeConfig
from genrec_dist.identifiers.collisions import uniqueness
from genrec_dist.identifiers.crew import LocalCrew
from genrec_dist.identifiers.kmeans import KMeansOptions
from genrec_dist.identifiers.points import LocalPoints
from genrec_dist.identifiers.residual import residual_kmeans
from genrec_dist.identifiers.rows import ArrayRows
from genrec_dist.identifiers.rqvae_training import CODES, train_rqvae
from genrec_dist.pipeline import StageContext
from genrec_dist.training.worker import Worker


def ours(
    rows: np.ndarray, levels: int, clusters: int, iterations: int, threads: int
) -> tuple[np.ndarray, np.ndarray, dict]:
    began = time.perf_counter()
    options = KMeansOptions(iterations=iterations)
    books = residual_kmeans(ArrayRows(rows), levels, clusters, options=options, crew=LocalCrew(threads)).codebooks
    trained = time.perf_counter()
    left, codes = rows.copy(), []
    for table in books:
        points = LocalPoints(ArrayRows(left), threads)
        points.assign(table)
        code = points.labels()
        left -= table[code]
        codes.append(code)
    return left, np.stack(codes, 1), {"train": trained - began, "code": time.perf_counter() - trained}


def theirs(rows: np.ndarray, levels: int, clusters: int, iterations: int, beam: int) -> tuple:
    quantizer = faiss.ResidualQuantizer(rows.shape[1], levels, int(np.log2(clusters)))
    quantizer.train_type = faiss.ResidualQuantizer.Train_default
    quantizer.max_beam_size = beam
    quantizer.cp.niter = iterations
    quantizer.cp.max_points_per_centroid = len(rows)
    began = time.perf_counter()
    quantizer.train(rows)
    trained = time.perf_counter()
    packed = quantizer.compute_codes(rows)
    coded = time.perf_counter()
    left = rows - quantizer.decode(packed)
    return left, packed, {"train": trained - began, "code": coded - trained}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--semantic", type=Path, required=True)
    parser.add_argument("--collaborative", type=Path)
    parser.add_argument("--levels", type=int, default=4)
    parser.add_argument("--clusters", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    rows = EmbeddingStore(args.semantic).read("zero")
    rows -= rows.mean(0)
    print(f"{rows.shape[0]:,} x {rows.shape[1]}, {args.levels} levels of {args.clusters}, {args.threads} threads")
    shape = (args.levels, args.clusters, args.iterations)
    variants = {
        "ours": lambda: ours(rows, *shape, args.threads),
        "faiss, beam 1": lambda: theirs(rows, *shape, 1),
        "faiss, beam 5": lambda: theirs(rows, *shape, 5),
    }
    results: dict[str, list[tuple]] = {name: [] for name in variants}
    for _ in range(args.rounds):
        for name, run in variants.items():
            left, codes, spent = run()
            error = float(np.square(left).sum() / np.square(rows).sum())
            distinct = len(np.unique(codes, axis=0)) / len(codes)
            results[name].append((error, distinct, spent["train"], spent["code"]))
    base = np.median(results["ours"], 0)
    for name, found in results.items():
        error, distinct, train, code = np.median(found, 0)
        print(
            f"{name:<14} left {error:.4f} (ours / it {base[0] / error:.3f})  unique {distinct:.4f}  "
            f"train {train:.2f} s (ours / it {base[2] / train:.2f})  code {code:.3f} s (ours / it {base[3] / code:.2f})"
        )
    inputs = {"semantic": args.semantic} | ({"collaborative": args.collaborative} if args.collaborative else {})
    tables = {"semantic": {"semantic": args.semantic}} | ({"joint": inputs} if args.collaborative else {})
    for name, folders in tables.items():
        optim = {"epochs": args.epochs, "evaluate_every": args.epochs}
        config = IdentifierConfig(
            tokenizer="rqvae", num_levels=args.levels, num_clusters=args.clusters, rqvae={"optim": optim}
        )
        with tempfile.TemporaryDirectory() as out:
            context = StageContext(Path(out), folders, RuntimeConfig(backend="local", device="cpu"))
            began = time.perf_counter()
            train_rqvae(Worker(), context, {"identifiers": config.model_dump(), "seed": 0})
            spent = time.perf_counter() - began
            codes = np.load(context.scratch / CODES, allow_pickle=False)
            facts = json.loads((context.out / "rqvae.json").read_text())
        used = [len(np.unique(codes[:, level])) for level in range(args.levels)]
        shares = {n: round(v, 3) for n, v in facts["explained"].items()}
        print(
            f"RQ-VAE, {name}: {args.epochs} epochs {spent:.1f} s, coverage {uniqueness(codes)['coverage']:.4f}, "
            f"codes used {used}, explained {shares}"
        )


if __name__ == "__main__":
    main()
