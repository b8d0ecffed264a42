"""Made-up sequences, codes and embeddings of the size of Amazon Beauty: material of benchmarks."""

from __future__ import annotations

import numpy as np
import torch

from genrec_dist.catalog.dataset import Sequences
from genrec_dist.config import GeneratorConfig, GptConfig, OptimConfig
from genrec_dist.generator.gpt import GptGenerator
from genrec_dist.generator.model import Generator
from genrec_dist.identifiers.trie import Trie, build_trie

NUM_USERS, NUM_ITEMS, NUM_INTERACTIONS = 22_363, 12_101, 198_502
NUM_CODES, WIDTH = 256, 256
NUM_PREFIXES = NUM_INTERACTIONS - 3 * NUM_USERS


def beauty_sequences(seed: int = 0) -> Sequences:
    """As many users, items and interactions as Beauty has; lengths from 5 on, geometric."""
    rng = np.random.default_rng(seed)
    lengths = 5 + rng.geometric(1 / (NUM_INTERACTIONS / NUM_USERS - 4), NUM_USERS) - 1
    while (off := NUM_INTERACTIONS - int(lengths.sum())) != 0:
        chosen = rng.choice(NUM_USERS, min(abs(off), NUM_USERS), replace=False)
        lengths[chosen] = np.maximum(lengths[chosen] + np.sign(off), 5)
    total = int(lengths.sum())
    return Sequences(
        indptr=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=rng.integers(0, NUM_ITEMS, total).astype(np.int32),
        timestamps=np.arange(total, dtype=np.int64),
        num_items=NUM_ITEMS,
    )


def beauty_trie(seed: int = 0) -> Trie:
    """A tree as hierarchical k-means with K = 256 makes it: uneven clusters, the largest split once more."""
    rng = np.random.default_rng(seed)
    share = rng.lognormal(0, 0.8, NUM_CODES)
    first = rng.choice(NUM_CODES, NUM_ITEMS, p=share / share.sum())
    codes, depth = np.full((NUM_ITEMS, 3), -1), np.full(NUM_ITEMS, 2)
    for cluster in np.unique(first):
        items = np.flatnonzero(first == cluster)
        codes[items, 0] = cluster
        if len(items) <= NUM_CODES:
            codes[items, 1] = np.arange(len(items))
            continue
        codes[items, 1], codes[items, 2] = np.arange(len(items)) % NUM_CODES, np.arange(len(items)) // NUM_CODES
        depth[items] = 3
    alone = (depth == 3) & (codes[:, 0] * NUM_CODES + codes[:, 1] >= 0)
    pairs, counts = np.unique(codes[alone][:, :2], axis=0, return_counts=True)
    for pair in pairs[counts == 1]:  # an only child ends above
        item = alone & (codes[:, :2] == pair).all(1)
        codes[item, 2], depth[item] = -1, 2
    return build_trie(codes, depth)


def random_trie(num_items: int, levels: int, seed: int = 0) -> Trie:
    """Distinct random codes of 256 values, every item at the same depth."""
    rng, chosen = np.random.default_rng(seed), np.zeros(0, np.int64)
    while len(chosen) < num_items:
        chosen = np.unique(np.append(chosen, rng.integers(NUM_CODES**levels, size=num_items)))
    numbers = rng.permutation(chosen)[:num_items]
    codes = np.stack([numbers // NUM_CODES**level % NUM_CODES for level in reversed(range(levels))], 1)
    return build_trie(codes, np.full(num_items, levels))


def beauty_generator(optim: OptimConfig, seed: int = 0, **settings) -> Generator:
    """A generator with fresh weights over that tree; integrated embeddings of width 256."""
    torch.manual_seed(seed)
    integrated = torch.randn(NUM_ITEMS, WIDTH)
    config = GeneratorConfig.model_validate({"distill_position": "start", "optim": optim} | settings)
    return Generator(config, beauty_trie(seed), integrated)


def beauty_gpt(optim: OptimConfig, seed: int = 0, **settings) -> GptGenerator:
    """A decoder-only generator with fresh weights over random codes of four levels."""
    torch.manual_seed(seed)
    return GptGenerator(GptConfig.model_validate({"optim": optim} | settings), random_trie(NUM_ITEMS, 4, seed))
