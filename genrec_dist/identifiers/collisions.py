"""Items that share a code sequence: counting them, and giving every item a code of its own.

Three ways. `dedup` appends one code (TIGER). `sinkhorn` gives the items of a collision other last codes below the same
prefix, as an optimal transport with at most one item a code (LC-Rec). `nearest_free` moves them to the nearest code
sequence that no item has. What `sinkhorn` cannot place below its prefix goes to the nearest free code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from genrec_dist.errors import DataError
from genrec_dist.identifiers.points import squared_distances
from genrec_dist.identifiers.quantizer import sinkhorn

Latents = Callable[[np.ndarray], np.ndarray]
EPSILON, ITERATIONS = 0.01, 100


@dataclass
class Resolved:
    """Codes without collisions.

    Shapes:
        codes: (num_items, L or L + 1) int32.
        report: counts before and after, JSON-ready.
    """

    codes: np.ndarray
    report: dict


def group_ids(codes: np.ndarray) -> np.ndarray:
    """A number for each distinct row, in the rows' order, (n,) int64."""
    group = np.zeros(len(codes), np.int64)
    width = int(codes.max(initial=0)) + 1
    for column in codes.T:
        _, group = np.unique(group * width + column, return_inverse=True)
    return group


def uniqueness(codes: np.ndarray) -> dict:
    """How many code sequences there are.

    Returns:
        'unique_codes' distinct sequences, 'coverage' of them an item, 'colliding_items' that share one,
        'largest_group' of items that share one.
    """
    sizes = np.bincount(group_ids(codes))
    return {
        "unique_codes": len(sizes),
        "coverage": len(sizes) / len(codes),
        "colliding_items": int(sizes[sizes > 1].sum()),
        "largest_group": int(sizes.max()),
    }


def check_room(num_items: int, num_clusters: int, num_levels: int) -> None:
    """Refuse fewer code sequences than items.

    Raises:
        DataError: there are fewer.
    """
    if num_clusters**num_levels < num_items:
        raise DataError(
            "fewer code sequences than items",
            where="identifiers.num_clusters, identifiers.num_levels",
            got=f"{num_clusters} ** {num_levels} = {num_clusters**num_levels} for {num_items} items",
            expected="at least one sequence an item",
            fix="raise either",
        )


def resolve_collisions(codes: np.ndarray, codebooks: np.ndarray, latents: Latents, method: str) -> Resolved:
    """Give every item a code sequence of its own; items without a collision keep theirs.

    Args:
        codes: nearest codes of each item.
        codebooks: the vectors behind them.
        latents: encoder outputs of given items, (n, D) float32; asked for colliding items only.
        method: 'dedup', 'sinkhorn' or 'nearest_free'.

    Shapes:
        codes: (num_items, L) int32. codebooks: (L, K, D) float32.

    Raises:
        DataError: fewer code sequences than items ('sinkhorn' and 'nearest_free').
    """
    before = uniqueness(codes)
    report = {"method": method, "before": before, "moved": 0}
    if method == "dedup":
        out = _with_dedup_code(codes) if before["colliding_items"] else codes
        report["moved"] = before["colliding_items"]
    else:
        check_room(len(codes), codebooks.shape[1], codebooks.shape[0])
        out = codes.copy()
        if before["colliding_items"]:
            if method == "sinkhorn":
                _sinkhorn_below_prefix(out, codebooks, latents)
            _to_nearest_free(out, codebooks, latents)
            moved = np.flatnonzero((out != codes).any(1))
            report["moved"] = len(moved)
            report["moved_squared_error"] = _error_of(out, codebooks, latents, moved)
            report["moved_squared_error_before"] = _error_of(codes, codebooks, latents, moved)
    report["after"] = uniqueness(out)
    return Resolved(out.astype(np.int32), report)


def quantised(codes: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
    """Sum of the vectors of the first L codes, (n, D) float32."""
    return sum((table[codes[:, level]] for level, table in enumerate(codebooks)), np.zeros((), np.float32))


def _error_of(codes: np.ndarray, codebooks: np.ndarray, latents: Latents, items: np.ndarray) -> float:
    """Mean squared error per dimension of the codes of some items."""
    if not len(items):
        return 0.0
    return float(np.square(latents(items) - quantised(codes[items], codebooks)).mean())


def _with_dedup_code(codes: np.ndarray) -> np.ndarray:
    """One more column: an item's place among those that share its codes."""
    group = group_ids(codes)
    order = np.argsort(group, kind="stable")
    sizes = np.bincount(group)
    place = np.empty(len(codes), codes.dtype)
    place[order] = np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.concatenate([codes, place[:, None]], 1)


def _members(group: np.ndarray, chosen: np.ndarray) -> list[np.ndarray]:
    """Row numbers of each group that `chosen` marks."""
    rows = np.flatnonzero(chosen[group])
    rows = rows[np.argsort(group[rows], kind="stable")]
    return np.split(rows, np.flatnonzero(np.diff(group[rows])) + 1) if len(rows) else []


def _sinkhorn_below_prefix(codes: np.ndarray, codebooks: np.ndarray, latents: Latents) -> None:
    """New last codes for colliding items, below their prefix, as far as there are free ones."""
    num_clusters = codebooks.shape[1]
    full, prefix = group_ids(codes), group_ids(codes[:, :-1])
    colliding = np.bincount(full)[full] > 1
    chosen = np.zeros(int(prefix.max()) + 1, bool)
    chosen[prefix[colliding]] = True
    for members in _members(prefix, chosen):
        movable = members[colliding[members]]
        taken = codes[members[~colliding[members]], -1]
        free = np.setdiff1d(np.arange(num_clusters), taken)
        left = latents(movable) - quantised(codes[movable, :-1], codebooks[:-1])
        plan = sinkhorn(torch.from_numpy(squared_distances(left, codebooks[-1][free])), EPSILON, ITERATIONS).numpy()
        row_open, column_open = np.ones(len(movable), bool), np.ones(len(free), bool)
        for flat in np.argsort(-plan, axis=None, kind="stable"):
            row, column = divmod(int(flat), len(free))
            if row_open[row] and column_open[column]:
                row_open[row] = column_open[column] = False
                codes[movable[row], -1] = free[column]
                if not row_open.any() or not column_open.any():
                    break


def _to_nearest_free(codes: np.ndarray, codebooks: np.ndarray, latents: Latents) -> None:
    """Of the items that share a sequence the nearest keeps it; the others go, nearest first, to what is free."""
    num_levels, num_clusters, _ = codebooks.shape
    group = group_ids(codes)
    to_move: list[np.ndarray] = []
    errors: list[np.ndarray] = []
    for members in _members(group, np.bincount(group) > 1):
        error = np.square(latents(members) - quantised(codes[members], codebooks)).sum(1)
        order = np.argsort(error, kind="stable")[1:]
        to_move.append(members[order])
        errors.append(error[order])
    if not to_move:
        return
    moving = np.concatenate(to_move)[np.argsort(np.concatenate(errors), kind="stable")]
    place = num_clusters ** np.arange(num_levels - 1, -1, -1, dtype=object)
    if num_clusters**num_levels < 2**62:
        place = place.astype(np.int64)
    key = (codes * place).sum(1)
    taken = np.unique(key)
    new: set[int] = set()

    def is_free(candidate: int) -> bool:
        at = np.searchsorted(taken, candidate)
        return candidate not in new and (at == len(taken) or taken[at] != candidate)

    for item, row in zip(moving, latents(moving)):
        width = 2 * num_clusters
        while True:
            found = _nearest_sequences(row, codebooks, width)
            best = next((c for c in found if is_free(int((c * place).sum()))), None)
            if best is not None:
                break
            width *= 4
        codes[item] = best
        new.add(int((best * place).sum()))


def _nearest_sequences(row: np.ndarray, codebooks: np.ndarray, width: int) -> np.ndarray:
    """Code sequences near a vector, nearest first, by a beam over the levels; all of them with a beam wide enough.

    Shapes:
        row: (D,). returns: (at most width, L) int64.
    """
    codes, left = np.zeros((1, 0), np.int64), row[None].astype(np.float64)
    for table in codebooks:
        distances = np.square(left[:, None] - table[None]).sum(2)
        flat = np.argsort(distances, axis=None, kind="stable")[:width]
        beam, code = np.divmod(flat, len(table))
        codes = np.concatenate([codes[beam], code[:, None]], 1)
        left = left[beam] - table[code]
    return codes
