"""What lies near what in a table of vectors: labels of items, and how often neighbours share one. Only reads."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from genrec_dist.artifacts.reader import EmbeddingStore
from genrec_dist.identifiers.quality import nearest_rows

NUM_NEIGHBOURS = 10
NUM_QUERIES = 4000
NUM_LABELS = 8
SEPARATOR = " > "


@dataclass(frozen=True)
class Labels:
    """A label of each item.

    Shapes:
        values: (num_items,) int64, -1 where the item has none of the named ones.
    """

    values: np.ndarray
    names: list[str]


def content_labels(catalog: Path, num_labels: int = NUM_LABELS) -> Labels:
    """Category of each item: the most frequent ones by name, the rest -1.

    An item's first path counts. The level is the first at which no category holds more than half of the items, else
    the one whose largest is smallest: at the top of a shop's own department there is one category only.

    Args:
        catalog: artifact with items.parquet.
        num_labels: categories that are told apart.
    """
    lists = pq.read_table(catalog / "items.parquet", columns=["categories"])["categories"].to_pylist()
    paths = [paths[0].split(SEPARATOR) if paths else [] for paths in lists]
    largest: list[float] = []
    for depth in range(max(map(len, paths), default=0)):
        counts = Counter(_at(path, depth) for path in paths if path)
        largest.append(max(counts.values()) / len(paths))
        if largest[-1] <= 0.5:
            break
    if not largest:
        return Labels(np.full(len(paths), -1), [])
    chosen = [_at(path, int(np.argmin(largest))) if path else None for path in paths]
    counts = Counter(name for name in chosen if name is not None)
    names = [name for name, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:num_labels]]
    place = {name: i for i, name in enumerate(names)}
    return Labels(np.array([place.get(name, -1) if name else -1 for name in chosen], np.int64), names)


def _at(path: list[str], depth: int) -> str:
    return path[min(depth, len(path) - 1)]


def behaviour_labels(lightgcn: Path, seed: int, num_labels: int = NUM_LABELS) -> Labels:
    """k-means cluster of each item's LightGCN embedding, unit rows; larger clusters first.

    Args:
        lightgcn: artifact with the item table.
        seed: of k-means.
        num_labels: clusters.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    table = unit_rows(EmbeddingStore(lightgcn).read("zero"))
    with threadpool_limits(1):
        found = KMeans(min(num_labels, len(table)), n_init=4, random_state=seed).fit_predict(table)
    order = np.argsort(-np.bincount(found), kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return Labels(rank[found], [f"cluster {i + 1}" for i in range(len(order))])


def unit_rows(table: np.ndarray) -> np.ndarray:
    """Rows of length 1; zeros stay zeros."""
    norms = np.linalg.norm(table, axis=1, keepdims=True)
    return table / np.where(norms > 0, norms, 1.0)


def neighbour_purity(table: np.ndarray, labels: np.ndarray, seed: int = 0) -> dict:
    """Share of an item's nearest neighbours that bear its label.

    Args:
        table: vectors; neighbours are nearest by Euclidean distance.
        labels: of the items; those with -1 are neighbours, but not asked about.
        seed: of the sample of items.

    Shapes:
        table: (num_items, dim) float32.
        labels: (num_items,) int.

    Returns:
        `purity`, `interval` (95%, normal, over items), `chance` (the share among all other items), `neighbours`,
        `queries`; None for the first three without a labelled item or a neighbour.
    """
    known = np.flatnonzero(labels >= 0)
    neighbours = min(NUM_NEIGHBOURS, len(table) - 1)
    if not len(known) or neighbours < 1:
        return {"purity": None, "interval": None, "chance": None, "neighbours": max(neighbours, 0), "queries": 0}
    queries = known
    if len(known) > NUM_QUERIES:
        queries = np.sort(np.random.default_rng(seed).choice(known, NUM_QUERIES, replace=False))
    asked = 2 * table[queries]
    nearest = nearest_rows(table, queries, neighbours, lambda rows: asked @ rows.T - np.square(rows).sum(1))
    shares = (labels[nearest] == labels[queries, None]).mean(1)
    sizes = np.bincount(labels[known])
    half = 1.96 * float(shares.std()) / np.sqrt(len(queries))
    purity = float(shares.mean())
    return {
        "purity": purity,
        "interval": [float(purity - half), float(purity + half)],
        "chance": float((sizes[labels[queries]] - 1).mean() / (len(table) - 1)),
        "neighbours": neighbours,
        "queries": len(queries),
    }
