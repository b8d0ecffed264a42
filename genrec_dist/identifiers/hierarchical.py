"""Hierarchical k-means: one code sequence an item, unique by construction.

Every cluster is split into K children until each leaf is one item; a cluster of at most K items gives each
item its own leaf. Subtrees are independent and seeded by their path, so they can be built in any order.

Source: PRORec section 3.3 (Unified Codes), after EAGER and RecForest.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from genrec_dist.identifiers.kmeans import kmeans

Cluster = Callable[[np.ndarray, int, int], np.ndarray]


def hierarchical_codes(
    embeddings: np.ndarray,
    num_clusters: int,
    *,
    seed: int = 0,
    balanced: bool = False,
    iterations: int = 30,
    num_starts: int = 1,
    on_split: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Codes of all items.

    Args:
        embeddings: item embeddings.
        num_clusters: K, children of a node at most.
        seed: the same seed gives the same codes.
        balanced: equal-size clusters at every split.
        on_split: called with the number of items settled so far.

    Shapes:
        embeddings: (num_items, dim) float32.
        returns: codes (num_items, max_depth) int32, -1 past an item's depth; depth (num_items,) int32.
    """

    def split(points: np.ndarray, k: int, node_seed: int) -> np.ndarray:
        return kmeans(points, k, iterations=iterations, seed=node_seed, num_starts=num_starts, balanced=balanced).labels

    num_items = len(embeddings)
    codes: list[list[int]] = [[] for _ in range(num_items)]
    pending: list[tuple[np.ndarray, int]] = [(np.arange(num_items), seed)]
    settled = 0
    while pending:
        items, node_seed = pending.pop()
        if len(items) <= num_clusters:
            for code, item in enumerate(items.tolist()):
                codes[item].append(code)
            settled += len(items)
            if on_split is not None:
                on_split(settled)
            continue
        points = embeddings[items]
        if (points == points[0]).all():  # nothing to cluster: split evenly, or the tree would grow into a comb
            labels = np.arange(len(items)) * num_clusters // len(items)
        else:
            labels = split(points, num_clusters, node_seed)
        for cluster in range(num_clusters):
            members = items[labels == cluster]
            for item in members.tolist():
                codes[item].append(cluster)
            if len(members) == 1:
                settled += 1
            elif len(members):
                pending.append((members, _child_seed(node_seed, cluster)))
    depth = np.array([len(c) for c in codes], np.int32)
    table = np.full((num_items, int(depth.max(initial=0))), -1, np.int32)
    for item, path in enumerate(codes):
        table[item, : len(path)] = path
    return table, depth


def _child_seed(seed: int, cluster: int) -> int:
    return int(np.random.SeedSequence([seed, cluster]).generate_state(1, np.uint32)[0])
