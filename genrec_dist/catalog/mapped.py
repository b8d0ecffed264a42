"""Sequences as memory-mapped arrays, derived from a catalog artifact when they are first wanted.

A mapped file is read where it is touched and shared by all processes of a machine; Parquet has to be decoded whole
into each. The map lies beside the artifact, `<key>/` -> `.<key>.mapped-<order>/`, and not in it: the artifact's bytes
and content hash stay what they are, old artifacts get a map too, and each order of interactions has its own. It can be
deleted at any time. It holds indptr.npy (int64), items.npy (int32) and timestamps.npy (int64), 12 bytes an interaction.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from genrec_dist.artifacts.files import read_json, write_json

FROM_INTERACTIONS = 1 << 24
"""Catalogs with fewer interactions are read into memory: 200 MB at most, in a second or two."""
_FILES = ("indptr", "items", "timestamps")
_STAMP = "source.json"

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


class Block(Protocol):
    """Sequences of consecutive users."""

    @property
    def indptr(self) -> np.ndarray: ...
    @property
    def items(self) -> np.ndarray: ...
    @property
    def timestamps(self) -> np.ndarray: ...


def mapped_arrays(source: Path, order: str, blocks: Iterator[Block], num_users: int, num_interactions: int) -> Arrays:
    """Row pointers, items and timestamps, mapped read-only; written first where they are missing or out of date.

    Args:
        source: sequences.parquet of a finished catalog.
        order: of the interactions that `blocks` gives.
        blocks: all sequences, a part at a time; consumed only if they have to be written.
        num_users, num_interactions: in all blocks.

    Raises:
        OSError: the map is missing and cannot be written.
    """
    artifact = source.parent.resolve()
    folder = artifact.with_name(f".{artifact.name}.mapped-{order}")
    stat = source.stat()
    stamp = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "interactions": num_interactions}
    if not _current(folder, stamp):
        with open(folder.with_name(folder.name + ".lock"), "w", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process of a machine writes, the others wait and find it done
            if not _current(folder, stamp):
                _write(folder, stamp, blocks, num_users, num_interactions)
    indptr, items, timestamps = (np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in _FILES)
    return indptr, items, timestamps


def _current(folder: Path, stamp: dict) -> bool:
    try:
        return read_json(folder / _STAMP) == stamp
    except (OSError, ValueError):
        return False


def _write(folder: Path, stamp: dict, blocks: Iterator[Block], num_users: int, num_interactions: int) -> None:
    work = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        work.mkdir()
        create = np.lib.format.open_memmap
        indptr = create(work / "indptr.npy", "w+", np.int64, (num_users + 1,))
        items = create(work / "items.npy", "w+", np.int32, (num_interactions,))
        stamps = create(work / "timestamps.npy", "w+", np.int64, (num_interactions,))
        user, place = 0, 0
        for block in blocks:
            users, count = len(block.indptr) - 1, len(block.items)
            indptr[user + 1 : user + 1 + users] = block.indptr[1:] + place
            items[place : place + count], stamps[place : place + count] = block.items, block.timestamps
            user, place = user + users, place + count
        assert (user, place) == (num_users, num_interactions)
        for array in (indptr, items, stamps):
            array.flush()
        write_json(work / _STAMP, stamp)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
