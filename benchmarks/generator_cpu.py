"""Generators on a CPU, beside what others use for the same work.

    python benchmarks/generator_cpu.py beam [--items 12101] [--levels 2] [--users 32] [--width 100] [--threads 1]

`beam`: beam search over random models of one shape (1 + 4 layers, width 128, histories of 20 items). One T5 of
transformers goes through its own `generate(prefix_allowed_tokens_fn=...)` and through this project's search, with the
same weights, so the lists must agree; then this project's models through its search, a search that recomputes every
prefix with the memory copied to every beam, and the exact scorer. Prints milliseconds a user, wall clock and processor
(the latter says more where others use the machine), best of `--repeats`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from genrec_dist.config import GeneratorConfig
from genrec_dist.generator.beam import CodeGenerator, beam_search, exact_log_probabilities
from genrec_dist.generator.model import Generator
from genrec_dist.generator.search_tables import SearchTables
from genrec_dist.identifiers.hierarchical import hierarchical_codes
from genrec_dist.identifiers.kmeans import KMeansOptions
from genrec_dist.identifiers.trie import Trie, build_trie
from genrec_dist.testing.beauty_shape import random_trie

CODES = 256


@dataclass(frozen=True)
class Timing:
    """Milliseconds a user."""

    wall: float
    processor: float


def measure(work: Callable[[], object], users: int, repeats: int) -> Timing:
    """Best of `repeats` after one warm-up."""
    timings = []
    for _ in range(repeats + 1):
        wall, processor = time.perf_counter(), time.process_time()
        work()
        timings.append((time.perf_counter() - wall, time.process_time() - processor))
    wall, processor = np.min(timings[1:], 0) * 1e3 / users
    return Timing(float(wall), float(processor))


def make_trie(embeddings: np.ndarray, levels: int) -> Trie:
    """All items at one depth: balanced k-means for two levels, else random codes, no two alike."""
    if levels == 2:
        return build_trie(*hierarchical_codes(embeddings, CODES, options=KMeansOptions(3, balanced=True)))
    return random_trie(len(embeddings), levels)


@torch.no_grad()
def recomputing_beam(model: Generator, history: torch.Tensor, mask: torch.Tensor, width: int) -> torch.Tensor:
    """The same search without cache and tables, the memory copied to every beam; trees of one depth only."""
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


def agreement(lists: torch.Tensor, others: torch.Tensor, top: int = 20) -> str:
    same = lists[:, :top] == others[:, :top]
    return f"top {top} alike in {same.float().mean():.2%} of places, {same.all(1).float().mean():.1%} of users"


def beam(args: argparse.Namespace) -> None:
    from genrec_dist.testing.t5 import AllowedTokens, T5Codes, generate_items

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    embeddings = np.random.default_rng(0).normal(size=(args.items, 256)).astype(np.float32)
    trie = make_trie(embeddings, args.levels)
    history = torch.randint(args.items, (args.users, 20))
    mask = torch.ones_like(history, dtype=torch.bool)
    widest = [trie.max_children(level) for level in range(trie.max_depth)]
    print(f"{args.items} items, most children {widest}, beam {args.width}, {args.users} users, {args.threads} threads")

    def search(model: CodeGenerator) -> tuple[Timing, torch.Tensor]:
        tables = SearchTables(model)
        call = lambda: beam_search(model, history, mask, args.width, tables=tables)[0]  # noqa: E731
        return measure(call, args.users, args.repeats), call()

    t5, allowed = T5Codes(trie, spread=args.spread), AllowedTokens(trie)
    few = min(args.generate_users, args.users)
    base, lists = Timing(np.inf, np.inf), torch.empty(0)
    for at_once in sorted({1, few}):  # `generate` is given the batch that suits it best
        parts: list[torch.Tensor] = []

        def generate(at_once: int = at_once, parts: list[torch.Tensor] = parts) -> None:
            parts.clear()
            for rows, kept in zip(history[:few].split(at_once), mask[:few].split(at_once)):
                parts.append(generate_items(t5, trie, allowed, rows, kept, args.width))

        timing = measure(generate, few, 1)
        print(f"  generate, {at_once} users at once: {timing.wall:.1f} ms a user", flush=True)
        if timing.processor < base.processor:
            base, lists = timing, torch.cat(parts)
    rows = {"transformers generate, T5": (base, f"{few} users")}
    timing, found = search(t5)
    rows["beam search, the same T5"] = (timing, agreement(found[:few], lists))
    settings = {"per level head, code tokens": ("per_level", "codes"), "child head, item tokens": ("child", "item")}
    for name, (head, tokens) in settings.items():
        config = GeneratorConfig(head=head, encoder_input=tokens)
        model = Generator(config, trie, torch.from_numpy(embeddings)).eval()
        timing, found = search(model)
        rows[f"beam search, {name}"] = (timing, "")
    again = measure(lambda: recomputing_beam(model, history, mask, args.width), args.users, 1)
    rows["  recomputing every prefix"] = (again, agreement(recomputing_beam(model, history, mask, args.width), found))
    exact = measure(lambda: exact_log_probabilities(model, history[:8], mask[:8]), min(8, args.users), 1)
    rows["  exact scorer"] = (exact, "")
    print("ms a user                              wall  processor  generate / it (wall, processor)")
    for name, (timing, note) in rows.items():
        ratios = f"{base.wall / timing.wall:8.1f} x {base.processor / timing.processor:6.1f} x"
        print(f"{name:36} {timing.wall:8.2f} {timing.processor:8.2f} {ratios}   {note}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("beam", help="beam search beside transformers' generate")
    command.add_argument("--items", type=int, default=12101)
    command.add_argument("--levels", type=int, default=2, help="codes of an item; 2: balanced k-means, else random")
    command.add_argument("--users", type=int, default=32)
    command.add_argument("--generate-users", type=int, default=4, help="users that `generate` gets, at most")
    command.add_argument("--width", type=int, default=100)
    command.add_argument("--threads", type=int, default=1)
    command.add_argument("--repeats", type=int, default=3)
    command.add_argument("--spread", type=float, default=0.1, help="standard deviation of the T5's weights")
    command.set_defaults(call=beam)
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
