"""What a codebook is like: uniqueness, use of the codes, cluster sizes, how much of the embeddings it keeps.

Takes finished codes and the embeddings they were made from; returns a JSON-ready report. It repairs nothing. Embeddings
are read a range at a time, a few times over: memory grows with the number of items and with the number of columns, not
with their product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse

from genrec_dist.errors import DataError
from genrec_dist.identifiers.rows import ArrayRows, Rows, unit

NUM_NEIGHBOURS = 10
NUM_QUERIES = 2000
RANGE_BYTES = 32 << 20
"""Rows that are read at a time."""
SCORED_ROWS = 2048
"""Rows that are compared with all queries at a time."""
SUMS_BYTES = 256 << 20
"""Sums of nodes that are kept at a time; more nodes take several passes over the rows."""
MAX_PASSES = 8
"""A level whose nodes would take more passes has its variance from a sample of them."""


def codebook_quality(
    codes: np.ndarray, depth: np.ndarray, num_clusters: int, rows: Rows | np.ndarray, seed: int = 0
) -> dict:
    """Quality report of a codebook.

    A node of level l is a code prefix of length l; its size is the number of items below it. `entropy_bits` is of
    the code values used at a level, `normalised_perplexity` is 2 ** entropy over num_clusters.
    `variance_explained` is 1 - (within-node variance) / (total variance); an item whose code has ended stays in its
    leaf. `neighbour_preservation` is the share of an item's 10 nearest neighbours by cosine that lie in its level-1
    cluster, beside the share that chance would put there. A level with so many nodes that their sums would take more
    than MAX_PASSES passes also has `variance_sample`, the share of the items in nodes of two or more that its
    variance is from.

    Args:
        codes: code of each item, -1 past its depth.
        depth: code length of each item.
        num_clusters: codes available at a level.
        rows: the table that was quantised; an array, or a reader of one too large for memory.
        seed: of the items whose neighbours are looked up, and of sampled nodes.

    Shapes:
        codes: (num_items, max_depth) signed int.
        depth: (num_items,) int, 1 to max_depth.
        rows: (num_items, dim) float.

    Raises:
        DataError: shapes that do not fit, or codes that do not end where `depth` says.
    """
    rows = _reader(rows)
    _check(codes, depth, rows)
    num_items, max_depth = codes.shape
    order = _sorted_by_code(codes)
    parting = _parting_level(codes, order)
    levels: list[dict] = []
    nodes = [_Nodes.whole(np.zeros(1, np.int64), np.array([num_items]))]  # the root: its variance is the total
    for level in range(max_depth):
        report, shared = _level(codes, depth, order, parting, level, num_clusters)
        levels.append(report)
        nodes.append(_sampled(shared, rows.dim, (seed, level)))
    collisions = int(shared.sizes.sum())
    rank = np.empty(num_items, np.int64)
    rank[order] = np.arange(num_items)
    del order, parting, shared
    present = np.empty(num_items, bool)
    total, *within = _within_variance(rows, rank, nodes, present)
    for report, node, value in zip(levels, nodes[1:], within, strict=True):
        report["variance_explained"] = 1.0 - max(0.0, value) / total if total > 0 else 1.0
        if node.sample < 1:
            report["variance_sample"] = node.sample
    del rank, nodes
    return {
        "num_items": num_items,
        "num_clusters": num_clusters,
        "unique_fraction": 1.0 - collisions / num_items,
        "collisions": collisions,
        "max_depth": max_depth,
        "mean_depth": float(depth.mean(dtype=np.float64)),
        "depth_histogram": {str(d): int((depth == d).sum()) for d in range(1, max_depth + 1)},
        "levels": levels,
        "neighbour_preservation": _neighbours_kept(codes[:, 0], rows, present, seed),
    }


def _reader(rows: Rows | np.ndarray) -> Rows:
    return ArrayRows(rows) if isinstance(rows, np.ndarray) else rows


def _ranges(rows: Rows) -> Iterator[tuple[int, np.ndarray]]:
    """All rows, range by range, each with the number of its first row."""
    count = max(1, RANGE_BYTES // (4 * rows.dim))
    for start in range(0, rows.num_rows, count):
        yield start, rows.read(start, min(start + count, rows.num_rows))


def _check(codes: np.ndarray, depth: np.ndarray, rows: Rows) -> None:
    if codes.ndim != 2 or 0 in codes.shape or depth.shape != codes.shape[:1] or rows.num_rows != len(codes):
        raise DataError(
            "codes, depth and embeddings do not fit together",
            got=f"codes {codes.shape}, depth {depth.shape}, embeddings {(rows.num_rows, rows.dim)}",
            expected="(num_items, max_depth), (num_items,), (num_items, dim)",
        )
    bad = (depth < 1) | (depth > codes.shape[1])
    for level in range(codes.shape[1]):
        bad |= (codes[:, level] >= 0) != (depth > level)
    wrong = np.flatnonzero(bad)
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            "code does not end at the item's depth",
            where=f"item {row} (and {len(wrong) - 1} more)",
            got=f"codes {codes[row].tolist()}, depth {int(depth[row])}",
            expected="codes >= 0 up to the depth, -1 past it, depth 1 or more",
        )


# Nodes are runs of items that are sorted by code


def _sorted_by_code(codes: np.ndarray) -> np.ndarray:
    """Items in the order of their codes, (num_items,) int64."""
    narrow = codes.max() <= np.iinfo(np.int16).max  # 16 bits are sorted by radix, ten times as fast
    return np.lexsort((codes.astype(np.int16, copy=False) if narrow else codes).T[::-1])


def _parting_level(codes: np.ndarray, order: np.ndarray) -> np.ndarray:
    """First level at which an item's code differs from that of the item before it in `order`, (num_items,) int16;
    the number of levels where none does, and 0 of the first item. Nodes of level l + 1 begin where it is l or less."""
    max_depth = codes.shape[1]
    parting = np.full(len(codes), max_depth, np.int16)
    for level in reversed(range(max_depth)):
        column = codes[order, level]
        parting[1:][column[1:] != column[:-1]] = level
    parting[0] = 0
    return parting


@dataclass
class _Nodes:
    """Nodes of a level, as runs of items sorted by code.

    Args:
        sample: items in these nodes over items in all of the level's nodes of two or more.

    Shapes:
        starts, sizes: (n,) int64, starts ascending.
        weights: (n,) float64, of a node's variance in the level's.
    """

    starts: np.ndarray
    sizes: np.ndarray
    weights: np.ndarray
    sample: float = 1.0

    @classmethod
    def whole(cls, starts: np.ndarray, sizes: np.ndarray) -> _Nodes:
        return cls(starts, sizes, np.ones(len(starts)))

    def __getitem__(self, part: slice) -> _Nodes:
        return _Nodes(self.starts[part], self.sizes[part], self.weights[part])


def _level(
    codes: np.ndarray, depth: np.ndarray, order: np.ndarray, parting: np.ndarray, level: int, num_clusters: int
) -> tuple[dict, _Nodes]:
    """Use of the codes and node sizes of a level; and its nodes of two or more, for an item alone has no variance."""
    starts = np.flatnonzero(parting <= level)
    sizes = np.diff(starts, append=len(order))
    reached = depth > level
    report = {
        "level": level + 1,
        "items": int(reached.sum()),
        **_code_use(codes[reached, level], num_clusters),
        **_node_sizes(sizes[reached[order[starts]]]),
    }
    shared = sizes > 1
    return report, _Nodes.whole(starts[shared], sizes[shared])


def _sampled(nodes: _Nodes, dim: int, seed: tuple[int, int]) -> _Nodes:
    """As many of the nodes as MAX_PASSES passes can add up: half of them the largest, half drawn from the others.

    The drawn ones stand for all others by their share of sum (size - 1), to which the variance within nodes is
    proportional where nodes are alike.
    """
    most = MAX_PASSES * _sums_room(dim)
    if len(nodes.starts) <= most:
        return nodes
    free = nodes.sizes - 1
    largest, others = np.split(np.argsort(-nodes.sizes, kind="stable"), [most // 2])
    drawn = np.random.default_rng(seed).choice(others, most - len(largest), replace=False)
    weights = np.ones(len(nodes.starts))
    weights[drawn] = free[others].sum() / free[drawn].sum()
    chosen = np.sort(np.concatenate([largest, drawn]))
    sizes = nodes.sizes[chosen]
    return _Nodes(nodes.starts[chosen], sizes, weights[chosen], float(sizes.sum() / nodes.sizes.sum()))


def _sums_room(dim: int) -> int:
    return max(1, SUMS_BYTES // (8 * dim))


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
    values, counts = np.unique(sizes, return_counts=True)
    middle = np.searchsorted(counts.cumsum(), [(len(sizes) - 1) // 2, len(sizes) // 2], side="right")
    bins = np.frexp(values.astype(np.float64))[1] - 1  # floor(log2(size)), exact
    nodes = np.bincount(bins, counts).astype(np.int64)
    return {
        "nodes": len(sizes),
        "size_min": int(values[0]),
        "size_median": float(values[middle].mean()),
        "size_mean": float(sizes.mean()),
        "size_max": int(values[-1]),
        "size_histogram": {"from": [2**b for b in range(len(nodes))], "nodes": nodes.tolist()},
    }


def _within_variance(rows: Rows, rank: np.ndarray, levels: list[_Nodes], present: np.ndarray) -> list[float]:
    """Sum of squared distances of items to the mean of their node, by level.

    Each node adds sum |x|^2 - |sum x|^2 / size, in float64, of rows moved so that the first is 0.

    Args:
        rank: place of each item in the order of codes.
        levels: nodes to look at.
        present: filled; whether an item's row has a value other than 0.
    """
    within = np.zeros(len(levels))
    shift = rows.read(0, 1).astype(np.float64)
    for number, share in enumerate(_passes(levels, _sums_room(rows.dim))):
        sums = [np.zeros((len(nodes.starts), rows.dim)) for _, nodes in share]
        low = min(int(nodes.starts[0]) for _, nodes in share)
        high = max(int(nodes.starts[-1] + nodes.sizes[-1]) for _, nodes in share)
        for start, values in _ranges(rows):
            stop = start + len(values)
            if number == 0:
                present[start:stop] = values.any(axis=1)
            places = rank[start:stop]
            here = np.flatnonzero((places >= low) & (places < high))
            here = here[np.argsort(places[here])]
            places, moved = places[here], values[here] - shift
            squares = np.einsum("nd,nd->n", moved, moved)
            for (level, nodes), node_sums in zip(share, sums, strict=True):
                node = np.searchsorted(nodes.starts, places, side="right") - 1
                members = np.flatnonzero((node >= 0) & (places < nodes.starts[node] + nodes.sizes[node]))
                node = node[members]
                within[level] += squares[members] @ nodes.weights[node]
                begins = np.flatnonzero(np.diff(node, prepend=-1))
                adding = scipy.sparse.csr_matrix(
                    (np.ones(len(members)), members, np.append(begins, len(members))), (len(begins), len(places))
                )
                node_sums[node[begins]] += adding @ moved
        for (level, nodes), node_sums in zip(share, sums, strict=True):
            within[level] -= np.einsum("nd,nd->n", node_sums, node_sums) @ (nodes.weights / nodes.sizes)
    return within.tolist()


def _passes(levels: list[_Nodes], room: int) -> list[list[tuple[int, _Nodes]]]:
    """Nodes of all levels with their level, divided into passes of up to `room` nodes."""
    passes: list[list[tuple[int, _Nodes]]] = []
    free = 0
    for level, nodes in enumerate(levels):
        begin = 0
        while begin < len(nodes.starts):
            if not free:
                passes.append([])
                free = room
            part = nodes[begin : begin + free]
            passes[-1].append((level, part))
            begin += len(part.starts)
            free -= len(part.starts)
    return passes


def neighbour_preservation(clusters: np.ndarray, rows: Rows | np.ndarray, seed: int = 0) -> dict:
    """Share of the nearest neighbours by cosine that fall in the same cluster, on a seeded sample of items.

    Args:
        clusters: cluster of each item.
        rows: the table that was clustered, or a reader of it; rows of zeros are no one's neighbours.
        seed: of the sample.

    Shapes:
        clusters: (num_items,) int.
        rows: (num_items, dim) float.

    Returns:
        `recall`, `chance` (the expected recall of a random other item), `neighbours`, `queries`; `recall` and
        `chance` are None with fewer than 2 items that have an embedding.
    """
    rows = _reader(rows)
    present = np.concatenate([values.any(axis=1) for _, values in _ranges(rows)])
    return _neighbours_kept(clusters, rows, present, seed)


def _neighbours_kept(clusters: np.ndarray, rows: Rows, present: np.ndarray, seed: int) -> dict:
    num_present = int(present.sum())
    neighbours = min(NUM_NEIGHBOURS, num_present - 1)
    if neighbours < 1:
        return {"recall": None, "chance": None, "neighbours": 0, "queries": 0}
    items = np.flatnonzero(present)
    if num_present > NUM_QUERIES:
        items = items[np.sort(np.random.default_rng(seed).choice(num_present, NUM_QUERIES, replace=False))]
    asked = unit(rows.take(items))

    def cosine(block: np.ndarray) -> np.ndarray:
        scores = asked @ unit(block).T
        scores[:, ~block.any(axis=1)] = -np.inf
        return scores

    own = clusters[items]
    nearest = nearest_rows(rows, items, neighbours, cosine)
    values, sizes = np.unique(clusters[present], return_counts=True)
    return {
        "recall": float((clusters[nearest] == own[:, None]).mean()),
        "chance": float((sizes[np.searchsorted(values, own)] - 1).mean() / (num_present - 1)),
        "neighbours": neighbours,
        "queries": len(items),
    }


def nearest_rows(
    rows: Rows | np.ndarray, items: np.ndarray, count: int, score: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Rows that score highest for each of some items, itself left out, in no order; one pass.

    Args:
        items: who is asked about, ascending.
        count: rows for each, at most as many as score above -inf.
        score: of some rows, for all items.

    Shapes:
        items: (q,) int64. score: (n, dim) -> (q, n) float32. returns: (q, count) int64.
    """
    best = np.full((len(items), count), -np.inf, np.float32)
    found = np.zeros((len(items), count), np.int64)
    for start, values in _ranges(_reader(rows)):
        for begin in range(0, len(values), SCORED_ROWS):
            block, first = values[begin : begin + SCORED_ROWS], start + begin
            scores = score(block)
            own = slice(*np.searchsorted(items, [first, first + len(block)]))
            scores[np.arange(own.start, own.stop), items[own] - first] = -np.inf
            better = np.flatnonzero(scores.max(axis=1) > best.min(axis=1))  # few, once many rows were seen
            both = np.concatenate([best[better], scores[better]], axis=1)
            kept = np.argpartition(both, -count, axis=1)[:, -count:]
            best[better] = np.take_along_axis(both, kept, axis=1)
            before = np.take_along_axis(found[better], np.minimum(kept, count - 1), axis=1)
            found[better] = np.where(kept < count, before, first + kept - count)
    return found
