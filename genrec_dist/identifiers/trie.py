"""Trie over item codes: node numbering and child ranges, from any tokenizer's codes.

Nodes are numbered level by level (root 0), children of a node are consecutive and sorted by code, so a child
set is a range: `first_child[node] .. first_child[node] + num_children[node]`. Every leaf is exactly one item.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from genrec_dist.errors import DataError

FILE = "codebook.safetensors"


@dataclass(frozen=True)
class Trie:
    """Codes and their trie.

    Shapes:
        codes: (num_items, max_depth) int32, -1 past an item's depth.
        depth: (num_items,) int32.
        item_path: (num_items, max_depth) int32 node of each prefix; past the depth the leaf is repeated.
        first_child, num_children, parent, level, code: (num_nodes,) int32; the root's parent is -1.
        node_item: (num_nodes,) int32 item of a leaf, -1 for inner nodes.
    """

    codes: np.ndarray
    depth: np.ndarray
    item_path: np.ndarray
    first_child: np.ndarray
    num_children: np.ndarray
    parent: np.ndarray
    level: np.ndarray
    code: np.ndarray
    node_item: np.ndarray

    @property
    def num_items(self) -> int:
        return len(self.codes)

    @property
    def num_nodes(self) -> int:
        return len(self.parent)

    @property
    def max_depth(self) -> int:
        return self.codes.shape[1]

    def max_children(self, level: int) -> int:
        """Largest number of children of a node at `level` (root: 0)."""
        return int(self.num_children[self.level == level].max(initial=0))

    def save(self, folder: Path) -> None:
        """Write codebook.safetensors."""
        save_file({f.name: np.ascontiguousarray(getattr(self, f.name)) for f in fields(self)}, folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> Trie:
        """Read codebook.safetensors."""
        return cls(**load_file(folder / FILE))


def build_trie(codes: np.ndarray, depth: np.ndarray) -> Trie:
    """Number the prefixes of all codes.

    Shapes:
        codes: (num_items, max_depth) int32, entries at or past `depth` ignored.
        depth: (num_items,) int32, at least 1.

    Raises:
        DataError: two items share a code sequence, or one item's is a prefix of another's.
    """
    num_items, max_depth = codes.shape
    path = np.zeros((num_items, max_depth), np.int32)
    parents, levels, values = [np.array([-1], np.int32)], [np.zeros(1, np.int32)], [np.array([-1], np.int32)]
    above = np.zeros(num_items, np.int64)
    num_nodes = 1
    width = int(codes.max(initial=0)) + 1
    for level in range(max_depth):
        active = np.flatnonzero(depth > level)
        key = above[active] * width + codes[active, level]
        unique, inverse = np.unique(key, return_inverse=True)
        parents.append((unique // width).astype(np.int32))
        values.append((unique % width).astype(np.int32))
        levels.append(np.full(len(unique), level + 1, np.int32))
        above[active] = num_nodes + inverse
        path[:, level] = above
        num_nodes += len(unique)
    parent, level_of, code = np.concatenate(parents), np.concatenate(levels), np.concatenate(values)
    num_children = np.bincount(parent[1:], minlength=num_nodes).astype(np.int32)
    # Children are consecutive because each level is sorted by (parent, code).
    first_child = np.zeros(num_nodes, np.int32)
    inner = np.flatnonzero(num_children)
    first_child[inner] = 1 + np.searchsorted(parent[1:], inner).astype(np.int32)
    leaf = above
    users = np.bincount(leaf, minlength=num_nodes)
    if (users > 1).any() or num_children[leaf].any():
        shared = np.flatnonzero((users[leaf] > 1) | (num_children[leaf] > 0))
        raise DataError(
            "item codes are not unique, or one is a prefix of another",
            where="identifiers",
            got=f"{len(shared)} items, first: {shared[:5].tolist()}",
            expected="one leaf an item",
            fix="add a collision code or split further",
        )
    node_item = np.full(num_nodes, -1, np.int32)
    node_item[leaf] = np.arange(num_items, dtype=np.int32)
    return Trie(codes, depth, path, first_child, num_children, parent, level_of, code, node_item)
