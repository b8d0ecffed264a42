"""A Ray cluster that loses a node in the middle of a training and gets another one later."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from genrec_dist.artifacts.files import read_json, read_jsonl
from genrec_dist.cluster import loopback_only
from genrec_dist.testing.faulty_training import context_of, train_with_faults
from genrec_dist.training.launch import launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SETTINGS = {"epochs": 12, "patience": 1000}
DRIVER = """
import sys
from pathlib import Path
from genrec_dist.testing.faulty_training import context_of, train_with_faults
from genrec_dist.training import launch_ray
from genrec_dist.training.launch import launch

launch_ray.RESIZE_SECONDS = 3.0
folder, address, least = sys.argv[1:]
runtime = {"backend": "ray", "ray_address": address, "num_workers": 2, "min_workers": int(least), "max_failures": 0}
launch(train_with_faults, context_of(Path(folder), **runtime), SETTINGS | {"seconds": 0.4})
"""


@pytest.fixture
def cluster(monkeypatch) -> Iterator[Any]:
    """A head without workers' cores, and two nodes with one each."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": 100 << 20, "node_ip_address": "127.0.0.1", "include_dashboard": False}
    with loopback_only():
        made = Cluster(initialize_head=True, head_node_args=head)
        made.nodes_of_workers = [add_node(made) for _ in range(2)]
        made.wait_for_nodes()
    yield made
    made.shutdown()


def add_node(cluster: Any) -> Any:
    with loopback_only():
        return cluster.add_node(num_cpus=1, object_store_memory=100 << 20, node_ip_address="127.0.0.1")


def events(folder: Path, kind: str) -> list[dict]:
    return [e for e in read_jsonl(folder / "run" / "events.jsonl") if e["event"] == kind]


class Run:
    """The driver in a process of its own."""

    def __init__(self, folder: Path, address: str, min_workers: int) -> None:
        self.folder = folder
        folder.mkdir()
        self.log = folder / "driver.log"
        code = DRIVER.replace("SETTINGS", repr(SETTINGS))
        with open(self.log, "w") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, str(folder), address, str(min_workers)],
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, "RAY_AUTH_MODE": "token"},
            )

    def wait_for_sizes(self, *sizes: int) -> None:
        """Until groups of these sizes have started, one after the other, and the last has made two steps."""
        self._wait(lambda: [e["world_size"] for e in events(self.folder, "workers_started")] == list(sizes))
        at = self.folder / "scratch" / "at.json"
        before = read_json(at)["step"] if at.exists() else 0
        self._wait(lambda: at.exists() and read_json(at)["step"] >= before + 2)

    def finish(self) -> None:
        assert self.process.wait(300) == 0, self.log.read_text()[-5000:]

    def _wait(self, condition) -> None:
        deadline = time.monotonic() + 200
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()[-5000:]
            assert self.process.poll() is None, self.log.read_text()[-5000:]
            time.sleep(0.1)


def outcome(folder: Path) -> tuple:
    summary = read_json(folder / "summary.json")
    curves = [r for r in read_jsonl(folder / "curves.jsonl") if r["split"] == "train"]
    return [summary[k] for k in ("steps", "best_step", "best_valid_ndcg@10")], [(r["step"], r["loss"]) for r in curves]


def test_a_group_shrinks_and_grows_with_the_cluster_and_no_sample_is_lost_or_repeated(tmp_path, cluster):
    launch(train_with_faults, context_of(tmp_path / "calm"), SETTINGS)
    run = Run(tmp_path / "elastic", cluster.address, min_workers=1)
    try:
        run.wait_for_sizes(2)
        cluster.remove_node(cluster.nodes_of_workers.pop(), allow_graceful=False)
        run.wait_for_sizes(2, 1)
        cluster.nodes_of_workers.append(add_node(cluster))
        run.wait_for_sizes(2, 1, 2)
        run.finish()
    finally:
        run.process.kill()
    (lost,) = events(tmp_path / "elastic", "training_restarted")
    assert (lost["cause"], lost["kind"], lost["left"]) == ("node_lost", "preemption", 9)
    calm, elastic = outcome(tmp_path / "calm"), outcome(tmp_path / "elastic")
    assert elastic[0] == pytest.approx(calm[0], rel=1e-5)
    assert [step for step, _ in elastic[1]] == [step for step, _ in calm[1]]
    assert [loss for _, loss in elastic[1]] == pytest.approx([loss for _, loss in calm[1]], rel=1e-5)
