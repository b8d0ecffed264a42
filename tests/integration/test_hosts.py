"""One command on two "hosts": two torchrun agents on this machine, whose rank 0 leads the others."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from test_kill_and_resume import TINY, results
from test_preemption import LONG

from genrec_dist.artifacts.files import read_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(folder: Path, config: dict, *options: str) -> list[subprocess.Popen]:
    """Two agents with one process each; the outputs are in host-0.txt and host-1.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    port = str(free_port())
    agents = []
    for host in ("0", "1"):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", host]
        command += ["--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port, *options]
        command += ["-m", "launcher.cli", "run", "tiny.yaml", "--store", "store", "--runs", "runs"]
        with open(folder / f"host-{host}.txt", "w") as sink:
            agents.append(
                subprocess.Popen(
                    command,
                    cwd=folder,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                )
            )
    return agents


def codes(folder: Path, agents: list[subprocess.Popen]) -> list[int]:
    try:
        return [agent.wait(300) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
        for host in ("0", "1"):
            print((folder / f"host-{host}.txt").read_text()[-3000:])


def events(folder: Path, kind: str) -> list[dict]:
    return [e for e in read_jsonl(folder / "runs" / "tiny" / "events.jsonl") if e["event"] == kind]


def wait_for_checkpoint(folder: Path, agents: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 180
    pattern = "store/*/*.building/scratch/checkpoints/step-*/checkpoint.json"
    while time.monotonic() < deadline and not list(folder.glob(pattern)):
        assert all(agent.poll() is None for agent in agents)
        time.sleep(0.02)


def test_two_hosts_do_every_stage_together(tmp_path: Path) -> None:
    together = tmp_path / "together"
    assert codes(together, start(together, TINY)) == [0, 0]
    assert {(e["stage"], e["world_size"]) for e in events(together, "workers_started")} == {
        ("fusion", 2),
        ("generator", 2),
        ("evaluation", 2),
    }
    assert results(together, "tiny")["metrics"]["main"]["test"]["recall@20"] > 0.1
    assert codes(together, start(together, TINY)) == [0, 0]
    assert len(events(together, "workers_started")) == 4, "the second call found everything"


def test_a_follower_that_dies_is_started_again_with_all_others(tmp_path: Path) -> None:
    agents = start(tmp_path, LONG, "--max-restarts", "1")
    wait_for_checkpoint(tmp_path, agents)
    (follower,) = psutil.Process(agents[1].pid).children()
    follower.kill()
    assert codes(tmp_path, agents) == [0, 0]
    assert events(tmp_path, "training_resumed")
    (restarted,) = events(tmp_path, "training_restarted")
    assert restarted["by"] == "torchrun"


def test_sigterm_to_one_host_saves_on_both(tmp_path: Path) -> None:
    config = {**LONG, "runtime": {**LONG["runtime"], "checkpoint_minutes": 0}}
    agents = start(tmp_path, config)
    wait_for_checkpoint(tmp_path, agents)
    agents[1].send_signal(signal.SIGTERM)
    assert all(codes(tmp_path, agents))
    assert events(tmp_path, "preempted")[-1]["exit_code"] == 75
    (stopped,) = events(tmp_path, "training_stopped")
    assert codes(tmp_path, start(tmp_path, config)) == [0, 0]
    assert [e["step"] for e in events(tmp_path, "training_resumed")] == [stopped["step"]]


def test_a_refused_configuration_ends_both_hosts_at_once(tmp_path: Path) -> None:
    config = {**LONG, "runtime": {**LONG["runtime"], "backend": "ray"}}
    began = time.monotonic()
    assert all(codes(tmp_path, start(tmp_path, config)))
    assert time.monotonic() - began < 60
    assert "torchrun and Ray would both start the workers" in (tmp_path / "host-1.txt").read_text()
