"""Random user-item graphs with and without communities, and assignments of their nodes. For tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from genrec_dist.graph.interactions import Interactions
from genrec_dist.graph.layout import Partition, build_partition, renumber


def community_graph(
    num_users: int, num_items: int, num_pairs: int, *, communities: int = 4, mixing: float = 0.05, seed: int = 0
) -> Interactions:
    """Users with items of their own community, and a share `mixing` of pairs with any item; item degrees are skewed.

    Repeated pairs count once, so there are somewhat fewer than `num_pairs`. Which community a node is in does not
    follow from its number.
    """
    rng = np.random.default_rng(seed)
    user_home, item_home = rng.integers(communities, size=num_users), rng.integers(communities, size=num_items)
    users = rng.integers(num_users, size=num_pairs)
    order = np.argsort(item_home, kind="stable")
    start = np.searchsorted(item_home[order], np.arange(communities + 1))
    home = user_home[users]
    size = start[home + 1] - start[home]
    place = (size * rng.random(num_pairs) ** 2).astype(np.int64)  # the square makes some items popular
    items = order[np.minimum(start[home] + place, num_items - 1)]
    anywhere = (rng.random(num_pairs) < mixing) | (size == 0)
    items[anywhere] = rng.integers(num_items, size=int(anywhere.sum()))
    return Interactions.from_pairs(users, items, num_users, num_items)


def uneven_assignment(graph: Interactions, num_parts: int, seed: int = 0) -> np.ndarray:
    """Most nodes on part 0, none on the last part (if there is more than one)."""
    rng = np.random.default_rng(seed)
    weights = np.array([2.0**-part for part in range(num_parts)])
    if num_parts > 1:
        weights[-1] = 0
    return rng.choice(num_parts, size=graph.num_nodes, p=weights / weights.sum()).astype(np.int32)


def iterate_partitions(graph: Interactions, assignment: np.ndarray, num_parts: int) -> Iterator[Partition]:
    """All partitions of an assignment, one in memory at a time."""
    new_id, offsets = renumber(assignment, num_parts)
    for part in range(num_parts):
        yield build_partition(graph, part, new_id, offsets)
