"""A study's configuration over 60 items and 80 users, trained for an epoch, with text embeddings from a file."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from genrec_dist.catalog.synth import write_synthetic

OPTIM = {"epochs": 1, "batch_size": 64, "warmup_steps": 2}
TINY = {
    "catalog": {"source": "synthetic", "synthetic": {"num_items": 60, "num_users": 80, "seed": 1}},
    "fusion": {"dim": 8, "integrated": "sum", "optim": OPTIM},
    "lightgcn": {"dim": 8, "optim": {"epochs": 1, "batch_size": 64}},
    "identifiers": {"num_clusters": 6, "num_levels": 4, "rqvae": {"hidden": [8], "latent_dim": 4, "optim": OPTIM}},
    "generator": {"dim": 8, "num_heads": 2, "num_decoder_layers": 1, "optim": OPTIM},
    "evaluation": {"beam_width": 20, "exact_users": 10, "bootstrap_samples": 20},
    "references": [],
    "report": {"tsne_items": 0},
    "runtime": {"backend": "local", "device": "cpu", "num_threads": 1},
}
ASIN = re.compile(r"'asin': '(\w+)'")


def tiny_config(folder: Path) -> dict:
    """The configuration; writes the embeddings that it names into the folder."""
    write_synthetic(folder / "raw", 60, 80, 1)
    metadata = [gzip.decompress(file.read_bytes()).decode() for file in (folder / "raw").glob("meta*")]
    ids = [asin for text in metadata for asin in ASIN.findall(text)]
    vectors = list(np.random.default_rng(0).normal(size=(len(ids), 8)).astype(np.float32))
    pq.write_table(pa.table({"item_id": ids, "embedding": vectors}), folder / "vectors.parquet")
    return TINY | {"semantic": {"engine": "precomputed", "model": str(folder / "vectors.parquet")}}
