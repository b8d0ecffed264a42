"""What a codebook is like: uniqueness, use of the codes, cluster sizes, how much of the embeddings it keeps.

Takes finished codes and the embeddings they were made from; returns a JSON-ready report. It repairs nothing.
"""

from __future__ import annotations

import numpy as np

from genrec_dist.errors import DataError

NUM_NEIGHBOURS = 10
NUM_QUERIES = 2000
QUERIES_AT_ONCE = 256


def codebook_quality(
    codes: np.ndarray, depth: np.ndarray, num_clusters: int, embeddings: np.ndarray, seed: int = 0
) -> dict:
    """Quality report of a codebook.

    A node of level l is a code prefix of length l; its size is the number of items below it. `entropy_bits` is of
    the code values used at a level, `normalised_perplexity` is 2 ** entropy over num_clusters.
    `variance_explained` is 1 - (within-node variance) / (total variance); an item whose code has ended stays in its
    leaf. `neighbour_preservation` is the share of an item's 10 nearest neighbours by cosine that lie in its level-1
    cluster, beside the share that chance would put there.

    Args:
        codes: code of each item, -1 past its depth.
        depth: code length of each item.
        num_clusters: codes available at a level.
        embeddings: the table that was quantised.
        seed: of the items whose neighbours are looked up.

    Shapes:
        codes: (num_items, max_depth) int32.
        depth: (num_items,) int32, 1 to max_depth.
        embeddings: (num_items, dim) float.

    Raises:
        DataError: shapes that do not fit, or codes that do not end where `depth` says.
    """
    _check(codes, depth, embeddings)
    num_items, max_depth = codes.shape
    centred = embeddings.astype(np.float64)
    centred -= centred.mean(axis=0)
    total_variance = float(np.square(centred).sum())

    levels = []
    node = np.zeros(num_items, dtype=np.int64)
    for level in range(max_depth):
        _, node = np.unique(node * (int(codes.max()) + 2) + codes[:, level] + 1, return_inverse=True)
        reached = depth > level
        within = total_variance - _between_variance(centred, node)
        levels.append(
            {
                "level": level + 1,
                "items": int(reached.sum()),
                **_code_use(codes[reached, level], num_clusters),
                **_node_sizes(np.unique(node[reached], return_counts=True)[1]),
                "variance_explained": 1.0 - max(0.0, within) / total_variance if total_variance > 0 else 1.0,
            }
        )
    sharing = np.bincount(node)[node] > 1
    return {
        "num_items": num_items,
        "num_clusters": num_clusters,
        "unique_fraction": float(1.0 - sharing.mean()),
        "collisions": int(sharing.sum()),
        "max_depth": max_depth,
        "mean_depth": float(depth.mean()),
        "depth_histogram": {str(d): int((depth == d).sum()) for d in range(1, max_depth + 1)},
        "levels": levels,
        "neighbour_preservation": neighbour_preservation(codes[:, 0], embeddings, seed),
    }


def _check(codes: np.ndarray, depth: np.ndarray, embeddings: np.ndarray) -> None:
    if codes.ndim != 2 or 0 in codes.shape or depth.shape != codes.shape[:1] or len(embeddings) != len(codes):
        raise DataError(
            "codes, depth and embeddings do not fit together",
            got=f"codes {codes.shape}, depth {depth.shape}, embeddings {embeddings.shape}",
            expected="(num_items, max_depth), (num_items,), (num_items, dim)",
        )
    inside = np.arange(codes.shape[1]) < depth[:, None]
    wrong = np.flatnonzero(((codes >= 0) != inside).any(axis=1) | (depth < 1))
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            "code does not end at the item's depth",
            where=f"item {row} (and {len(wrong) - 1} more)",
            got=f"codes {codes[row].tolist()}, depth {int(depth[row])}",
            expected="codes >= 0 up to the depth, -1 past it, depth 1 or more",
        )


def _code_use(values: np.ndarray, num_clusters: int) -> dict:
    counts = np.unique(values, return_counts=True)[1]
    share = counts / counts.sum()
    entropy = max(0.0, float(-(share * np.log2(share)).sum()))
    return {
        "codes_used": len(counts),
        "entropy_bits": entropy,
        "normalised_perplexity": 2.0**entropy / num_clusters,
    }


def _node_sizes(sizes: np.ndarray) -> dict:
    """Summary of node sizes; the histogram has bins [1, 2), [2, 4), [4, 8), ..."""
    bins = np.frexp(sizes.astype(np.float64))[1] - 1  # floor(log2(size)), exact
    counts = np.bincount(bins)
    return {
        "nodes": len(sizes),
        "size_min": int(sizes.min()),
        "size_median": float(np.median(sizes)),
        "size_mean": float(sizes.mean()),
        "size_max": int(sizes.max()),
        "size_histogram": {"from": [2**b for b in range(len(counts))], "nodes": counts.tolist()},
    }


def _between_variance(centred: np.ndarray, node: np.ndarray) -> float:
    """Sum over nodes of size * |node mean|^2, for rows whose overall mean is 0."""
    order = np.argsort(node, kind="stable")
    sizes = np.bincount(node)
    sums = np.add.reduceat(centred[order], np.cumsum(sizes) - sizes, axis=0)
    return float((np.square(sums).sum(axis=1) / sizes).sum())


def neighbour_preservation(clusters: np.ndarray, embeddings: np.ndarray, seed: int = 0) -> dict:
    """Share of the nearest neighbours by cosine that fall in the same cluster, on a seeded sample of items.

    Args:
        clusters: cluster of each item.
        embeddings: the table that was clustered; rows of zeros are no one's neighbours.
        seed: of the sample.

    Shapes:
        clusters: (num_items,) int.
        embeddings: (num_items, dim) float.

    Returns:
        `recall`, `chance` (the expected recall of a random other item), `neighbours`, `queries`; `recall` and
        `chance` are None with fewer than 2 items that have an embedding.
    """
    norms = np.linalg.norm(embeddings, axis=1)
    present = np.flatnonzero(norms > 0)
    num_items = len(present)
    neighbours = min(NUM_NEIGHBOURS, num_items - 1)
    if neighbours < 1:
        return {"recall": None, "chance": None, "neighbours": 0, "queries": 0}
    unit = (embeddings[present] / norms[present, None]).astype(np.float32)
    clusters = clusters[present]
    queries = np.arange(num_items)
    if num_items > NUM_QUERIES:
        queries = np.sort(np.random.default_rng(seed).choice(num_items, NUM_QUERIES, replace=False))
    same = 0
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        rows = queries[start : start + QUERIES_AT_ONCE]
        similarity = unit[rows] @ unit.T
        similarity[np.arange(len(rows)), rows] = -np.inf
        nearest = np.argpartition(-similarity, neighbours - 1, axis=1)[:, :neighbours]
        same += int((clusters[nearest] == clusters[rows, None]).sum())
    _, inverse, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    return {
        "recall": same / (len(queries) * neighbours),
        "chance": float((sizes[inverse[queries]] - 1).mean() / (num_items - 1)),
        "neighbours": neighbours,
        "queries": len(queries),
    }
