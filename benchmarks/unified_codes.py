"""One unified code an item against two separate ones, in generation.

    python benchmarks/unified_codes.py [--users 64] [--width 100] [--top 5] [--threads 2]

Two separate codes, one of the text and one of the behaviour, take two generators: each is searched with the same beam,
and an item's score is the sum of its two log-probabilities (that of the last beam where a list has not the item). The
unified code takes one. Models have random weights and one shape (1 + 4 layers, width 128), catalog and tree sizes are
Beauty's. Prints milliseconds a user and the ratio, medians of alternating rounds; also on a GPU.

Source of the comparison: PRORec, Figure 2 and Table 1.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from benchmarks.device_rates import synchronize
from genrec_dist.config import OptimConfig
from genrec_dist.generator.beam import beam_search
from genrec_dist.generator.model import Generator
from genrec_dist.generator.search_tables import SearchTables
from genrec_dist.testing.beauty_shape import NUM_ITEMS, beauty_generator


def merged(lists: list[tuple[torch.Tensor, torch.Tensor]], top: int) -> torch.Tensor:
    """Items by the sum of their log-probabilities in both lists, (B, top)."""
    total = torch.zeros(len(lists[0][0]), NUM_ITEMS, device=lists[0][0].device)
    for items, log_p in lists:
        worst = log_p[:, -1:]
        total += worst.expand_as(total).scatter(1, items.clamp(min=0), torch.where(items >= 0, log_p, worst))
    return total.topk(top, 1).indices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--width", type=int, default=100)
    parser.add_argument("--top", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = [beauty_generator(OptimConfig(), seed).to(device).eval() for seed in (0, 1)]
    tables = [SearchTables(model) for model in models]
    history = torch.randint(NUM_ITEMS, (args.users, 20), device=device)
    mask = torch.ones_like(history, dtype=torch.bool)

    def search(model: Generator, prepared: SearchTables) -> tuple[torch.Tensor, torch.Tensor]:
        items, _, log_p = beam_search(model, history, mask, args.width, tables=prepared)
        return items, log_p

    ways = {
        "unified": lambda: search(models[0], tables[0])[0][:, : args.top],
        "two codes": lambda: merged([search(m, t) for m, t in zip(models, tables)], args.top),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds + 1):  # the first warms up
        for name, way in ways.items():
            synchronize()
            begun = time.perf_counter()
            assert way().shape == (args.users, args.top)
            synchronize()
            times[name].append(time.perf_counter() - begun)
    unified, two = (float(np.median(found[1:])) / args.users * 1e3 for found in times.values())
    print(f"{device.type}, {args.threads} threads, {args.users} users, beam {args.width}, top {args.top}")
    print(f"unified {unified:.3f} ms a user, two codes {two:.3f} ms, ratio {two / unified:.2f}")


if __name__ == "__main__":
    main()
