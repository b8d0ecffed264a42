"""Assembled catalog -> items.parquet, sequences.parquet, stats.json. The layout is that of dataset.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from genrec_dist.artifacts.files import write_json
from genrec_dist.catalog.assemble import Assembled
from genrec_dist.catalog.dataset import Catalog

ROWS_PER_GROUP = 65_536  # readers can take a part of the file


def write_catalog(assembled: Assembled, folder: Path) -> None:
    """Write the three files.

    Args:
        assembled: indexed, ordered interactions and the metadata of their items.
        folder: where the files go.
    """
    _write_items(assembled.items, folder / "items.parquet")
    _write_sequences(assembled, folder / "sequences.parquet")
    write_json(folder / "stats.json", _statistics(assembled, folder))


def _write_items(items: pa.Table, path: Path) -> None:
    categories = items["categories"].combine_chunks()
    lists = pa.ListArray.from_arrays(_offsets(pc.fill_null(pc.list_value_length(categories), 0)), categories.flatten())
    columns = {
        "item_index": pa.array(np.arange(len(items), dtype=np.int32)),
        "item_id": items["item_id"],
        "title": items["title"],
        "brand": items["brand"],
        "categories": lists,
        "description": items["description"],
        "price": items["price"],
    }
    pq.write_table(pa.table(columns), path, row_group_size=ROWS_PER_GROUP)


def _write_sequences(assembled: Assembled, path: Path) -> None:
    num_users = len(assembled.user_ids)
    offsets = _offsets(np.bincount(assembled.user, minlength=num_users))
    stamps = pa.array(assembled.timestamp, mask=~assembled.has_timestamp)
    columns = {
        "user_index": pa.array(np.arange(num_users, dtype=np.int32)),
        "user_id": assembled.user_ids,
        "items": pa.ListArray.from_arrays(offsets, pa.array(assembled.item)),
        "timestamps": pa.ListArray.from_arrays(offsets, stamps),
    }
    pq.write_table(pa.table(columns), path, row_group_size=ROWS_PER_GROUP)


def _offsets(lengths: np.ndarray | pa.Array) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def _statistics(assembled: Assembled, folder: Path) -> dict:
    sequences = Catalog(folder).read_sequences()  # not mapped: the folder gets another name
    lengths = sequences.lengths
    num_users, num_items, num_interactions = sequences.num_users, sequences.num_items, len(sequences.items)
    return {
        "num_users": num_users,
        "num_items": num_items,
        "num_interactions": num_interactions,
        "density": num_interactions / (num_users * num_items),
        "sequence_length": {
            "mean": float(lengths.mean()),
            "median": float(np.median(lengths)),
            "min": int(lengths.min()),
            "max": int(lengths.max()),
        },
        "titles": num_items - assembled.items["title"].null_count,
        "brands": num_items - assembled.items["brand"].null_count,
        "users_with_tied_targets": int(sequences.tied_users().sum()),
        "missing_timestamps": int((~assembled.has_timestamp).sum()),
        "input": assembled.counts,
    }
