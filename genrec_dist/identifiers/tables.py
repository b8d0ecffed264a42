"""Embedding tables as a tokenizer reads them: rows by item, kept on the device where they fit, else read as needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from genrec_dist.artifacts.reader import EmbeddingStore
from genrec_dist.errors import DataError

RESIDENT_BYTES = 4 << 30
"""Tables up to this size in all are read once."""


class Tables:
    """One or several embedding tables over the same items.

    Args:
        folders: artifact folder of each table by name.
        device: where rows are wanted.
        resident_bytes: tables up to this size in all are kept on the device; larger ones are read row by row.

    Raises:
        DataError: tables of different length.
    """

    def __init__(self, folders: dict[str, Path], device: torch.device, resident_bytes: int = RESIDENT_BYTES) -> None:
        self.stores = {name: EmbeddingStore(folder) for name, folder in folders.items()}
        self.device = device
        counts = {name: store.num_items for name, store in self.stores.items()}
        if len(set(counts.values())) != 1:
            raise DataError("embedding tables have different numbers of items", got=counts)
        self.num_items = next(iter(counts.values()))
        self.widths = {name: store.dim for name, store in self.stores.items()}
        self.resident: dict[str, torch.Tensor] | None = None
        if 4 * self.num_items * sum(self.widths.values()) <= resident_bytes:
            whole = {name: store.read("zero") for name, store in self.stores.items()}
            self.resident = {name: torch.from_numpy(values).to(device) for name, values in whole.items()}

    def rows(self, items: np.ndarray) -> dict[str, torch.Tensor]:
        """Rows of items by table, (n, width) float32; items without an embedding are zeros.

        Shapes:
            items: (n,) int64.
        """
        if self.resident is not None:
            index = torch.from_numpy(np.ascontiguousarray(items)).to(self.device)
            return {name: values[index] for name, values in self.resident.items()}
        return {
            name: torch.from_numpy(store.rows(items, "zero")).to(self.device) for name, store in self.stores.items()
        }

    def scales(self) -> dict[str, torch.Tensor]:
        """Mean and standard deviation of every column, (2, width) float32; a constant column gets deviation 1.

        Read shard by shard; sums in float64; items without an embedding do not count.
        """
        out = {}
        for name, store in self.stores.items():
            count, total, square = 0, np.zeros(store.dim), np.zeros(store.dim)
            shift: np.ndarray | None = None
            for _, values in store.stream():
                shift = values[0].astype(np.float64) if shift is None and len(values) else shift
                if not len(values):
                    continue
                moved = values - shift
                count += len(moved)
                total += moved.sum(0)
                square += np.square(moved).sum(0)
            if shift is None:
                raise DataError("embedding table has no usable row", where=store.folder)
            mean = total / count
            deviation = np.sqrt(np.maximum(square / count - mean**2, 0.0))
            flat = deviation <= 1e-6 * max(float(deviation.max()), 1e-30)
            out[name] = torch.from_numpy(np.stack([mean + shift, np.where(flat, 1.0, deviation)]).astype(np.float32))
        return out

    def joiner(self, weight: float) -> Callable[[np.ndarray], np.ndarray]:
        """Function that reads rows of one table in which squared distances are the weighted mean of the tables' own,
        per standardised column. For a single table, the table itself.

        Args:
            weight: of the first table; the second has the rest.

        Returns:
            (n,) int64 items -> (n, sum of widths) float32; items without an embedding are zeros before that.
        """
        if len(self.stores) == 1:
            (store,) = self.stores.values()
            return lambda items: store.rows(items, "zero")
        scales = [scale.numpy() for scale in self.scales().values()]
        shares = [
            np.float32(np.sqrt(share / width)) for share, width in zip((weight, 1.0 - weight), self.widths.values())
        ]

        def rows(items: np.ndarray) -> np.ndarray:
            parts = [
                (store.rows(items, "zero") - mean) / deviation * share
                for store, (mean, deviation), share in zip(self.stores.values(), scales, shares)
            ]
            return np.concatenate(parts, 1, dtype=np.float32)

        return rows

    def joint(self, weight: float) -> np.ndarray:
        """`joiner`'s rows of all items."""
        return self.joiner(weight)(np.arange(self.num_items))
