"""t-SNE maps of embedding tables, coloured by k-means (PRORec Figure 5).

The maps are the slow part of a report, so they are kept in the run folder (`tsne.npz`) and used again while the
tables, the sample and the seed stay the same. Changes no result of the run.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genrec_dist.artifacts.files import write_atomic
from genrec_dist.artifacts.reader import EmbeddingStore
from genrec_dist.artifacts.store import content_key
from genrec_dist.studies.purity import unit_rows

VERSION = 1
NUM_CLUSTERS = 10
PERPLEXITY = 30.0
ITERATIONS = 750
CACHE = "tsne.npz"


@dataclass(frozen=True)
class Map:
    """One table laid out in the plane.

    Shapes:
        points: (num_sampled, 2) float32.
        clusters: (num_sampled,) int32, k-means cluster in the original space.
    """

    title: str
    points: np.ndarray
    clusters: np.ndarray


def sample_items(total: int, num_items: int, seed: int) -> np.ndarray:
    """Items of a map, ascending: all of them, or so many drawn.

    Shapes:
        returns: (min(num_items, total),) int64.
    """
    if num_items >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).choice(total, num_items, replace=False, shuffle=False))


def tsne_maps(
    tables: dict[str, EmbeddingStore],
    keys: dict[str, str],
    cache_folder: Path,
    num_items: int,
    seed: int,
    unit: bool = True,
) -> list[Map]:
    """Maps of several tables over one sample of items.

    Every table is scaled to unit rows first, because cosine is the similarity used everywhere else. k-means runs on
    each table by itself: a colour means nothing across maps.

    Args:
        tables: embedding tables by title; row i is item i in each. Only the sample is read.
        keys: content hash of each table's artifact, by title.
        cache_folder: run folder that keeps the maps.
        num_items: items drawn; all when there are fewer.
        seed: of the sample, k-means and t-SNE.
        unit: False leaves the rows as they are, for tables that are compared by Euclidean distance.
    """
    total = next(iter(tables.values())).num_items
    settings = {"items": min(num_items, total), "seed": seed, "clusters": NUM_CLUSTERS, "titles": list(tables)}
    settings |= {} if unit else {"unit": False}
    key = content_key("tsne", VERSION, settings, keys)
    arrays = _load(cache_folder / CACHE, key)
    if arrays is None:
        sample = sample_items(total, num_items, seed)
        arrays = {"key": np.array(key)}
        for i, table in enumerate(tables.values()):
            arrays[f"points{i}"], arrays[f"clusters{i}"] = _lay_out(table.rows(sample, "zero"), seed, unit)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        write_atomic(cache_folder / CACHE, buffer.getvalue())
    return [Map(title, arrays[f"points{i}"], arrays[f"clusters{i}"]) for i, title in enumerate(tables)]


def _load(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """Cached maps made under the same key; None when there are none or the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = dict(stored)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    return arrays if str(arrays.get("key")) == key else None


def _lay_out(table: np.ndarray, seed: int, scale: bool) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    rows = unit_rows(table) if scale else table
    narrow = min(50, *rows.shape)
    perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
    start = "pca" if narrow >= 2 else "random"
    with threadpool_limits(1):  # repeatable, and quicker than spinning threads on a busy machine
        clusters = KMeans(min(NUM_CLUSTERS, len(rows)), n_init=4, random_state=seed).fit_predict(rows)
        reduced = PCA(narrow, svd_solver="full", random_state=seed).fit_transform(rows)
        points = TSNE(2, perplexity=perplexity, init=start, max_iter=ITERATIONS, random_state=seed).fit_transform(
            reduced
        )
    return points.astype(np.float32), clusters.astype(np.int32)
