"""Three Ray nodes as separate hosts, with token authentication: runs complete, also when hosts are cut off."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from test_kill_and_resume import TINY, results

from genrec_dist.artifacts.files import read_json, read_jsonl
from genrec_dist.testing.faulty_training import context_of, train_with_faults
from genrec_dist.testing.hosts import FAST_HEALTH, RAY_PORT, Host, hosts_refused, separate_hosts
from genrec_dist.training.launch import launch

REFUSED = hosts_refused()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(REFUSED is not None, reason=f"separate hosts: {REFUSED}"),
]
ROOT = Path(__file__).resolve().parents[2]
STAGES = ("catalog", "semantic", "fusion", "identifiers", "generator", "evaluation")
AWAY_SECONDS = 15.0  # longer than Ray takes to find a host gone
UNDER_RAY = {"backend": "ray", "num_workers": 2, "num_embed_workers": 2, "zero_stage": 1, "task_mib": 0.0}
CONFIG = TINY | {
    "semantic": {"rows_per_shard": 16},
    "fusion": TINY["fusion"] | {"optim": TINY["fusion"]["optim"] | {"epochs": 6, "patience": 1000}},
    "generator": TINY["generator"] | {"optim": TINY["generator"]["optim"] | {"epochs": 6, "patience": 1000}},
    "runtime": TINY["runtime"] | UNDER_RAY,
}
LONG = {"epochs": 30, "patience": 1000}
TRAINING = """
import sys
from pathlib import Path
from genrec_dist.testing.faulty_training import context_of, train_with_faults
from genrec_dist.training.launch import launch

folder, address = sys.argv[1:]
launch(train_with_faults, context_of(Path(folder), backend="ray", ray_address=address), SETTINGS)
"""
NODES = """
import sys, time, ray
ray.init(address=sys.argv[1], logging_level="ERROR")
deadline = time.monotonic() + 60
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]):
    assert time.monotonic() < deadline, ray.nodes()
    time.sleep(0.2)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[list[Host]]:
    """A head without workers' cores, and two hosts with one each."""
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **FAST_HEALTH,
    }
    with separate_hosts(3, tmp_path_factory.mktemp("hosts"), environment) as hosts:
        memory = f"--object-store-memory={150 << 20}"
        hosts[0].start_ray(
            "--head",
            f"--port={RAY_PORT}",
            "--num-cpus=0",
            memory,
            "--dashboard-host=127.0.0.1",
            "--include-dashboard=1",
        )
        _until(lambda: "Ray runtime started" in (hosts[0].folder / "ray.log").read_text(), 60)
        for host in hosts[1:]:
            host.start_ray(f"--address={hosts[0].address}:{RAY_PORT}", "--num-cpus=1", memory)
        wait_for_nodes(hosts, 3)
        yield hosts


def _until(condition: Callable[[], bool], seconds: float, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        assert process is None or process.poll() is None, "the run ended before"
        time.sleep(0.05)


def wait_for_nodes(hosts: list[Host], count: int) -> None:
    done = hosts[0].run([sys.executable, "-c", NODES, f"{hosts[0].address}:{RAY_PORT}", str(count)])
    assert done.returncode == 0, done.stderr


def start_run(host: Host, folder: Path, config: dict, log: Path) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "launcher.cli", "run", "config.yaml", "--store", "store", "--runs", "runs"]
    with open(log, "w") as sink:
        return host.popen(command, cwd=folder, stdout=sink, stderr=subprocess.STDOUT)


def by_address(config: dict) -> dict:
    return config | {"runtime": config["runtime"] | {"ray_address": f"10.77.0.1:{RAY_PORT}"}}


def run_here(folder: Path, config: dict) -> None:
    """The same on one host, with a private Ray."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "launcher.cli", "run", "config.yaml", "--store", "store", "--runs", "runs"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr


def under_way(folder: Path, stage: str, events: list[dict]) -> bool:
    """Whether the stage has something to lose."""
    if not any(e["event"] == "stage_started" and e["stage"] == stage for e in events):
        return False
    if stage in ("fusion", "generator"):
        return bool(list(folder.glob(f"store/{stage}/*.building/scratch/checkpoints/step-*/checkpoint.json")))
    if stage == "semantic":
        return bool(list(folder.glob("store/semantic/*.building/shards/*.json")))
    if stage == "identifiers":
        return any(e["event"] == "kmeans_iteration" for e in events)
    return True


def test_hosts_cut_off_in_every_stage_and_brought_back(tmp_path, cluster):
    run_here(tmp_path / "single", CONFIG)
    folder, log = tmp_path / "cluster", tmp_path / "driver.txt"
    process = start_run(cluster[0], folder, by_address(CONFIG), log)
    file = folder / "runs" / "tiny" / "events.jsonl"
    cuts: dict[str, tuple[float, float]] = {}
    try:
        for number, stage in enumerate(STAGES):
            victim = cluster[1 + number % 2]
            _until(lambda stage=stage: under_way(folder, stage, read_jsonl(file)), 180, process)
            victim.cut()
            since = time.time()
            time.sleep(AWAY_SECONDS)
            victim.mend()
            cuts[stage] = since, time.time()
            assert victim.revive_ray(), "Ray did not find the host gone"
            wait_for_nodes(cluster, 3)
        assert process.wait(300) == 0
    except BaseException:
        print(log.read_text()[-6000:], json.dumps(read_jsonl(file), indent=1)[-6000:])
        raise
    finally:
        process.kill()
    events = read_jsonl(file)
    built = {e["stage"]: e["time"] for e in events if e["event"] == "stage_built"}
    for stage, (since, _) in cuts.items():
        assert built[stage] > since, f"{stage} was not under way"
    lost = {e["stage"] for e in events if e["event"] == "training_restarted" and e["cause"] == "node_lost"}
    assert lost == {"fusion", "generator"}
    assert results(folder, "tiny") == results(tmp_path / "single", "tiny")


def test_a_worker_that_trains_on_alone_ends_before_another_takes_its_place(tmp_path, cluster):
    """The file system stays in reach of the host that is cut off: its worker could write beside the new one."""
    launch(train_with_faults, context_of(tmp_path / "calm"), LONG)
    folder, log = tmp_path / "cut", tmp_path / "driver.txt"
    code = TRAINING.replace("SETTINGS", repr(LONG | {"seconds": 0.3}))
    command = [sys.executable, "-c", code, str(folder), f"{cluster[0].address}:{RAY_PORT}"]
    with open(log, "w") as sink:
        process = cluster[0].popen(command, stdout=sink, stderr=subprocess.STDOUT)
    file = folder / "run" / "events.jsonl"
    try:
        _until(lambda: len(list(folder.glob("scratch/checkpoints/step-*"))) > 1, 120, process)
        record = read_json(folder / "scratch" / "attempt" / "worker-0.json")
        (victim,) = (host for host in cluster if host.name == record["host"])
        victim.cut()
        _until(lambda: any(e["event"] == "training_restarted" for e in read_jsonl(file)), 90, process)
        at = read_json(folder / "scratch" / "at.json")["step"]
        _until(lambda: [e["event"] for e in read_jsonl(file)].count("workers_started") == 2, 60, process)
        assert at > 20, "the worker did not go on alone"
        assert not psutil.pid_exists(record["pid"])
        victim.mend()
        assert victim.revive_ray()
        assert process.wait(300) == 0
    except BaseException:
        print(log.read_text()[-6000:], json.dumps(read_jsonl(file), indent=1)[-6000:])
        raise
    finally:
        process.kill()
        victim.mend()
    wait_for_nodes(cluster, 3)
    calm, cut = (read_jsonl(tmp_path / name / "curves.jsonl") for name in ("calm", "cut"))
    assert [(r["split"], r["step"]) for r in cut] == [(r["split"], r["step"]) for r in calm]
    assert [r.get("loss") for r in cut] == [r.get("loss") for r in calm]
