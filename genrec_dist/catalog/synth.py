"""Synthetic catalog in the raw Amazon-2014 format, with a planted structure and the best reachable recall.

Writes reviews_Synthetic_5.json.gz, meta_Synthetic.json.gz, oracle.parquet and, last, oracle.json. Users are
written block by block as they are drawn, so the number of interactions is not bounded by memory. The same
arguments give the same bytes. Does not read anything.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genrec_dist.artifacts.files import write_json
from genrec_dist.catalog.synth_text import item_record, leaf_features
from genrec_dist.catalog.synth_world import BLOCK, Users, World, make_users, make_world, next_item_probabilities
from genrec_dist.errors import ConfigError

GENERATOR_VERSION = 1
CUTOFFS = (1, 5, 10, 20)
MAX_ORACLE_USERS = 10_000
MAX_ORACLE_WORK = 400_000_000  # users x items the oracle scores, so that large catalogs stay affordable
SECONDS_PER_DAY = 86_400
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ID_SPACE = 36**8
_ID_STRIDE = 1_234_567_891_013  # without a common factor with 36: distinct numbers get distinct ids


def write_synthetic(folder: str | Path, num_items: int, num_users: int, seed: int) -> dict:
    """Write a synthetic catalog.

    Args:
        folder: where the files go, made when missing.
        num_items: items, at least 50.
        num_users: users, at least 50; with fewer than one or two an item the k-core gets thin.
        seed: of everything.

    Returns:
        Counts and the oracle's metrics: recall@1/5/10/20, ndcg@10/20, and expected_recall@10, the mean
        probability of its ten best items, which no recommender can beat but by luck.

    Raises:
        ConfigError: fewer than 50 items or users.
    """
    if num_items < 50 or num_users < 50:
        raise ConfigError(
            "synthetic catalog is too small", where="items, users", got=(num_items, num_users), expected="50 or more"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    world = make_world(num_items, seed)
    _write_items(world, folder / "meta_Synthetic.json.gz")
    oracle = _Oracle(world, num_users)
    num_interactions = 0
    with _gzip_writer(folder / "reviews_Synthetic_5.json.gz") as handle:
        for first in range(0, num_users, BLOCK):
            users = make_users(world, first // BLOCK, min(BLOCK, num_users - first))
            handle.write("".join(_review_lines(users, first)).encode())
            oracle.score(users, first)
            num_interactions += int(users.lengths.sum())
    oracle.write(folder / "oracle.parquet")
    counts = {"num_items": num_items, "num_users": num_users, "num_interactions": num_interactions, "seed": seed}
    summary = {**counts, **oracle.metrics()}
    write_json(folder / "oracle.json", summary)
    return summary


@contextmanager
def _gzip_writer(path: Path) -> Iterator[gzip.GzipFile]:
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", compresslevel=5, fileobj=raw, mtime=0) as handle:
        yield handle


def _write_items(world: World, path: Path) -> None:
    rng = np.random.default_rng([world.seed, 2])
    features = leaf_features(rng, len(world.start) - 1)
    with _gzip_writer(path) as handle:
        for item, (leaf, brand) in enumerate(zip(world.leaf.tolist(), world.brand.tolist())):
            successor = int(world.successors[leaf, 0])
            record = item_record(item_id(item), leaf, brand, features[leaf], successor, rng)
            handle.write(f"{record!r}\n".encode())


def _review_lines(users: Users, first: int) -> Iterator[str]:
    """JSON lines of a block, user by user, each in time order."""
    for user, length in enumerate(users.lengths.tolist()):
        name = user_id(first + user)
        for item, day in zip(users.items[user, :length].tolist(), users.days[user, :length].tolist()):
            yield (
                f'{{"reviewerID": "{name}", "asin": "{item_id(item)}", "helpful": [0, 0], '
                f'"overall": {3 + (item + day) % 3}.0, "unixReviewTime": {day * SECONDS_PER_DAY}}}\n'
            )


def item_id(item: int) -> str:
    """Ten characters that look like an ASIN and say nothing about the item."""
    return "B0" + _scrambled(item)


def user_id(user: int) -> str:
    """Id of a user that says nothing about the user."""
    return "A" + _scrambled(user)


def _scrambled(number: int) -> str:
    value = (number + 1) * _ID_STRIDE % _ID_SPACE
    digits = []
    for _ in range(8):
        value, digit = divmod(value, 36)
        digits.append(_DIGITS[digit])
    return "".join(digits)


class _Oracle:
    """Ranks each sampled user's last item by the exact next-item probability.

    Args:
        world: the item side.
        num_users: all users; a seeded sample of them is scored.
    """

    def __init__(self, world: World, num_users: int) -> None:
        self.world = world
        count = min(num_users, MAX_ORACLE_USERS, max(500, MAX_ORACLE_WORK // world.num_items))
        rng = np.random.default_rng([world.seed, 3])
        self.sample = np.sort(rng.choice(num_users, count, replace=False))
        self.ranks: list[int] = []
        self.targets: list[int] = []
        self.top10_mass: list[float] = []

    def score(self, users: Users, first: int) -> None:
        """Score the sampled users of a block that begins with user number `first`."""
        here = self.sample[(self.sample >= first) & (self.sample < first + len(users.lengths))] - first
        for user in here.tolist():
            *history, target = users.items[user, : users.lengths[user]].tolist()
            chance = next_item_probabilities(
                self.world, users.taste_leaves[user], users.taste[user], users.style[user], np.array(history)
            )
            better = int((chance > chance[target]).sum()) + int((chance[:target] == chance[target]).sum())
            self.ranks.append(better + 1)
            self.targets.append(target)
            self.top10_mass.append(float(np.partition(chance, -10)[-10:].sum()))

    def metrics(self) -> dict:
        """Recall, NDCG and the expected recall over the scored users."""
        ranks = np.array(self.ranks)
        gains = 1 / np.log2(ranks + 1)
        return {
            "oracle_users": len(ranks),
            **{f"recall@{k}": float((ranks <= k).mean()) for k in CUTOFFS},
            **{f"ndcg@{k}": float(np.where(ranks <= k, gains, 0).mean()) for k in (10, 20)},
            "expected_recall@10": float(np.mean(self.top10_mass)),
        }

    def write(self, path: Path) -> None:
        """Write user_id, item_id (the last one) and its rank, counted from 1."""
        columns = {
            "user_id": pa.array([user_id(user) for user in self.sample.tolist()]),
            "item_id": pa.array([item_id(item) for item in self.targets]),
            "rank": pa.array(self.ranks, pa.int32()),
        }
        pq.write_table(pa.table(columns), path)
