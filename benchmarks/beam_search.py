"""KV-cached beam search beside the exact scorer and beside recomputing every prefix, on one random model.

Usage: python benchmarks/beam_search.py [--items 12101] [--users 64] [--width 50] [--device cpu]
Prints seconds a batch and the ratios; checks that the lists agree.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from genrec_dist.config import GeneratorConfig
from genrec_dist.generator.beam import beam_search, exact_log_probabilities
from genrec_dist.generator.model import Generator
from genrec_dist.identifiers.hierarchical import hierarchical_codes
from genrec_dist.identifiers.trie import build_trie


@torch.no_grad()
def recomputing_beam(model: Generator, history: torch.Tensor, mask: torch.Tensor, width: int) -> torch.Tensor:
    """The same search without a cache and with the memory copied to every beam; trees of equal depth only."""
    trie, batch = model.trie, len(history)
    keys, memory_mask = model.encode(history, mask)
    nodes = torch.zeros(batch, 1, 0, dtype=torch.int64, device=history.device)
    scores = torch.zeros(batch, 1, device=history.device)
    for level in range(trie.max_depth):
        beams = nodes.shape[1]
        flat = nodes.reshape(batch * beams, -1)
        x = torch.cat([model.start_tokens(len(flat)), model.path_tokens(flat)], 1)
        copied = [(k.repeat_interleave(beams, 0), v.repeat_interleave(beams, 0)) for k, v in keys]
        hidden, _ = model.decode(x, (copied, memory_mask.repeat_interleave(beams, 0)))
        parent = flat[:, -1] if level else torch.zeros(len(flat), dtype=torch.int64, device=history.device)
        children, _ = trie.children_of(parent, level)
        total = scores.reshape(-1, 1) + model.head(hidden[:, -1], parent, level).log_softmax(1)
        scores, pick = total.view(batch, -1).topk(min(width, total.numel() // batch), 1)
        source = pick // children.shape[1]
        chosen = children.view(batch, -1).gather(1, pick)
        nodes = torch.cat([nodes.gather(1, source[..., None].expand(-1, -1, level)), chosen[..., None]], 2)
    return trie.node_item[nodes[..., -1]]


def seconds(function: Callable[[], object], device: str, repeats: int = 3) -> float:
    """Median of `repeats` after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return float(np.median(times[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=12101)
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--width", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    embeddings = np.random.default_rng(0).normal(size=(arguments.items, 128)).astype(np.float32)
    trie = build_trie(*hierarchical_codes(embeddings, 256, balanced=True, iterations=3))
    model = Generator(GeneratorConfig(), trie, torch.from_numpy(embeddings)).to(arguments.device).eval()
    history = torch.randint(arguments.items, (arguments.users, 20), device=arguments.device)
    mask = torch.ones_like(history, dtype=torch.bool)
    cached = lambda: beam_search(model, history, mask, arguments.width)[0]  # noqa: E731
    again = lambda: recomputing_beam(model, history, mask, arguments.width)  # noqa: E731
    exact = lambda: exact_log_probabilities(model, history[:8], mask[:8])  # noqa: E731
    agreement = (cached() == again()).float().mean().item()
    base = seconds(cached, arguments.device)
    other = seconds(again, arguments.device)
    whole = seconds(exact, arguments.device) * arguments.users / 8
    print(f"{arguments.items} items, {arguments.users} users, beam {arguments.width}, {arguments.device}")
    print(f"cached beam search       {base:8.3f} s   1.0 x   {1e3 * base / arguments.users:.2f} ms a user")
    print(f"recomputing beam search  {other:8.3f} s   {other / base:.1f} x   lists equal in {agreement:.2%} of places")
    print(f"exact scorer             {whole:8.3f} s   {whole / base:.1f} x")


if __name__ == "__main__":
    main()
