"""Generators on one GPU.

    python -m benchmarks.generator_gpu evaluate [--batches 256 512 1024] [--run FOLDER] [--tree uneven] [--json FILE]

`evaluate`: ranks of all users of a catalog of Amazon Beauty's size (22,363 users, 12,101 items, K = 256) by a PRORec
generator (1 + 4 layers, width 128, child head with cosine over width 256, beam 100). Random weights, codes and
histories, or those of a run. CUDA graphs on and off, children by the Triton kernel and by gathered rows, all in one
process; then the parts of a batch, each captured and replayed by itself; then the lists of all variants side by side.

Needs torch, Triton, numpy, pyarrow, pydantic, safetensors; neither Ray, DeepSpeed nor Zarr unless --run names a run.
Without a GPU the same code runs on the CPU, to try it out (--users 64 --batches 32); its times then say nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genrec_dist.catalog.dataset import Sequences
from genrec_dist.config import GeneratorConfig
from genrec_dist.evaluation.generative import GenerativeRanker
from genrec_dist.evaluation.replay import Batch, BatchRunner
from genrec_dist.generator.beam import BeamSearch, CodeGenerator, beam_search
from genrec_dist.generator.model import Generator
from genrec_dist.generator.search_tables import SearchTables
from genrec_dist.identifiers.trie import build_trie
from genrec_dist.training.samples import HistorySamples, holdout_samples
from genrec_dist.training.worker import Worker, setup_torch

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
KERNELS = ("triton", "gather") if DEVICE.type == "cuda" else ("grouped", "gather")
GIB = 2**30


def random_codes(rng: np.random.Generator, num_items: int, even: bool) -> tuple[np.ndarray, np.ndarray]:
    """Codes as hierarchical k-means gives them, K = 256: split until a cluster has so few items that each gets a leaf.

    Args:
        even: clusters of one size, so that all items lie at depth 2; otherwise of sizes from a few to hundreds.
    """
    paths: list[list[int]] = [[] for _ in range(num_items)]
    pending = [rng.permutation(num_items)]
    while pending:
        items = pending.pop()
        if len(items) <= 256:
            labels = np.arange(len(items))
        elif even:
            labels = np.arange(len(items)) % 256
        else:
            share = rng.dirichlet(np.full(256, 0.4))
            labels = np.concatenate([np.arange(256), rng.choice(256, len(items) - 256, p=share)])
        for label in range(int(labels.max()) + 1):
            group = items[labels == label]
            for item in group:
                paths[item].append(label)
            if len(group) > 1:
                pending.append(group)
    depth = np.array([len(path) for path in paths], np.int32)
    codes = np.full((num_items, depth.max()), -1, np.int32)
    for row, path in zip(codes, paths):
        row[: len(path)] = path
    return codes, depth


def synthetic(args: argparse.Namespace) -> tuple[Generator, HistorySamples]:
    """Random weights, codes and histories."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(args.items, 256))
    trie = build_trie(*random_codes(rng, args.items, args.tree == "even"))
    torch.manual_seed(0)
    model = Generator(GeneratorConfig(), trie, torch.from_numpy(vectors.astype(np.float32)))
    for parameter in model.decoder.parameters():  # states that tell users apart
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    lengths = np.clip(rng.geometric(1 / 7, args.users) + 3, 4, 200)  # of Beauty: 5 and more, 8.9 on average
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    items = rng.integers(args.items, size=indptr[-1], dtype=np.int32)
    sequences = Sequences(indptr, items, np.zeros(indptr[-1], np.int64), args.items)
    return model, holdout_samples(sequences, model.max_history, "test", DEVICE)[0]


def of_run(folder: Path) -> tuple[CodeGenerator, HistorySamples]:
    """Model and test users of a finished run."""
    from genrec_dist.catalog.dataset import Catalog
    from genrec_dist.generator.stage import load_model
    from genrec_dist.runs import RunFolder
    from genrec_dist.training.samples import holdout_samples

    run = RunFolder(folder.parent, folder.name)
    config = run.config()
    fusion, identifiers, weights = (run.artifact(name) for name in ("fusion", "identifiers", "generator"))
    model = load_model(config.generator, fusion, identifiers, weights)
    sequences = Catalog(run.artifact("catalog"), config.catalog.order).sequences
    return model, holdout_samples(sequences, model.max_history, "test", DEVICE)[0]


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def rank_all(runner: BatchRunner, samples: HistorySamples, batch: int, width: int) -> torch.Tensor:
    """Ranks of all users, queued without a wait, as the evaluation stage does it."""
    ranks = torch.zeros(len(samples), dtype=torch.int64, device=DEVICE)
    for start in range(0, len(samples), batch):
        stop = min(start + batch, len(samples))
        rows = samples.gather(torch.arange(start, stop, device=DEVICE), width)
        ranks[start:stop] = runner(rows)["rank"]
    return ranks.cpu()


def variants(model: CodeGenerator, samples: HistorySamples, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds for all users: the first pass, with tables, compilation and capture, and the best of those after it."""
    lines, expected = [], None
    for batch in args.batches:
        for kernel in KERNELS:
            for graphs in (True, False) if DEVICE.type == "cuda" else (False,):
                if DEVICE.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                synchronize()
                began = time.perf_counter()
                ranker = GenerativeRanker(model, args.width, args.mix, SearchTables(model, kernel))
                runner = BatchRunner(ranker, DEVICE, graphs=graphs)
                ranks = rank_all(runner, samples, batch, model.max_history)
                seconds = [time.perf_counter() - began]
                for _ in range(args.repeats):
                    synchronize()
                    began = time.perf_counter()
                    rank_all(runner, samples, batch, model.max_history)
                    seconds.append(time.perf_counter() - began)
                expected = ranks if expected is None else expected
                line = {
                    "batch": batch,
                    "rows_of_a_call": runner.size or batch,
                    "children": kernel,
                    "graph": graphs and runner.problem is None,
                    "first_s": round(seconds[0], 3),
                    "best_s": round(min(seconds[1:], default=seconds[0]), 3),
                    "peak_gib": round(torch.cuda.max_memory_reserved() / GIB, 2) if DEVICE.type == "cuda" else None,
                    "ranks_alike": round(float((ranks == expected).double().mean()), 6),
                }
                if runner.problem:
                    line["problem"] = runner.problem
                lines.append(line)
                print("  ".join(f"{name} {value}" for name, value in line.items()), flush=True)
                del ranker, runner
    return lines


def milliseconds(work: Callable[[], Any], repeats: int = 20) -> float:
    """Of one call: captured and replayed on a GPU, so that gaps between kernels do not count."""
    for _ in range(2):
        work()
    if DEVICE.type != "cuda":
        began = time.perf_counter()
        work()
        return (time.perf_counter() - began) * 1e3
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()  # held until the graph is gone
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    first.record()
    for _ in range(repeats):
        graph.replay()
    last.record()
    synchronize()
    del kept
    return first.elapsed_time(last) / repeats


@torch.no_grad()
def parts(model: CodeGenerator, samples: HistorySamples, args: argparse.Namespace, batch: int) -> dict[str, float]:
    """Milliseconds of each part of one batch."""
    rows = samples.gather(torch.arange(min(batch, len(samples)), device=DEVICE), model.max_history)
    history, mask = rows["history"], rows["mask"]
    searches = {kernel: BeamSearch(model, args.width, SearchTables(model, kernel), True) for kernel in KERNELS}
    search = searches[KERNELS[0]]
    out = {"prefill and first codes": milliseconds(lambda: search.begin(history, mask))}
    beams = search.begin(history, mask)
    for level in range(1, model.trie.max_depth):
        before = dataclasses.replace(beams)
        name = f"level {level}"
        out[name] = milliseconds(lambda b=before, at=level: search.extend(dataclasses.replace(b), at))
        nodes, scores, source = before.nodes.reshape(-1), before.scores.reshape(-1), before.source.reshape(-1)
        width = before.nodes.shape[1]

        rows_of, last = search.tables.token_rows(nodes), level + 1 == model.trie.max_depth

        def decode(b=before, r=rows_of, s=source, w=width, end=last):
            return search.tables.decoder.step(r, s, b.memory, b.state, w, end)[0]

        out[f"  {name} decoder"] = milliseconds(decode)
        hidden = decode()
        for kernel, other in searches.items():
            tables = other.tables
            score = lambda t=tables, h=hidden, n=nodes, s=scores, at=level: t.child_scores(h, n, s, at)  # noqa: E731
            out[f"  {name} children, {kernel}"] = milliseconds(score)
        totals = search.tables.child_scores(hidden, nodes, scores, level).view(len(history), -1)
        count = min(args.width, totals.shape[1])
        out[f"  {name} topk of {totals.shape[1]}"] = milliseconds(lambda t=totals, k=count: t.topk(k, 1))
        search.extend(beams, level)
    whole = lambda: beam_search(model, history, mask, args.width, args.mix, search.tables, True)  # noqa: E731
    out["whole search"] = milliseconds(whole)
    for name, value in out.items():
        print(f"{name:32} {value:8.3f} ms", flush=True)
    return {name.strip(): round(value, 4) for name, value in out.items()}


def compare_lists(model: CodeGenerator, samples: HistorySamples, args: argparse.Namespace) -> dict[str, float]:
    """Places of the lists that are as in the first variant: graphs change nothing, other kernels the last digits."""
    batch, users = args.batches[0], min(args.check_users, len(samples))
    found: dict[str, torch.Tensor] = {}
    for kernel in KERNELS:
        tables = SearchTables(model, kernel)

        def lists(rows: Batch, tables: SearchTables = tables) -> Batch:
            items, scores, _ = beam_search(model, rows["history"], rows["mask"], args.width, args.mix, tables, True)
            return {"items": items, "scores": scores}

        for graphs in (True, False) if DEVICE.type == "cuda" else (False,):
            runner = BatchRunner(lists, DEVICE, fixed=True, graphs=graphs)
            at = [torch.arange(s, min(s + batch, users), device=DEVICE) for s in range(0, users, batch)]
            some = [runner(samples.gather(rows, model.max_history))["items"].cpu() for rows in at]
            found[f"{kernel}, {'graph' if graphs else 'eager'}"] = torch.cat(some)
    first = next(iter(found.values()))
    real = all(len(set(row[row >= 0].tolist())) == int((row >= 0).sum()) for row in first)
    out = {name: float((items == first).double().mean()) for name, items in found.items()}
    print(f"lists of {users} users, {first.shape[1]} places, no item twice: {real}")
    for name, share in out.items():
        top = float((found[name][:, :20] == first[:, :20]).double().mean())
        print(f"  {name:18} places alike {share:.4%}, of the first 20 {top:.4%}")
    return out


def evaluate(args: argparse.Namespace) -> None:
    setup_torch(Worker(device=DEVICE), torch.get_num_threads())
    model, samples = of_run(args.run) if args.run else synthetic(args)
    model = model.to(DEVICE).eval()  # type: ignore[attr-defined]
    trie = model.trie
    card = torch.cuda.get_device_name(0) if DEVICE.type == "cuda" else "CPU"
    depths = dict(enumerate(torch.bincount(trie.depth.cpu()).tolist()))
    print(
        f"{card}, torch {torch.__version__}; {len(samples)} users, {trie.num_items} items at depths {depths}, "
        f"most children {trie.widths}, beam {args.width}",
        flush=True,
    )
    report = {"device": card, "variants": variants(model, samples, args)}
    best = min((v for v in report["variants"] if v["children"] == KERNELS[0]), key=lambda v: v["best_s"])
    print(f"parts of a batch of {best['rows_of_a_call']} users")
    report["parts_ms"] = parts(model, samples, args, best["rows_of_a_call"])
    report["lists_alike"] = compare_lists(model, samples, args)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("evaluate", help="ranks of all users, variants side by side")
    command.add_argument("--users", type=int, default=22363)
    command.add_argument("--items", type=int, default=12101)
    command.add_argument("--tree", choices=["uneven", "even"], default="uneven")
    command.add_argument("--run", type=Path, help="folder of a finished prorec run")
    command.add_argument("--batches", type=int, nargs="+", default=[256, 512, 1024])
    command.add_argument("--width", type=int, default=100)
    command.add_argument("--mix", type=float, default=0.0)
    command.add_argument("--repeats", type=int, default=2)
    command.add_argument("--check-users", type=int, default=2048)
    command.add_argument("--json", type=Path)
    command.set_defaults(call=evaluate)
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
