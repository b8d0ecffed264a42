"""Three Ray nodes as separate hosts, with token authentication: runs complete, also when hosts are cut off."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from host_cluster import ROOT, until, wait_for_nodes
from test_kill_and_resume import TINY, results

from genrec_dist.artifacts.files import read_json, read_jsonl
from genrec_dist.testing.faulty_training import context_of, train_with_faults
from genrec_dist.testing.hosts import RAY_PORT, Host
from genrec_dist.training.launch import launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
STAGES = ("catalog", "semantic", "fusion", "identifiers", "generator", "evaluation")
AWAY_SECONDS = 15.0  # longer than Ray takes to find a host gone
UNDER_RAY = {"backend": "ray", "num_workers": 2, "num_embed_workers": 2, "zero_stage": 1, "task_mib": 0.0}
CONFIG = TINY | {
    "semantic": {"rows_per_shard": 16},
    "fusion": TINY["fusion"] | {"optim": TINY["fusion"]["optim"] | {"epochs": 6, "patience": 1000}},
    "generator": TINY["generator"] | {"optim": TINY["generator"]["optim"] | {"epochs": 6, "patience": 1000}},
    "runtime": TINY["runtime"] | UNDER_RAY,
}
QUICKSTART = (
    "catalog.synthetic={num_items: 200, num_users: 500, seed: 1}", "fusion.optim.epochs=2", "generator.optim.epochs=2",
    "sasrec.optim.epochs=2", "evaluation.beam_width=20", "evaluation.exact_users=20", "report.tsne_items=0",
    "runtime.num_workers=2", "runtime.num_embed_workers=2", "runtime.num_threads=1",
)  # fmt: skip
LONG = {"epochs": 30, "patience": 1000}
TRAINING = """
import sys
from pathlib import Path
from genrec_dist.testing.faulty_training import context_of, train_with_faults
from genrec_dist.training.launch import launch

folder, address = sys.argv[1:]
launch(train_with_faults, context_of(Path(folder), backend="ray", ray_address=address), SETTINGS)
"""


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
            until(lambda stage=stage: under_way(folder, stage, read_jsonl(file)), 180, process)
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
        until(lambda: len(list(folder.glob("scratch/checkpoints/step-*"))) > 1, 120, process)
        record = read_json(folder / "scratch" / "attempt" / "worker-0.json")
        (victim,) = (host for host in cluster if host.name == record["host"])
        victim.cut()
        until(lambda: any(e["event"] == "training_restarted" for e in read_jsonl(file)), 90, process)
        at = read_json(folder / "scratch" / "at.json")["step"]
        until(lambda: [e["event"] for e in read_jsonl(file)].count("workers_started") == 2, 60, process)
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


def test_the_quickstart_as_a_submitted_job(tmp_path, cluster):
    """Through Ray Jobs: the driver runs on the head, the work on both other hosts."""
    settings = [word for text in QUICKSTART for word in ("--set", text)]
    config = str(ROOT / "configs" / "quickstart.yaml")
    command = [sys.executable, "-m", "launcher.cli", "run", config, "--store", "store", "--runs", "runs", *settings]
    (tmp_path / "single").mkdir()
    done = subprocess.run(command, cwd=tmp_path / "single", capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    places = ["--store", str(tmp_path / "cluster" / "store"), "--runs", str(tmp_path / "cluster" / "runs")]
    submit = [sys.executable, "-m", "launcher.cli", "submit", config, "--address", "http://127.0.0.1:8265", *places]
    done = cluster[0].run([*submit, *settings], timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    found, wanted = (results(tmp_path / name, "quickstart") for name in ("cluster", "single"))
    for one in (found, wanted):
        for reference in one["metrics"]["references"].values():
            reference.pop("seconds")
    assert found == wanted
