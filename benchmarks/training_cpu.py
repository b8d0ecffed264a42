"""Training the generator on a CPU beside what others use for the same job.

    python benchmarks/training_cpu.py [--catalog FOLDER] [--levels 4] [--batch 256] [--threads 2] [--rounds 7]

Training steps of our encoder-decoder over codes beside Hugging Face's T5 of the same shape, on the same prefixes
and batches. Both read the codes of the history and predict the codes of the next item, padded to the longest history of
the batch; ours also in parts of like length whose losses are added, which is the same step. A step is collation,
forward, backward, clipping and AdamW. Counted are real tokens: codes of histories and targets, no padding. Rounds
alternate in one process; the median of the rounds is printed, by the clock and by CPU time. With `--buckets`, batches
of like length too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from genrec_dist.catalog.dataset import Catalog
from genrec_dist.config import GeneratorConfig, OptimConfig
from genrec_dist.generator.model import Generator
from genrec_dist.identifiers.trie import Trie
from genrec_dist.testing.beauty_shape import NUM_CODES, beauty_sequences, random_trie
from genrec_dist.training.engine import TorchEngine
from genrec_dist.training.tasks import PrefixBatches
from genrec_dist.training.worker import Worker

DIM, HEADS, ENCODERS, DECODERS, DROPOUT, MAX_HISTORY = 128, 4, 1, 4, 0.1, 20
CPU = torch.device("cpu")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalog", type=Path, help="finished catalog artifact; default: lengths like Beauty's")
    parser.add_argument("--levels", type=int, default=4, help="codes an item, of 256 values each")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="a round")
    parser.add_argument("--parts", type=int, default=4, help="parts of like length of a batch of ours")
    parser.add_argument("--buckets", action="store_true", help="also with batches of like length, for both")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    sequences = Catalog(args.catalog).sequences if args.catalog else beauty_sequences()
    trie = random_trie(sequences.num_items, args.levels)
    plain, bucketed = (PrefixBatches.build(sequences, MAX_HISTORY, args.batch, 0, n, CPU) for n in (0, 32))
    variants = [Variant("T5", t5_step(trie), plain)]
    for head in ("per_level", "child"):
        variants.append(Variant(f"ours, {head}", our_step(trie, head), plain))
        variants.append(Variant(f"ours, {head}, {args.parts} parts", our_step(trie, head), plain, args.parts))
    if args.buckets:
        variants.append(Variant("T5, like lengths", t5_step(trie), bucketed))
        variants.append(Variant("ours, per_level, like lengths", our_step(trie, "per_level"), bucketed))
    for round_ in range(args.rounds + 1):  # the first warms up
        for variant in variants:
            variant.measure(round_ * args.steps, args.steps, args.levels)
    print(
        f"{sequences.num_users} users, {sequences.num_items} items, {args.levels} levels of {NUM_CODES} codes,", end=" "
    )
    print(f"batch {args.batch}, {args.threads} threads, {args.rounds} rounds of {args.steps} steps")
    print(f"{'':30}{'parameters':>12}{'tokens/s':>12}{'ratio':>8}{'tokens/CPU s':>14}{'ratio':>8}{'real places':>13}")
    for variant in variants:
        wall, cpu = (medians(values) for values in (variant.wall, variant.cpu))
        base = [medians(values) for values in (variants[0].wall, variants[0].cpu)]
        print(
            f"{variant.name:30}{variant.step.parameters / 1e6:>10.2f} M{wall:>12,.0f}{wall / base[0]:>7.2f}x"
            f"{cpu:>14,.0f}{cpu / base[1]:>7.2f}x{variant.real / variant.places:>12.0%}"
        )


def medians(values: list[float]) -> float:
    return float(np.median(values[1:]))


@dataclass
class Step:
    """One training step on padded batches of items, whose losses are added."""

    run: Callable[[list[dict]], None]
    parameters: int


@dataclass
class Variant:
    name: str
    step: Step
    batches: PrefixBatches
    parts: int = 1
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    real: int = 0
    places: int = 0

    def measure(self, first: int, steps: int, levels: int) -> None:
        """Real tokens a second of some steps, by clock and by CPU time."""
        tokens, wall, cpu = 0, time.perf_counter(), time.process_time()
        for step in range(first, first + steps):
            indices = self.batches.order.batch(step)
            parts = self.batches.local_parts(indices, Worker(), self.parts)
            self.step.run(parts)
            history = self.batches.tokens_of(indices)
            tokens += levels * (history + len(indices))
            self.real, self.places = self.real + history, self.places + sum(p["mask"].numel() for p in parts)
        self.wall.append(tokens / (time.perf_counter() - wall))
        self.cpu.append(tokens / (time.process_time() - cpu))


def our_step(trie: Trie, head: str) -> Step:
    """Our model through the project's own engine."""
    torch.manual_seed(0)
    config = GeneratorConfig(
        dim=DIM,
        num_heads=HEADS,
        num_encoder_layers=ENCODERS,
        num_decoder_layers=DECODERS,
        dropout=DROPOUT,
        max_history=MAX_HISTORY,
        encoder_input="codes",
        head=head,
        distill_weight=0.0,
        optim=OptimConfig(),
    )
    model = Generator(config, trie, torch.randn(trie.num_items, DIM)).train()
    engine = TorchEngine(model, config.optim, Worker())

    def run(parts: list[dict]) -> None:
        loss = torch.stack([engine.forward(part)["loss"] for part in parts]).sum()
        engine.backward(loss)
        engine.step(1e-3)
        assert bool(torch.isfinite(loss))

    return Step(run, trained(model))


def t5_step(trie: Trie) -> Step:
    """T5 as its users train it: a token a (level, code), clipping at 1, fused AdamW (the defaults of its Trainer)."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    levels = trie.max_depth
    config = T5Config(
        vocab_size=2 + levels * NUM_CODES,
        d_model=DIM,
        d_kv=DIM // HEADS,
        num_heads=HEADS,
        d_ff=4 * DIM,
        num_layers=ENCODERS,
        num_decoder_layers=DECODERS,
        dropout_rate=DROPOUT,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        use_cache=False,
    )
    model = T5ForConditionalGeneration(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    node_code = trie.code[trie.item_path]  # (num_items, levels)
    table = torch.from_numpy(2 + np.arange(levels) * NUM_CODES + node_code.astype(np.int64))

    def run(parts: list[dict]) -> None:
        (batch,) = parts
        mask = batch["mask"].repeat_interleave(levels, 1)
        source = table[batch["history"]].flatten(1) * mask
        loss = model(input_ids=source, attention_mask=mask.long(), labels=table[batch["target"]]).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert bool(torch.isfinite(loss))

    return Step(run, trained(model))


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


if __name__ == "__main__":
    main()
