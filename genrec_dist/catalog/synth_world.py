"""The process behind the synthetic catalog: categories, brands, popularity, tastes and drift.

Next item of a user with history h: with probability `BACKGROUND` an unseen item by global popularity; else a
leaf category first, from a mixture of the user's taste and of what follows the last item's leaf, then an
unseen item of that leaf by popularity times the user's liking for the style of its brand. No item twice. In
memory: a few arrays over items and leaves; users are made in blocks. Writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from genrec_dist.catalog.synth_text import BRANDS_PER_TOP, LEAVES_PER_SUB, STYLES, SUBS_PER_TOP

ITEMS_PER_LEAF = 20
BACKGROUND = 0.1  # share of steps that follow global popularity alone
DRIFT = 0.65  # weight of the successor leaves against the taste
SUCCESSORS = np.array([0.65, 0.2, 0.15])  # how often each successor leaf follows
TASTES = 4  # leaves a user is at home in
ZIPF = 0.8  # exponent of popularity inside a leaf
SHORTEST, MEAN_LENGTH, LONGEST = 5, 9, 40
BLOCK = 4096  # users made at once; part of the definition, for each block has its own random stream


@dataclass(frozen=True)
class World:
    """Everything about items.

    Shapes:
        start: (num_leaves + 1,) first item of each leaf; items of a leaf are neighbours.
        leaf, brand, style: (num_items,) ints.
        popularity: (num_items,) weight inside the leaf; background: (num_items,) probabilities.
        successors: (num_leaves, 3) leaves that follow, each column a permutation.
    """

    start: np.ndarray
    leaf: np.ndarray
    brand: np.ndarray
    style: np.ndarray
    popularity: np.ndarray
    background: np.ndarray
    successors: np.ndarray
    seed: int

    @property
    def num_items(self) -> int:
        return len(self.leaf)


@dataclass(frozen=True)
class Users:
    """One block of users.

    Shapes:
        taste_leaves, taste: (users, TASTES) leaves and their weights, rows sum to 1.
        style: (users, number of styles) liking, rows sum to 1.
        lengths: (users,) ints.
        items: (users, longest) int64 item numbers in time order, -1 after the end.
        days: (users, longest) int64 days since 1970, strictly increasing.
    """

    taste_leaves: np.ndarray
    taste: np.ndarray
    style: np.ndarray
    lengths: np.ndarray
    items: np.ndarray
    days: np.ndarray


def make_world(num_items: int, seed: int) -> World:
    """Draw the item side of the process."""
    rng = np.random.default_rng([seed, 0])
    num_leaves = max(6, round(num_items / ITEMS_PER_LEAF))
    start = np.arange(num_leaves + 1) * num_items // num_leaves
    leaf = np.repeat(np.arange(num_leaves), np.diff(start))
    top = leaf // (LEAVES_PER_SUB * SUBS_PER_TOP)
    brand = top * BRANDS_PER_TOP + rng.integers(BRANDS_PER_TOP, size=num_items)
    rank = np.lexsort((rng.random(num_items), leaf))  # a random order inside each leaf
    place = np.empty(num_items, dtype=np.int64)
    place[rank] = np.arange(num_items) - start[leaf]
    popularity = (place + 1.0) ** -ZIPF
    background = popularity * rng.uniform(0.5, 1.5, num_items)
    cycle = rng.permutation(num_leaves)  # one closed walk over all leaves, so no leaf is left without visits
    successors = np.empty((num_leaves, len(SUCCESSORS)), dtype=np.int64)
    for column in range(len(SUCCESSORS)):
        successors[cycle, column] = np.roll(cycle, -1 - column)
    return World(
        start=start,
        leaf=leaf,
        brand=brand,
        style=brand % BRANDS_PER_TOP % len(STYLES),
        popularity=popularity,
        background=background / background.sum(),
        successors=successors,
        seed=seed,
    )


def make_users(world: World, block: int, count: int) -> Users:
    """Draw `count` users of block number `block` with their histories."""
    rng = np.random.default_rng([world.seed, 1, block])
    num_leaves = len(world.start) - 1
    # the exponent skews the tastes: some leaves are at home with more users than others
    taste_leaves = (num_leaves * rng.random((count, TASTES)) ** 1.5).astype(np.int64)
    taste = rng.dirichlet(np.ones(TASTES), count)
    style = 0.1 / len(STYLES) + 0.9 * rng.dirichlet(np.full(len(STYLES), 0.6), count)
    longest = min(LONGEST, world.num_items // 2)
    extra = rng.geometric(1 / (MEAN_LENGTH - SHORTEST + 1), count) - 1
    lengths = np.minimum(SHORTEST + extra, longest)
    first_day = 14_600 + rng.integers(1000, size=(count, 1))  # from the end of 2009
    days = first_day + np.cumsum(rng.geometric(0.1, (count, longest)), axis=1)
    items = np.full((count, longest), -1, dtype=np.int64)
    for step in range(int(lengths.max())):
        active = np.flatnonzero(lengths > step)
        items[active, step] = _step(
            world, items[active, :step], taste_leaves[active], taste[active], style[active], rng
        )
    return Users(taste_leaves, taste, style, lengths, items, days)


def _step(
    world: World,
    history: np.ndarray,
    taste_leaves: np.ndarray,
    taste: np.ndarray,
    style: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Next item of each user, (users,) int64; history (users, steps so far)."""
    users = np.arange(len(taste))
    if history.shape[1]:
        follow = world.successors[world.leaf[history[:, -1]]]
        leaves = np.concatenate([taste_leaves, follow], axis=1)
        weights = np.concatenate([(1 - DRIFT) * taste, np.broadcast_to(DRIFT * SUCCESSORS, follow.shape)], axis=1)
    else:
        leaves, weights = taste_leaves, taste
    sizes = world.start[leaves + 1] - world.start[leaves]
    taken = (world.leaf[history][:, None, :] == leaves[:, :, None]).sum(axis=2)
    weights = np.where(taken < sizes, weights, 0.0)
    chosen_leaf = leaves[users, _draw(weights, rng)]

    offsets = np.arange(np.diff(world.start).max())
    members = world.start[chosen_leaf][:, None] + offsets
    inside = members < world.start[chosen_leaf + 1][:, None]
    members = np.minimum(members, world.num_items - 1)
    seen = (members[:, :, None] == history[:, None, :]).any(axis=2)
    liking = world.popularity[members] * style[users[:, None], world.style[members]]
    chosen = members[users, _draw(np.where(inside & ~seen, liking, 0.0), rng)]

    background = rng.random(len(users)) < BACKGROUND
    background |= weights.sum(axis=1) == 0  # every leaf of the user is used up
    chosen[background] = _draw_background(world, history[background], rng)
    return chosen


def _draw(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One column a row with probability proportional to its weight; 0 for a row without weight."""
    totals = np.cumsum(weights, axis=1)
    return (totals <= rng.random((len(weights), 1)) * totals[:, -1:]).sum(axis=1) % weights.shape[1]


def _draw_background(world: World, history: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    totals = np.cumsum(world.background)
    chosen = np.empty(len(history), dtype=np.int64)
    left = np.arange(len(history))
    while len(left):  # drawing again until unseen is the distribution over unseen items
        drawn = np.searchsorted(totals, rng.random(len(left)) * totals[-1], side="right")
        chosen[left] = np.minimum(drawn, world.num_items - 1)
        left = left[(history[left] == chosen[left, None]).any(axis=1)]
    return chosen


def next_item_probabilities(
    world: World, taste_leaves: np.ndarray, taste: np.ndarray, style: np.ndarray, history: np.ndarray
) -> np.ndarray:
    """Exact distribution of a user's next item.

    Shapes:
        taste_leaves, taste: (TASTES,); style: (number of styles,); history: (steps,) items, at least one.
        returns: (num_items,) float64, 0 for seen items, sums to 1.
    """
    num_leaves = len(world.start) - 1
    unseen = np.ones(world.num_items, dtype=bool)
    unseen[history] = False
    leaf_weight = np.zeros(num_leaves)
    np.add.at(leaf_weight, taste_leaves, (1 - DRIFT) * taste)
    np.add.at(leaf_weight, world.successors[world.leaf[history[-1]]], DRIFT * SUCCESSORS)
    item_weight = world.popularity * style[world.style] * unseen
    in_leaf = np.add.reduceat(item_weight, world.start[:-1])
    leaf_weight[in_leaf == 0] = 0
    background = world.background * unseen
    background /= background.sum()
    total = leaf_weight.sum()
    if total == 0:
        return background
    share = np.divide(leaf_weight / total, in_leaf, out=np.zeros(num_leaves), where=in_leaf > 0)
    return BACKGROUND * background + (1 - BACKGROUND) * share[world.leaf] * item_weight
