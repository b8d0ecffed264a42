"""Vectors that an earlier artifact already holds: items that are new to a catalog are embedded, the others copied.

A text's key is 128 bits of its hash. `text_index.npy` of an artifact holds the keys in order and their rows, as three
rows of uint64 (high half, low half, row), and is read through a memory map, so that its size does not matter. It is
made bucket by bucket for the same reason.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from genrec_dist.artifacts.files import read_json
from genrec_dist.artifacts.reader import EmbeddingStore
from genrec_dist.artifacts.store import MANIFEST, problems_of
from genrec_dist.errors import ArtifactError

INDEX = "text_index.npy"
BUCKET_ROWS = 4 << 20
MAX_SOURCES = 4


def text_keys(texts: list[str]) -> np.ndarray:
    """128-bit keys of texts, (n, 2) uint64: high and low half."""
    data = b"".join(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest() for text in texts)
    return np.frombuffer(data, "<u8").reshape(-1, 2)


def keys_file(scratch: Path, shard: int) -> Path:
    """Where a worker leaves the keys of a shard's texts until the index is built."""
    return scratch / "text_keys" / f"{shard:06d}.npy"


def build_index(scratch: Path, folder: Path, num_items: int, rows_per_shard: int, failed: np.ndarray) -> None:
    """Sort the keys of all shards into the artifact's index.

    Args:
        scratch: holds the shards' keys (see `keys_file`).
        folder: where the index goes.
        num_items: rows.
        rows_per_shard: rows of a shard.
        failed: items without a vector, left out.
    """
    files = [keys_file(scratch, shard) for shard in range(-(-num_items // rows_per_shard))]
    bits = (num_items // BUCKET_ROWS).bit_length()
    sizes = np.zeros(1 << bits, np.int64)
    for shard, file in enumerate(files):
        sizes += np.bincount(_bucket(_kept(file, shard * rows_per_shard, failed), bits), minlength=len(sizes))
    ends = np.cumsum(sizes)
    place = ends - sizes
    out = np.lib.format.open_memmap(folder / INDEX, "w+", "<u8", (3, int(ends[-1])))
    for shard, file in enumerate(files):
        kept = _kept(file, shard * rows_per_shard, failed)
        bucket = _bucket(kept, bits)
        for number in np.unique(bucket):
            part = kept[:, bucket == number]
            out[:, place[number] : place[number] + part.shape[1]] = part
            place[number] += part.shape[1]
    for first, last in zip(ends - sizes, ends):
        part = out[:, first:last]
        out[:, first:last] = part[:, np.lexsort(part[::-1])]
    out.flush()


def _kept(file: Path, start: int, failed: np.ndarray) -> np.ndarray:
    """Keys and rows of one shard's items that have a vector, (3, n) uint64."""
    keys = np.load(file, allow_pickle=False)
    rows = start + np.arange(len(keys))
    return np.stack([keys[:, 0], keys[:, 1], rows.astype("<u8")])[:, ~np.isin(rows, failed)]


def _bucket(entries: np.ndarray, bits: int) -> np.ndarray:
    high = entries[0]
    return (high >> np.uint64(64 - bits)).astype(np.int64) if bits else np.zeros(len(high), np.int64)


class KnownTexts:
    """Texts whose vector one finished artifact holds.

    Args:
        folder: a finished artifact of the semantic stage.
    """

    def __init__(self, folder: Path) -> None:
        self.store = EmbeddingStore(folder)
        self.index = np.load(folder / INDEX, mmap_mode="r", allow_pickle=False)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Row of each text, -1 where it is not known.

        Shapes:
            keys: (n, 2) uint64. returns: (n,) int64.
        """
        high, low, row = self.index
        rows = np.full(len(keys), -1, np.int64)
        places = np.searchsorted(high, keys[:, 0])
        for n, place in enumerate(places):
            while place < len(high) and high[place] == keys[n, 0]:
                if low[place] == keys[n, 1]:
                    rows[n] = row[place]
                    break
                place += 1
        return rows


def find_sources(out: Path, version: int, settings: dict) -> list[Path]:
    """Finished, undamaged artifacts with the same settings as the one that is being built, newest first.

    Args:
        out: work folder of the artifact; the others lie beside it.
        version: of the stage's code.
        settings: of the stage; the model must have a fixed fingerprint.
    """
    if settings["model_fingerprint"] is None:
        return []
    found = []
    for manifest in out.parent.glob(f"*/{MANIFEST}"):
        try:
            content = read_json(manifest)
        except (OSError, ValueError):
            continue
        same = content.get("version") == version and content.get("settings") == settings
        if same and (manifest.parent / INDEX).is_file():
            found.append((manifest.stat().st_mtime, manifest.parent))
    sources = []
    for _, folder in sorted(found, reverse=True)[:MAX_SOURCES]:
        try:
            if not problems_of(folder):
                KnownTexts(folder)
                sources.append(folder)
        except ArtifactError:
            continue  # the stage that owns it will say so and rebuild it
    return sources
