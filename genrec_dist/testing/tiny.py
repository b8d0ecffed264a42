"""Tiny sequences, code trees and models, drawn from a seed. For tests; nothing here is tuned to learn well."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from genrec_dist.catalog.dataset import NO_TIMESTAMP, Sequences
from genrec_dist.config import GeneratorConfig, GptConfig, OptimConfig
from genrec_dist.generator.gpt import GptGenerator
from genrec_dist.generator.model import Generator
from genrec_dist.identifiers.trie import Trie, build_trie


def tiny_sequences(
    num_users: int = 40, num_items: int = 30, *, seed: int = 0, shortest: int = 1, longest: int = 12
) -> Sequences:
    """Sequences of uniform length between `shortest` and `longest`, no item twice in one of them."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest + 1, num_users)
    items = [rng.permutation(num_items)[:n] for n in lengths]
    stamps = [np.sort(rng.integers(0, 50, n)) for n in lengths]
    return Sequences(
        indptr=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=np.concatenate(items).astype(np.int32),
        timestamps=np.concatenate(stamps).astype(np.int64),
        num_items=num_items,
    )


def write_tiny_catalog(folder: Path, sequences: Sequences) -> Path:
    """Write sequences as a catalog artifact that `Catalog` reads; items are called item-0, item-1, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    num_items, bounds = sequences.num_items, sequences.indptr.astype(np.int32)
    names = [f"item-{i}" for i in range(num_items)]
    pq.write_table(
        pa.table({"item_index": np.arange(num_items, dtype=np.int32), "item_id": names, "title": names}),
        folder / "items.parquet",
    )
    stamps = pa.array(sequences.timestamps, mask=sequences.timestamps == NO_TIMESTAMP)
    pq.write_table(
        pa.table(
            {
                "user_index": np.arange(sequences.num_users, dtype=np.int32),
                "user_id": [f"user-{u}" for u in range(sequences.num_users)],
                "items": pa.ListArray.from_arrays(pa.array(bounds), pa.array(sequences.items)),
                "timestamps": pa.ListArray.from_arrays(pa.array(bounds), stamps),
            }
        ),
        folder / "sequences.parquet",
    )
    return folder


def tiny_embeddings(num_items: int, dim: int = 6, *, seed: int = 0) -> np.ndarray:
    """Normal embeddings, (num_items, dim) float32."""
    return np.random.default_rng(seed).normal(size=(num_items, dim)).astype(np.float32)


def tiny_trie(num_items: int, num_codes: int, *, depth: int | None = None, seed: int = 0) -> Trie:
    """A random code tree.

    Args:
        num_items: leaves.
        num_codes: children of a node at most.
        depth: every item at this depth (num_codes ** depth must hold them); None splits at random, so that
            leaves lie at different depths.
        seed: of the tree.
    """
    rng = np.random.default_rng(seed)
    if depth is not None:
        numbers = rng.permutation(num_codes**depth)[:num_items]
        codes = np.stack([numbers // num_codes**level % num_codes for level in range(depth)], 1)
        return build_trie(codes.astype(np.int32), np.full(num_items, depth, np.int32))
    paths: list[list[int]] = [[] for _ in range(num_items)]
    pending = [rng.permutation(num_items)]
    while pending:
        items = pending.pop()
        children = int(rng.integers(2, min(num_codes, len(items)) + 1))
        code = np.concatenate([np.arange(children), rng.integers(children, size=len(items) - children)])
        for child in range(children):
            group = items[code == child]
            for item in group:
                paths[item].append(child)
            if len(group) > 1:
                pending.append(group)
    item_depth = np.array([len(path) for path in paths], np.int32)
    table = np.full((num_items, item_depth.max()), -1, np.int32)
    for item, path in enumerate(paths):
        table[item, : len(path)] = path
    return build_trie(table, item_depth)


def tiny_optim(**settings) -> OptimConfig:
    """Optimiser section for a few steps on the CPU."""
    return OptimConfig(**{"batch_size": 8, "warmup_steps": 3, "learning_rate": 1e-3, "epochs": 2} | settings)


def tiny_generator(trie: Trie, *, seed: int = 0, embedding_dim: int = 6, spread: float = 0.3, **settings) -> Generator:
    """A small generator in eval mode whose weights are large enough to tell histories and items apart.

    Args:
        trie: code tree.
        spread: standard deviation that all weight matrices are drawn with; 0 keeps the model's own start.
        settings: overrides of the generator section.
    """
    config = GeneratorConfig(
        **{
            "dim": 8,
            "num_heads": 2,
            "num_decoder_layers": 2,
            "ffn_multiplier": 2,
            "dropout": 0.0,
            "max_history": 6,
            "head_temperature": 0.3,
            "distill_temperature": 0.3,
            "optim": tiny_optim(),
        }
        | settings
    )
    torch.manual_seed(seed)
    model = Generator(config, trie, torch.from_numpy(tiny_embeddings(trie.num_items, embedding_dim, seed=seed)))
    if spread:
        randomise(model, spread)
    return model.eval()


def tiny_gpt(trie: Trie, *, seed: int = 0, spread: float = 0.3, **settings) -> GptGenerator:
    """A small decoder-only generator in eval mode; arguments as of `tiny_generator`."""
    config = GptConfig(
        **{
            "dim": 8,
            "num_heads": 2,
            "num_layers": 2,
            "ffn_multiplier": 2,
            "dropout": 0.0,
            "max_history": 6,
            "head_temperature": 0.3,
            "optim": tiny_optim(),
        }
        | settings
    )
    torch.manual_seed(seed)
    model = GptGenerator(config, trie, torch.from_numpy(tiny_embeddings(trie.num_items, seed=seed)))
    if spread:
        randomise(model, spread)
    return model.eval()


def randomise(model: nn.Module, spread: float) -> None:
    """Draw every trainable parameter from Normal(0, spread), layer-norm weights around 1."""
    norms = {id(m.weight) for m in model.modules() if isinstance(m, nn.LayerNorm) and m.weight is not None}
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, mean=1.0 if id(parameter) in norms else 0.0, std=spread)


def tiny_histories(num_users: int, num_items: int, length: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded histories of different lengths, at least one item each.

    Shapes:
        returns: history (num_users, length) int64, 0 where padded; mask (num_users, length) bool.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, length + 1, num_users)
    lengths[0] = length
    mask = np.arange(length) < lengths[:, None]
    history = np.stack([rng.permutation(num_items)[:length] for _ in range(num_users)])
    return torch.from_numpy(history * mask), torch.from_numpy(mask)
