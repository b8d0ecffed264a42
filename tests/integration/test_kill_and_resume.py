"""kill -9 in every stage, the same command again: the run continues and ends with the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from genrec_dist.artifacts.files import read_jsonl, sha256_file

TINY = {
    "name": "tiny",
    "catalog": {"source": "synthetic", "synthetic": {"num_items": 200, "num_users": 500, "seed": 1}},
    "semantic": {"rows_per_shard": 64},
    "fusion": {"dim": 16, "integrated": "sum", "optim": {"epochs": 3, "batch_size": 128, "warmup_steps": 5}},
    "identifiers": {"num_clusters": 12},
    "generator": {"dim": 16, "num_decoder_layers": 1, "optim": {"epochs": 3, "batch_size": 128, "warmup_steps": 5}},
    "evaluation": {"beam_width": 20, "mix_weight": 0.2, "exact_users": 40, "bootstrap_samples": 50},
    "references": [],
    "report": {"tsne_items": 0},
    "runtime": {
        "backend": "local",
        "device": "cpu",
        "num_threads": 1,
        "checkpoint_minutes": 0.002,
        "eval_batch_size": 32,
    },
}

CSJ = TINY | {
    "method": "csj_id",
    "name": "csj",
    "graph": {"partitioner": "random"},
    "lightgcn": {"dim": 8, "num_layers": 2, "optim": {"epochs": 4, "batch_size": 256, "evaluate_every": 1}},
    "identifiers": {
        "tokenizer": "rqvae",
        "num_clusters": 12,
        "num_levels": 3,
        "rqvae": {
            "hidden": [32],
            "latent_dim": 8,
            "optim": {"epochs": 60, "batch_size": 64, "evaluate_every": 10, "warmup_steps": 5},
        },
    },
    "gpt": {"dim": 32, "num_heads": 4, "num_layers": 2, "optim": {"epochs": 8, "batch_size": 64, "warmup_steps": 5}},
    "evaluation": {"beam_width": 20, "exact_users": 20, "bootstrap_samples": 50},
}


def start(folder: Path, config: dict) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", "run", "tiny.yaml", "--store", "store", "--runs", "runs"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def kill_in_stage(folder: Path, config: dict, stage: str, needs_checkpoint: bool) -> None:
    """Start the run and kill -9 it once `stage` has started (and has a checkpoint)."""
    events = folder / "runs" / config["name"] / "events.jsonl"
    before = len(read_jsonl(events))
    process = start(folder, config)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        new = read_jsonl(events)[before:]
        started = any(e["event"] == "stage_started" and e["stage"] == stage for e in new)
        pattern = f"store/{stage}/*.building/scratch/checkpoints/step-*/checkpoint.json"
        if started and (not needs_checkpoint or list(folder.glob(pattern))):
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, f"the run ended before it could be killed in {stage}"


def results(folder: Path, name: str) -> dict:
    metrics = json.loads((folder / "runs" / name / "metrics.json").read_text())
    metrics["main"].pop("seconds")
    links = json.loads((folder / "runs" / name / "artifacts.json").read_text())
    models = {
        title: sha256_file(folder / "runs" / name / link["path"] / "model.safetensors")
        for title, link in links.items()
        if (folder / "runs" / name / link["path"] / "model.safetensors").is_file()
    }
    return {"metrics": metrics, "models": models}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(folder, TINY))
    return folder


def test_kill_in_every_stage_gives_the_same_bytes(tmp_path: Path, whole: Path) -> None:
    stages = ["catalog", "semantic", "fusion", "identifiers", "generator", "evaluation"]
    for stage in stages:
        kill_in_stage(tmp_path, TINY, stage, needs_checkpoint=stage in ("fusion", "generator"))
    finish(start(tmp_path, TINY))
    assert results(tmp_path, "tiny") == results(whole, "tiny")
    events = read_jsonl(tmp_path / "runs" / "tiny" / "events.jsonl")
    resumed = [e["stage"] for e in events if e["event"] == "training_resumed"]
    assert "fusion" in resumed
    assert "generator" in resumed


def test_truncated_artifact_is_named_and_rebuilt(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    model = next(folder.glob("store/generator/*/model.safetensors"))
    model.write_bytes(model.read_bytes()[:-100])
    for victim in folder.glob("store/evaluation/*"):  # so that the generator is needed again
        if victim.is_dir():
            (victim / "MANIFEST.json").unlink()
    process = start(folder, TINY)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "corrupt" in output
    assert list(folder.glob("store/quarantine/generator-*"))
    assert results(folder, "tiny") == results(whole, "tiny")


def evaluate_again(folder: Path, backend: str, num_workers: int) -> dict:
    """Metrics of the main model when only the evaluation is done again, with other workers."""
    for artifact in folder.glob("store/evaluation/*/MANIFEST.json"):
        artifact.unlink()
    runtime = {**TINY["runtime"], "backend": backend, "num_workers": num_workers}
    finish(start(folder, {**TINY, "runtime": runtime}))
    return results(folder, "tiny")["metrics"]


@pytest.mark.slow
def test_torchrun_trains_on_two_processes(tmp_path: Path) -> None:
    """num_workers=2 without Ray goes through torchrun's launcher."""
    finish(start(tmp_path, {**TINY, "runtime": {**TINY["runtime"], "num_workers": 2}}))
    first = results(tmp_path, "tiny")["metrics"]
    assert first["main"]["users"] > 400
    assert evaluate_again(tmp_path, "local", 1) == first


@pytest.mark.slow
def test_ray_and_deepspeed_train_on_two_workers(tmp_path: Path) -> None:
    """The whole run under Ray with DeepSpeed ZeRO; metrics do not depend on who evaluates."""
    runtime = {**TINY["runtime"], "backend": "ray", "num_workers": 2, "num_embed_workers": 2, "zero_stage": 1}
    finish(start(tmp_path, {**TINY, "runtime": runtime}))
    first = results(tmp_path, "tiny")["metrics"]
    assert first["main"]["test"]["recall@20"] > 0
    assert evaluate_again(tmp_path, "local", 1) == first


@pytest.mark.slow
def test_csj_id_killed_in_its_stages_gives_the_same_bytes(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    finish(start(whole, CSJ))
    found = results(whole, "csj")
    assert set(found["models"]) == {"identifiers", "gpt"}
    killed = tmp_path / "killed"
    for stage in ("identifiers", "gpt"):
        kill_in_stage(killed, CSJ, stage, needs_checkpoint=True)
    finish(start(killed, CSJ))
    assert results(killed, "csj") == found
    events = read_jsonl(killed / "runs" / "csj" / "events.jsonl")
    assert {"identifiers", "gpt"} <= {e["stage"] for e in events if e["event"] == "training_resumed"}


@pytest.mark.slow
def test_csj_id_under_ray_and_deepspeed(tmp_path: Path) -> None:
    """Two Ray Train workers in every training: better than chance, recommends, and a second call builds nothing."""
    runtime = {**TINY["runtime"], "backend": "ray", "num_workers": 2}
    config = {**CSJ, "runtime": runtime}
    finish(start(tmp_path, config))
    run = tmp_path / "runs" / "csj"
    metrics, artifacts = (json.loads((run / name).read_text()) for name in ("metrics.json", "artifacts.json"))
    assert metrics["main"]["exact"]["top10_agreement"] > 0.9
    items = pq.read_table(run / artifacts["catalog"]["path"] / "items.parquet", columns=["item_id"])[
        "item_id"
    ].to_pylist()
    assert metrics["main"]["test"]["recall@20"] > 1.5 * 20 / len(items)
    before = len(read_jsonl(run / "events.jsonl"))
    finish(start(tmp_path, config))
    again = [e["event"] for e in read_jsonl(run / "events.jsonl")[before:]]
    assert "stage_reused" in again
    assert "stage_built" not in again
    answer = subprocess.run(
        [sys.executable, "-m", "launcher.cli", "recommend", "csj", "--history", ",".join(items[:3]), "--top-k", "5"]
        + ["--runs", "runs", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    assert len({row["item_id"] for row in json.loads(answer.stdout)}) == 5
