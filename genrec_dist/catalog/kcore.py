"""Iterative k-core of the user-item graph. Arrays in, a mask out; knows no files."""

from __future__ import annotations

import numpy as np


def kcore(users: np.ndarray, items: np.ndarray, min_user: int, min_item: int) -> tuple[np.ndarray, int]:
    """Keep the largest set of interactions where every user and every item has enough of them.

    Args:
        users: user number of each interaction.
        items: item number of each interaction.
        min_user: fewest interactions of a user that stays.
        min_item: fewest interactions of an item that stays.

    Shapes:
        users, items: (num_interactions,) non-negative ints.
        returns: (num_interactions,) bool mask of what stays, and the number of rounds that removed something.
    """
    left = np.arange(len(users))
    rounds = 0
    while len(left):
        enough = np.bincount(users[left])[users[left]] >= min_user
        enough &= np.bincount(items[left])[items[left]] >= min_item
        if enough.all():
            break
        left = left[enough]
        rounds += 1
    keep = np.zeros(len(users), dtype=bool)
    keep[left] = True
    return keep, rounds
