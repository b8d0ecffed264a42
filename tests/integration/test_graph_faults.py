"""LightGCN and Stage I over graph partitions: killed workers, other numbers of them, bad files."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from test_kill_and_resume import TINY, finish, kill_in_stage, start

from genrec_dist.artifacts.files import read_jsonl
from genrec_dist.artifacts.reader import EmbeddingStore
from genrec_dist.testing.faults import truncate

OPTIM = {"batch_size": 64, "epochs": 12, "evaluate_every": 4}
GRAPH = {
    "name": "graph",
    "method": "lightgcn",
    "catalog": TINY["catalog"],
    "graph": {"partitioner": "pymetis"},  # the same cut every time
    "lightgcn": {"dim": 16, "optim": OPTIM},
    "references": [],
    "report": {"tsne_items": 0},
    "runtime": TINY["runtime"] | {"num_workers": 2, "max_failures": 2},
}


def with_workers(count: int) -> dict:
    return GRAPH | {"runtime": GRAPH["runtime"] | {"num_workers": count}}


def embeddings(folder: Path, stage: str = "lightgcn") -> np.ndarray:
    (artifact,) = (p.parent for p in folder.glob(f"store/{stage}/*/MANIFEST.json"))
    store = EmbeddingStore(artifact)
    assert store.verify() == []
    return store.rows(np.arange(store.num_items))


def events(folder: Path) -> list[dict]:
    return read_jsonl(folder / "runs" / "graph" / "events.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an uninterrupted run with two workers."""
    folder = tmp_path_factory.mktemp("graph")
    finish(start(folder, GRAPH))
    return folder


def test_what_a_run_leaves(whole):
    (artifact,) = (p.parent for p in whole.glob("store/lightgcn/*/MANIFEST.json"))
    users, items = EmbeddingStore(artifact / "users"), EmbeddingStore(artifact)
    assert users.verify() == items.verify() == []
    metrics = json.loads((whole / "runs" / "graph" / "metrics.json").read_text())["main"]
    assert metrics["users"] == users.num_items
    assert metrics["masked_seen"]["recall@20"] >= metrics["test"]["recall@20"] > 0.1
    (report,) = whole.glob("store/partitions/*/report.json")
    report = json.loads(report.read_text())
    assert report["num_parts"] == len(report["parts"]) == 2
    assert re.fullmatch("[0-9a-f]{64}", report["assignment_sha256"])
    assert report["dgl_format"]


def test_a_killed_worker_costs_nothing_but_time(tmp_path, whole):
    """One of two workers dies in mid-epoch: both start again from the last checkpoint, to the same bytes."""
    process = start(tmp_path, GRAPH)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(tmp_path.glob("store/lightgcn/*/scratch/*/step-*/checkpoint.json")):
        time.sleep(0.01)
    workers = [p for p in psutil.Process(process.pid).children() if "multiprocessing" in " ".join(p.cmdline())]
    workers = [p for p in workers if "spawn_main" in " ".join(p.cmdline())]
    assert len(workers) >= 2
    workers[-1].send_signal(signal.SIGKILL)
    finish(process)
    assert any(e["event"] == "training_resumed" for e in events(tmp_path))
    assert np.array_equal(embeddings(tmp_path), embeddings(whole))


@pytest.mark.slow
def test_one_worker_goes_on_where_two_were_killed(tmp_path, whole):
    kill_in_stage(tmp_path, GRAPH, "lightgcn", needs_checkpoint=True)
    finish(start(tmp_path, with_workers(1)))
    found = events(tmp_path)
    assert any(e["event"] == "training_resumed" for e in found)
    assert [e["event"] for e in found if e.get("stage") == "partitions"].count("stage_built") == 2
    wanted = embeddings(whole)
    np.testing.assert_allclose(embeddings(tmp_path), wanted, atol=1e-3 * np.abs(wanted).max())


def test_a_corrupt_partition_is_named_and_rebuilt(tmp_path, whole):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    before = embeddings(folder)
    truncate(next(folder.glob("store/partitions/*/part-1/indices.npy")))
    for artifact in folder.glob("store/lightgcn/*"):  # so that the partitions are needed again
        if artifact.is_dir():
            shutil.rmtree(artifact)
    process = start(folder, GRAPH)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "partitions: stored artifact is corrupt" in output
    corrupt = [e for e in events(folder) if e["event"] == "artifact_corrupt"]
    assert "part-1/indices.npy" in corrupt[0]["detail"]
    assert list(folder.glob("store/quarantine/partitions-*"))
    assert np.array_equal(embeddings(folder), before)


def test_a_finished_training_needs_no_partitions_for_another_number_of_workers(whole):
    finish(start(whole, with_workers(3)))
    assert len(list(whole.glob("store/partitions/*/MANIFEST.json"))) == 1


@pytest.mark.slow
def test_stage_one_over_partitions_feeds_the_rest_of_the_method(tmp_path):
    sharded = TINY | {
        "name": "graph",
        "graph": {"partitioner": "random"},
        "fusion": TINY["fusion"] | {"loss": "sampled_softmax", "num_negatives": 64},
        "runtime": TINY["runtime"] | {"num_workers": 2, "shard_tables": True},
    }
    finish(start(tmp_path, sharded))
    assert embeddings(tmp_path, "fusion").shape[1] == 16
    (artifact,) = (p.parent for p in tmp_path.glob("store/fusion/*/MANIFEST.json"))
    for name in ("collaborative", "adapted"):
        assert EmbeddingStore(artifact / name).verify() == []
    assert set(json.loads((artifact / "similarity.json").read_text())) == {"ours", "concat"}
    metrics = json.loads((tmp_path / "runs" / "graph" / "metrics.json").read_text())
    assert metrics["main"]["test"]["recall@20"] > 0
