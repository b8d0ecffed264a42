"""A catalog in a few lines: statistics, what the ledger holds, some items and sequences. Reads only."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from genrec_dist.artifacts.files import read_json
from genrec_dist.catalog.dataset import Catalog


def describe(catalog: Catalog | str | Path, num_examples: int = 3) -> dict:
    """Statistics, ledger summary and examples of a finished catalog, JSON-ready.

    Args:
        catalog: a Catalog or the folder of one.
        num_examples: items and sequences shown.

    Returns:
        {'stats', 'ledger', 'oracle' (synthetic catalogs only), 'items', 'sequences'}.
    """
    catalog = catalog if isinstance(catalog, Catalog) else Catalog(Path(catalog))
    folder = catalog.folder
    oracle = folder / "oracle.json"
    items = next(pq.ParquetFile(folder / "items.parquet").iter_batches(num_examples)).to_pylist()
    users = next(pq.ParquetFile(folder / "sequences.parquet").iter_batches(num_examples)).to_pylist()
    return {
        "stats": read_json(folder / "stats.json"),
        "ledger": read_json(folder / "ledger.json"),
        **({"oracle": read_json(oracle)} if oracle.exists() else {}),
        "items": items,
        "sequences": [
            {
                "user_id": user["user_id"],
                "items": [
                    {"item_id": catalog.item_ids[item], "title": catalog.titles[item], "timestamp": stamp}
                    for item, stamp in zip(user["items"], user["timestamps"])
                ],
            }
            for user in users
        ],
    }
