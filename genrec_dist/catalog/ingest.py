"""Input files -> raw Parquet shards: a Ray Data pipeline, or a plain loop over the same pure functions.

Writes `<folder>/<role>/*.parquet` in the schemas of rows.py and, last, `<folder>/<role>.done`. The number and
names of the shards say nothing: whoever reads them sorts by (file, line).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genrec_dist.artifacts.files import write_json
from genrec_dist.catalog import amazon, parquet
from genrec_dist.catalog.locate import InputFile
from genrec_dist.catalog.rows import SCHEMAS
from genrec_dist.cluster import ensure_ray, quiet_ray_data
from genrec_dist.config import RuntimeConfig
from genrec_dist.errors import DataError, find_typed


def parse_file(path: str, file: int, source: str, role: str) -> Iterator[pa.Table]:
    """Tables of rows of one input file.

    Args:
        path: the file.
        file: its number, stored in every row.
        source: catalog.source.
        role: 'interactions' or 'items'.
    """
    reader = parquet if source == "parquet" else amazon
    read = reader.read_interactions if role == "interactions" else reader.read_items
    return read(Path(path), source, file)


def ingest(files: list[InputFile], source: str, role: str, folder: Path, runtime: RuntimeConfig) -> Path:
    """Parse all files of a role into raw shards, unless a finished set is there.

    Args:
        files: input files; their place in the list is their number.
        source: catalog.source.
        role: 'interactions' or 'items'.
        folder: scratch folder; on a cluster, one that every node sees.
        runtime: backend 'ray' or 'local'; the rows are the same.

    Returns:
        Folder of the shards.

    Raises:
        DataError: a file cannot be read at all.
    """
    out, done = folder / role, folder / f"{role}.done"
    if done.exists():
        return out
    shutil.rmtree(out, ignore_errors=True)  # a killed attempt
    out.mkdir(parents=True)
    write = _write_with_ray if runtime.backend == "ray" else _write_in_process
    write(files, source, role, out, runtime)
    write_json(done, {"files": len(files)})
    return out


def read_shards(folder: Path, role: str, as_codes: tuple[str, ...] = ()) -> pa.Table:
    """All rows of a role, sorted by (file, line).

    Args:
        folder: what `ingest` returned.
        role: 'interactions' or 'items'.
        as_codes: string columns to read dictionary-encoded, one dictionary for all rows.
    """
    fields = [
        pa.field(f.name, pa.dictionary(pa.int32(), pa.string())) if f.name in as_codes else f for f in SCHEMAS[role]
    ]
    schema = pa.schema(fields)
    shards = [
        pq.read_table(path, columns=schema.names, read_dictionary=list(as_codes), partitioning=None).cast(schema)
        for path in sorted(folder.glob("*.parquet"))
    ]
    table = pa.concat_tables([schema.empty_table(), *shards]).unify_dictionaries()
    order = np.lexsort((table["line"].to_numpy(), table["file"].to_numpy()))
    return table if (np.diff(order) == 1).all() else table.take(order)


def _write_in_process(files: list[InputFile], source: str, role: str, out: Path, runtime: RuntimeConfig) -> None:
    for number, file in enumerate(files):
        with pq.ParquetWriter(out / f"{number:05d}.parquet", SCHEMAS[role]) as writer:
            for table in parse_file(str(file.path), number, source, role):
                writer.write_table(table)


def _parse_batch(batch: dict[str, np.ndarray], source: str, role: str) -> Iterator[pa.Table]:
    for path, number in zip(batch["path"], batch["file"]):
        yield from parse_file(str(path), int(number), source, role)
        yield SCHEMAS[role].empty_table()  # an empty file still has a schema


def _write_with_ray(files: list[InputFile], source: str, role: str, out: Path, runtime: RuntimeConfig) -> None:
    ensure_ray(runtime)
    import ray.data

    quiet_ray_data()
    rows = [{"path": str(file.path), "file": number} for number, file in enumerate(files)]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        partial(_parse_batch, source=source, role=role), batch_size=1, batch_format="numpy"
    )
    try:
        dataset.write_parquet(str(out))
    except Exception as error:
        raise find_typed(error) or DataError(
            "reading the input failed in a Ray worker", where=role, got=f"{type(error).__name__}: {error}"
        ) from error
