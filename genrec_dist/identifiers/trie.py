"""Trie over item codes: node numbering and child ranges, from any tokenizer's codes.

Nodes are numbered level by level (root 0), children of a node are consecutive and sorted by code, so a child set is
the range `first_child[node] .. first_child[node + 1]`. Every leaf is exactly one item.

Writes and reads codebook.safetensors, which can be mapped. An item takes 2 bytes a level, 5 of its own and 14 a node
(K below 32768): 25 bytes at depth 3 and K = 256 when items are many more than inner nodes. What follows from the stored
arrays is computed when it is first asked for. Knows nothing of how codes are made.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from genrec_dist.errors import ArtifactError, DataError

FILE = "codebook.safetensors"
MAX_NODES = np.iinfo(np.int32).max
DENSE_ENTRIES = 1 << 20
"""Largest table of the dense first levels."""
FIND_ROWS = 1 << 18
"""Code sequences that are looked up at a time."""
TYPES = {"U8": "|u1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}


@dataclass(frozen=True)
class Trie:
    """Codes and their trie. `codes` and `code` are int16, int32 if a code does not fit.

    Shapes:
        codes: (num_items, max_depth) int16, -1 past an item's depth.
        depth: (num_items,) uint8.
        leaf: (num_items,) int32 node of each item.
        first_child: (num_nodes + 1,) int32; children of node n are first_child[n] .. first_child[n + 1] - 1.
        parent: (num_nodes,) int32; the root's is -1.
        code: (num_nodes,) int16; the root's is -1.
        node_item: (num_nodes,) int32 item of a leaf, -1 for inner nodes.
        level_start: (max_depth + 2,) int64; nodes of level l are level_start[l] .. level_start[l + 1] - 1.
    """

    codes: np.ndarray
    depth: np.ndarray
    leaf: np.ndarray
    first_child: np.ndarray
    parent: np.ndarray
    code: np.ndarray
    node_item: np.ndarray
    level_start: np.ndarray

    @property
    def num_items(self) -> int:
        return len(self.codes)

    @property
    def num_nodes(self) -> int:
        return len(self.parent)

    @property
    def max_depth(self) -> int:
        return self.codes.shape[1]

    @property
    def bytes_per_item(self) -> float:
        """Bytes of the stored arrays / items."""
        return sum(getattr(self, f.name).nbytes for f in fields(self)) / self.num_items

    @cached_property
    def num_codes(self) -> int:
        """K: largest code + 1."""
        return int(self.code.max()) + 1

    @cached_property
    def num_children(self) -> np.ndarray:
        """Number of children of each node, (num_nodes,) int32."""
        return np.diff(np.asarray(self.first_child))

    @cached_property
    def level(self) -> np.ndarray:
        """Level of each node, (num_nodes,) int32; the root's is 0."""
        return np.repeat(np.arange(self.max_depth + 1, dtype=np.int32), np.diff(self.level_start))

    @cached_property
    def item_path(self) -> np.ndarray:
        """Node of each prefix, (num_items, max_depth) int32; past the depth the leaf is repeated."""
        path = np.empty((self.num_items, self.max_depth), np.int32)
        path[:, -1] = self.leaf
        for level in range(self.max_depth - 1, 0, -1):
            below = path[:, level]
            path[:, level - 1] = np.where(self.depth > level, self.parent[below], below)
        return path

    @cached_property
    def dense_levels(self) -> int:
        """d: levels that `dense` spans, as many as fit into 2 ** 20 entries."""
        levels = 0
        while levels < self.max_depth and self.num_codes ** (levels + 1) <= DENSE_ENTRIES:
            levels += 1
        return levels

    @cached_property
    def dense(self) -> np.ndarray:
        """Node of each sequence of d codes, (K ** d,) int32, -1 where none; the first code counts K ** (d - 1)."""
        place = np.zeros(1, np.int64)
        for level in range(1, self.dense_levels + 1):
            nodes = slice(*self.level_start[level : level + 2])
            place = place[self.parent[nodes] - self.level_start[level - 1]] * self.num_codes + self.code[nodes]
        table = np.full(self.num_codes**self.dense_levels, -1, np.int32)
        table[place] = np.arange(*self.level_start[self.dense_levels : self.dense_levels + 2])
        return table

    def max_children(self, level: int) -> int:
        """Largest number of children of a node at `level` (root: 0)."""
        start, stop = self.level_start[level : level + 2]
        return int(np.diff(self.first_child[start : stop + 1]).max(initial=0))

    def find(self, codes: np.ndarray) -> np.ndarray:
        """Item of each code sequence; -1 where no item has it.

        Shapes:
            codes: (n, max_depth) integer, -1 past the end of a sequence. Returns (n,) int32.

        Raises:
            ValueError: codes of another width.
        """
        if codes.ndim != 2 or codes.shape[1] != self.max_depth:
            raise ValueError(f"codes of shape {codes.shape}, expected (n, {self.max_depth})")
        items = np.empty(len(codes), np.int32)
        for first in range(0, len(codes), FIND_ROWS):
            items[first : first + FIND_ROWS] = self._find(codes[first : first + FIND_ROWS])
        return items

    def _find(self, codes: np.ndarray) -> np.ndarray:
        codes = codes.astype(np.int64)
        length = (codes >= 0).sum(1)
        padded = np.where(np.arange(self.max_depth) < length[:, None], codes, -1)
        known = (padded == codes).all(1) & (codes < self.num_codes).all(1)  # first codes, then padding
        node = np.where(known, 0, -1)
        dense = np.flatnonzero(known & (length >= self.dense_levels))
        place = np.zeros(len(dense), np.int64)
        for level in range(self.dense_levels):
            place = place * self.num_codes + codes[dense, level]
        node[dense] = self.dense[place]
        for level in range(self.max_depth):
            searched = (length < self.dense_levels) if level < self.dense_levels else True
            rows = np.flatnonzero((node >= 0) & (length > level) & searched)
            node[rows] = self._child(node[rows], codes[rows, level])
        return np.where(node >= 0, self.node_item[node], -1)

    def _child(self, nodes: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Child with the given code of each node, -1 where none: bisection of all child ranges at once."""
        low, end = self.first_child[nodes], self.first_child[nodes + 1]
        high, last = end, self.num_nodes - 1
        while (low < high).any():
            middle = low + (high - low) // 2
            right = (low < high) & (self.code[np.minimum(middle, last)] < codes)
            low, high = np.where(right, middle + 1, low), np.where(right, high, middle)
        return np.where((low < end) & (self.code[np.minimum(low, last)] == codes), low, -1)

    def save(self, folder: Path) -> None:
        """Write codebook.safetensors, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{FILE}.{os.getpid()}.tmp"
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file({f.name: np.ascontiguousarray(getattr(self, f.name)) for f in fields(self)}, temporary)
            temporary.chmod(mode)  # safetensors makes a file of its own that others may not read
            with open(temporary, "rb+") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, folder / FILE)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: Path, mapped: bool = False) -> Trie:
        """Read codebook.safetensors.

        Args:
            folder: of the artifact.
            mapped: arrays are views into the file and nothing is read until it is used.

        Raises:
            ArtifactError: the file is missing, damaged or of an older layout.
        """
        file = folder / FILE
        arrays: dict[str, np.ndarray] = {}
        for name, (kind, shape, first) in _read_layout(file).items():
            if mapped:
                arrays[name] = np.memmap(file, kind, "r", first, shape)
            else:
                arrays[name] = np.fromfile(file, kind, int(np.prod(shape)), offset=first).reshape(shape)
        return cls(**arrays)


def _read_layout(file: Path) -> dict[str, tuple[np.dtype, tuple[int, ...], int]]:
    """Dtype, shape and first byte of each array of a codebook, checked against each other and the file's size."""
    names = [f.name for f in fields(Trie)]
    try:
        with open(file, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            length = int.from_bytes(handle.read(8), "little")
            if 8 + length > size:
                raise ValueError(f"{size} bytes, header of {length}")
            header: dict[str, Any] = json.loads(handle.read(length))
        if "codes" in header and "level_start" not in header:
            raise ArtifactError(
                "codebook is of an older layout",
                where=file,
                got="no tensor 'level_start'",
                expected=f"tensors {', '.join(names)}",
                fix="rebuild the identifier stage: remove the artifact's folder and run the same command again",
            )
        places = {}
        for name in names:
            kind, shape = np.dtype(TYPES[header[name]["dtype"]]), tuple(header[name]["shape"])
            first, last = (8 + length + offset for offset in header[name]["data_offsets"])
            if first < 8 + length or last > size or last - first != kind.itemsize * int(np.prod(shape)):
                raise ValueError(f"{name} of shape {shape} at {first} to {last} of {size} bytes")
            places[name] = (kind, shape, first)
        (num_items, max_depth), (num_nodes,) = places["codes"][1], places["parent"][1]
        wide, code_kind = np.dtype(np.int32), places["codes"][0]
        wanted = {
            "codes": (code_kind, (num_items, max_depth)),
            "depth": (np.dtype(np.uint8), (num_items,)),
            "leaf": (wide, (num_items,)),
            "first_child": (wide, (num_nodes + 1,)),
            "parent": (wide, (num_nodes,)),
            "code": (code_kind, (num_nodes,)),
            "node_item": (wide, (num_nodes,)),
            "level_start": (np.dtype(np.int64), (max_depth + 2,)),
        }
        wrong = [f"{name} {places[name][:2]}" for name in names if places[name][:2] != wanted[name]]
        if wrong:
            raise ValueError("; ".join(wrong))
    except FileNotFoundError:
        raise ArtifactError(
            "no codebook", where=file, got="no such file", expected=FILE, fix="run the identifier stage"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            "codebook is damaged",
            where=file,
            got=f"{type(error).__name__}: {error}",
            expected=f"tensors {', '.join(names)} of shapes that agree, whole",
            fix="rebuild the identifier stage: remove the artifact's folder and run the same command again",
        ) from None
    return places


def build_trie(codes: np.ndarray, depth: np.ndarray) -> Trie:
    """Number the prefixes of all codes: items sorted by code, a node wherever a prefix differs from the row before.

    Shapes:
        codes: (num_items, max_depth) integer, entries at or past `depth` ignored.
        depth: (num_items,) integer, at least 1.

    Raises:
        DataError: two items share a code sequence, or one item's is a prefix of another's; a code or depth is out of
            range; there are more than 2 ** 31 - 1 nodes.
    """
    codes, depth = _compact(codes, depth)
    order, rows = _sort_rows(codes)
    max_depth = codes.shape[1]
    lengths = np.zeros(len(rows), np.uint8)  # depth[order], without its random reads
    for level in range(max_depth):
        lengths += rows[:, level] >= 0
    # First level at which a row differs from the one before: it opens a node at every level from there to its depth.
    split = np.full(len(rows), max_depth, np.uint8)
    split[:1] = 0
    for level in reversed(range(max_depth)):
        split[1:][rows[1:, level] != rows[:-1, level]] = level
    _check_unique(order, lengths, split)
    opened = [int(np.count_nonzero((split <= level) & (lengths > level))) for level in range(max_depth)]
    level_start = np.cumsum([0, 1, *opened], dtype=np.int64)
    num_nodes = int(level_start[-1])
    _check_count(num_nodes)

    leaf = np.empty(len(rows), np.int32)
    first_child = np.full(num_nodes + 1, num_nodes, np.int32)
    parent, code = np.full(num_nodes, -1, np.int32), np.full(num_nodes, -1, codes.dtype)
    node_item = np.full(num_nodes, -1, np.int32)
    node = np.zeros(len(rows), np.int32)  # of each sorted row, at the level above
    for level in range(max_depth):
        above, start, stop = level_start[level : level + 3]
        opens = (split <= level) & (lengths > level)
        parent[start:stop] = node[opens]
        code[start:stop] = rows[opens, level]
        first_child[above:start] = start + np.searchsorted(parent[start:stop], np.arange(above, start, dtype=np.int32))
        np.cumsum(opens, out=node)
        node += np.int32(start - 1)
        ends = lengths == level + 1
        items, leaves = order[ends], node[ends]
        leaf[items] = leaves
        node_item[leaves] = items
    return Trie(codes, depth, leaf, first_child, parent, code, node_item, level_start)


def _compact(codes: np.ndarray, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes as they are stored, -1 past the depth, and depth as uint8."""
    num_items, max_depth = codes.shape
    _check_count(num_items)
    if max_depth > 255 or (num_items and (depth.min() < 1 or depth.max() > max_depth)):
        raise DataError(
            "code lengths are out of range",
            where="identifiers",
            got=f"{depth.min(initial=max_depth)} to {depth.max(initial=0)} of {max_depth} levels",
            expected="1 to the number of levels, which is 255 at most",
            fix="use more clusters a level",
        )
    depth = depth.astype(np.uint8)
    real = [(codes[:, level], depth > level) for level in range(max_depth)]
    low = min((int(column.min(where=here, initial=0)) for column, here in real), default=0)
    high = max((int(column.max(where=here, initial=0)) for column, here in real), default=0)
    if low < 0 or high > np.iinfo(np.int32).max:
        raise DataError(
            "item codes are out of range",
            where="identifiers",
            got=f"{low} to {high}",
            expected="0 to 2 ** 31 - 1",
            fix="check the tokenizer's codes and depths",
        )
    kept = codes.astype(np.int16 if high <= np.iinfo(np.int16).max else np.int32, order="C")
    for level, (_, here) in enumerate(real):
        kept[~here, level] = -1
    return kept, depth


def _sort_rows(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order of the rows by their codes, and the rows in that order.

    One integer holds a row's codes of some levels and its place so far; sorting these is a stable pass, and passes run
    from the last levels to the first. With 256 codes and 2 ** 26 items a pass takes 4 levels.
    """
    num_items, max_depth = codes.shape
    place_bits = num_items.bit_length()
    code_bits = (int(codes.max(initial=0)) + 1).bit_length()
    step = (63 - place_bits) // code_bits
    order, rows = np.arange(num_items, dtype=np.int32), codes
    for stop in range(max_depth, 0, -step):
        key = np.zeros(num_items, np.int64)
        for level in range(max(0, stop - step), stop):
            key <<= code_bits
            key += rows[:, level]
            key += 1
        key <<= place_bits
        key += np.arange(num_items, dtype=np.int32)
        key.sort()
        key &= (1 << place_bits) - 1
        order = order.take(key)
        del key
        rows = codes.take(order, 0)
    return order, rows


def _check_unique(order: np.ndarray, lengths: np.ndarray, split: np.ndarray) -> None:
    """Sorted, a sequence that begins others stands right before one of them, and equal ones side by side."""
    begins = split[1:] >= lengths[:-1]
    if not begins.any():
        return
    bad = np.zeros(len(order), bool)
    bad[:-1] = begins
    bad[1:] |= split[1:] >= lengths[1:]
    shared = np.sort(order[bad])
    raise DataError(
        "item codes are not unique, or one is a prefix of another",
        where="identifiers",
        got=f"{len(shared)} items, first: {shared[:5].tolist()}",
        expected="one leaf an item",
        fix="add a collision code or split further",
    )


def _check_count(num_nodes: int) -> None:
    if num_nodes > MAX_NODES:
        raise DataError(
            "the trie has too many nodes",
            where="identifiers",
            got=num_nodes,
            expected=f"{MAX_NODES} at most: node numbers are int32",
            fix="use fewer items or shorter codes",
        )
