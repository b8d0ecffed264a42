"""LightGCN under Ray Train with two workers: the tables of torchrun's launcher, from the same stage function."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from genrec_dist.artifacts.reader import EmbeddingStore
from genrec_dist.collaborative.lightgcn_stage import train_lightgcn
from genrec_dist.config import GraphConfig, LightgcnConfig, RuntimeConfig
from genrec_dist.evaluation.collaborative import COUNTS
from genrec_dist.graph.stage import build_graph, build_partitions
from genrec_dist.pipeline import StageContext
from genrec_dist.testing.tiny import tiny_sequences, write_tiny_catalog
from genrec_dist.training.launch import launch

SETTINGS = {
    "lightgcn": LightgcnConfig(dim=8, optim={"batch_size": 32, "epochs": 3, "evaluate_every": 1}).model_dump(),
    "seed": 3,
}


def train(root: Path, name: str, runtime: RuntimeConfig) -> Path:
    out = root / name
    out.mkdir()
    context = StageContext(
        out=out, inputs={"graph": root / "graph", "partitions": root / "parts"}, runtime=runtime, key=name
    )
    launch(train_lightgcn, context, SETTINGS)
    return out


@pytest.mark.slow
def test_ray_and_torchrun_train_the_same(tmp_path, ray_session):
    catalog = write_tiny_catalog(tmp_path / "catalog", tiny_sequences(80, 40, seed=4))
    for name, build, settings in (
        ("graph", build_graph, {"order": "time"}),
        ("parts", build_partitions, GraphConfig(partitioner="pymetis", block_nodes=20).model_dump() | {"num_parts": 2}),
    ):
        (tmp_path / name).mkdir()
        inputs = {"catalog": catalog, "graph": tmp_path / "graph"}
        build(StageContext(out=tmp_path / name, inputs=inputs, runtime=RuntimeConfig()), settings)
    common = {"num_workers": 2, "num_threads": 1, "device": "cpu"}
    local = train(tmp_path, "local", RuntimeConfig(backend="local", **common))
    ray = train(tmp_path, "ray", RuntimeConfig(backend="ray", **common))
    for folder in ("", "users"):
        stores = [EmbeddingStore(out / folder) for out in (local, ray)]
        assert all(store.verify() == [] for store in stores)
        tables = [store.rows(np.arange(store.num_items)) for store in stores]
        assert np.array_equal(*tables)
    assert np.array_equal(np.load(local / COUNTS), np.load(ray / COUNTS))
    assert np.load(ray / COUNTS).sum() > 0
