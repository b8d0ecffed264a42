"""Rows to be clustered: arrays, embedding tables, parts of files; read range by range, as float32.

A reader describes where rows are, not how much memory there is: whoever passes over them reads a range at a time or
keeps them all.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from genrec_dist.artifacts.embeddings import space_checked
from genrec_dist.errors import ArtifactError

RESIDUAL_ROWS = 1 << 14


class Rows(Protocol):
    """Something with rows."""

    @property
    def num_rows(self) -> int: ...
    @property
    def dim(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop - 1, (n, dim) float32, C-contiguous. What it returns must not be written to."""
        ...

    def take(self, index: np.ndarray) -> np.ndarray:
        """Any rows, (n, dim) float32, in the order asked for."""
        ...


class ArrayRows:
    """Rows of an array in memory.

    Shapes:
        values: (num_rows, dim) float32.
    """

    def __init__(self, values: np.ndarray) -> None:
        self.values = np.ascontiguousarray(values, np.float32)
        self.num_rows, self.dim = self.values.shape

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.values[start:stop]

    def take(self, index: np.ndarray) -> np.ndarray:
        return self.values[index]


class TableRows:
    """Rows of one embedding table, or of two joined so that distances are a weighted mean of theirs.

    Args:
        folders: artifact folder by table.
        weight: of the first of two tables.
    """

    def __init__(self, folders: dict[str, Path], weight: float = 1.0) -> None:
        import torch

        from genrec_dist.identifiers.tables import Tables  # an actor that reads files needs no torch

        self.tables = Tables(folders, torch.device("cpu"), resident_bytes=0)
        self.joint = self.tables.joiner(weight)
        self.num_rows, self.dim = self.tables.num_items, sum(self.tables.widths.values())

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.joint(np.arange(start, stop))

    def take(self, index: np.ndarray) -> np.ndarray:
        return self.joint(index)


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a raw float32 file.

    Args:
        file: the file.
        start, stop: rows.
    """

    file: str
    start: int
    stop: int


class FileRows:
    """Rows of parts of raw float32 files, one part after the other.

    Raises:
        ArtifactError: a file is shorter than its part.
    """

    def __init__(self, parts: Sequence[Part], dim: int) -> None:
        self.parts, self.dim = [part for part in parts if part.stop > part.start], dim
        self.begins = np.concatenate([[0], np.cumsum([part.stop - part.start for part in self.parts], dtype=np.int64)])
        self.num_rows = int(self.begins[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, self.dim), np.float32)
        for part, begin in zip(self.parts, self.begins[:-1].tolist()):
            low, high = max(start, begin), min(stop, begin + part.stop - part.start)
            if low >= high:
                continue
            first = part.start + low - begin
            values = np.fromfile(part.file, np.float32, (high - low) * self.dim, offset=first * self.dim * 4)
            if len(values) < (high - low) * self.dim:
                raise ArtifactError(
                    "file of rows is too short",
                    where=part.file,
                    got=f"{len(values) // self.dim} rows from row {first}",
                    expected=f"{high - low}",
                    fix="remove the stage's scratch folder and run it again",
                )
            out[low - start : high - start] = values.reshape(-1, self.dim)
        return out

    def take(self, index: np.ndarray) -> np.ndarray:
        return np.concatenate([self.read(i, i + 1) for i in index.tolist()] or [np.empty((0, self.dim), np.float32)])


class TakenRows:
    """Chosen rows of other rows.

    Shapes:
        index: (num_rows,) int64.
    """

    def __init__(self, rows: Rows, index: np.ndarray) -> None:
        self.rows, self.index, self.num_rows, self.dim = rows, index, len(index), rows.dim

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.rows.take(self.index[start:stop])

    def take(self, index: np.ndarray) -> np.ndarray:
        return self.rows.take(self.index[index])


class UnitRows:
    """Rows scaled to length 1, for cosine; a row of zeros stays."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.num_rows, self.dim = rows, rows.num_rows, rows.dim

    def read(self, start: int, stop: int) -> np.ndarray:
        return unit(self.rows.read(start, stop))

    def take(self, index: np.ndarray) -> np.ndarray:
        return unit(self.rows.take(index))


class RangeRows:
    """Consecutive rows of other rows."""

    def __init__(self, rows: Rows, start: int, stop: int) -> None:
        self.rows, self.start, self.num_rows, self.dim = rows, start, stop - start, rows.dim

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.rows.read(self.start + start, self.start + stop)

    def take(self, index: np.ndarray) -> np.ndarray:
        return self.rows.take(index + self.start)


class ResidualRows:
    """What levels of codes have left of other rows."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.num_rows, self.dim = rows, rows.num_rows, rows.dim
        self.levels: list[tuple[np.ndarray, np.ndarray]] = []

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._less(self.rows.read(start, stop), slice(start, stop))

    def take(self, index: np.ndarray) -> np.ndarray:
        return self._less(self.rows.take(index), index)

    def _less(self, values: np.ndarray, index: Any) -> np.ndarray:
        for codes, codebook in self.levels:
            values = values - codebook[codes[index]]
        return values


def descend(rows: Rows, codes: np.ndarray, codebook: np.ndarray) -> Rows:
    """What a level of codes leaves of rows: in memory if they are, else worked out as they are read.

    Shapes:
        codes: (num_rows,) int. codebook: (K, dim) float32.
    """
    if isinstance(rows, ArrayRows):
        left = rows.values.copy()
        for start in range(0, len(left), RESIDUAL_ROWS):
            left[start : start + RESIDUAL_ROWS] -= codebook[codes[start : start + RESIDUAL_ROWS]]
        return ArrayRows(left)
    out = ResidualRows(rows.rows if isinstance(rows, ResidualRows) else rows)
    out.levels = [*(rows.levels if isinstance(rows, ResidualRows) else ()), (codes, codebook)]
    return out


def unit(values: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; zeros stay."""
    norms = np.sqrt(np.einsum("nd,nd->n", values, values, dtype=np.float64))
    return (values / np.where(norms > 0, norms, 1.0)[:, None]).astype(np.float32)


@dataclass(frozen=True)
class RowSource:
    """Where rows are, as plain data that can travel to another process.

    Args:
        tables: folder by name of embedding tables; or
        parts: of raw float32 files, with their width `dim`.
        weight: of the first of two tables.
        unit: scale the tables' rows to length 1.
    """

    tables: dict[str, Path] | None = None
    parts: tuple[Part, ...] = ()
    dim: int = 0
    weight: float = 1.0
    unit: bool = False

    def open(self) -> Rows:
        """The rows."""
        if self.tables is None:
            return FileRows(self.parts, self.dim)
        rows = TableRows(self.tables, self.weight)
        return UnitRows(rows) if self.unit else rows


def rows_by_cluster(labels: np.ndarray, num_clusters: int) -> list[np.ndarray]:
    """Places of each cluster's rows, ascending; `num_clusters` arrays of int64."""
    stops = np.cumsum(np.bincount(labels, minlength=num_clusters))[:-1]
    return np.split(np.argsort(labels, kind="stable"), stops)


def write_by_cluster(rows: Rows, labels: np.ndarray, num_clusters: int, file: Path, rows_at_once: int) -> np.ndarray:
    """Write all rows into one raw float32 file, cluster by cluster, in their order within each; returns the sizes.

    The file is whole or not there. Memory: `rows_at_once` rows.

    Shapes:
        labels: (num_rows,) int, 0 to num_clusters - 1. returns: (num_clusters,) int64.
    """
    sizes = np.bincount(labels, minlength=num_clusters)
    place = np.cumsum(sizes) - sizes
    row_bytes = 4 * rows.dim
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with space_checked(file), open(temporary, "wb") as handle:
            for start in range(0, rows.num_rows, rows_at_once):
                values = rows.read(start, min(start + rows_at_once, rows.num_rows))
                label = labels[start : start + len(values)]
                ordered = values[np.argsort(label, kind="stable")]
                begin = 0
                for cluster, count in enumerate(np.bincount(label, minlength=num_clusters).tolist()):
                    if count:
                        data = memoryview(ordered[begin : begin + count].data).cast("B")
                        _write_at(handle.fileno(), data, int(place[cluster]) * row_bytes)
                        place[cluster] += count
                        begin += count
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return sizes


def _write_at(handle: int, data: memoryview, offset: int) -> None:
    while len(data):
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written


def parts_by_cluster(files: Sequence[Path], sizes: Sequence[np.ndarray]) -> list[tuple[Part, ...]]:
    """Parts that hold each cluster's rows, of files that `write_by_cluster` wrote."""
    ends = [np.cumsum(one) for one in sizes]
    return [
        tuple(
            Part(str(file), int(end[cluster] - size[cluster]), int(end[cluster]))
            for file, size, end in zip(files, sizes, ends, strict=True)
        )
        for cluster in range(len(sizes[0]))
    ]
