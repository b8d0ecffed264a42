"""Trials read from run folders: real tiny runs of every method that has layers, and runs that have not finished."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from genrec_dist.artifacts.files import append_jsonl, read_json, read_jsonl, write_json
from genrec_dist.artifacts.store import ArtifactStore
from genrec_dist.config import Config, build_config
from genrec_dist.errors import ConfigError
from genrec_dist.methods import build_stages, collect_metrics
from genrec_dist.pipeline import execute
from genrec_dist.runs import RunFolder
from genrec_dist.studies.scaling.read import curve_of, model_stage, read_trial

torch.set_num_threads(1)
OPTIM = {"epochs": 2, "batch_size": 64, "warmup_steps": 3}
LAYERS = {
    "prorec": "generator.num_decoder_layers",
    "csj_id": "gpt.num_layers",
    "semantic_id": "gpt.num_layers",
    "sasrec": "sasrec.num_layers",
    "hstu": "hstu.num_layers",
}


def tiny_config(folder: Path, **values: object) -> Config:
    """A run of seconds over 60 made-up items and random text embeddings."""
    texts = folder / "texts.npy"
    np.save(texts, np.random.default_rng(0).normal(size=(60, 12)).astype(np.float32))
    sections = {name: {"dim": 8, "optim": OPTIM} for name in ("fusion", "generator", "gpt", "sasrec", "hstu")}
    sections["generator"]["num_heads"] = sections["gpt"]["num_heads"] = 2
    return build_config(
        {
            "catalog": {
                "source": "synthetic",
                "synthetic": {"num_items": 60, "num_users": 120},
                "min_user_interactions": 0,
                "min_item_interactions": 0,
            },
            "semantic": {"engine": "precomputed", "model": str(texts)},
            "lightgcn": {"dim": 8, "optim": {"epochs": 1, "evaluate_every": 1}},
            "identifiers": {"num_clusters": 8},
            "evaluation": {"beam_width": 20, "bootstrap_samples": 0, "exact_users": 0},
            "references": [],
            "runtime": {"backend": "local"},
        }
        | sections
        | values
    )


def run(folder: Path, config: Config) -> RunFolder:
    """What `genrec run` does of it in a plain process."""
    found = RunFolder(folder / "runs", config.name)
    found.create(config, ["genrec", "run"])
    execute(build_stages(config), ArtifactStore(folder / "store"), found, config.runtime)
    write_json(found.path / "metrics.json", collect_metrics(config, found))
    found.event("run_finished")
    return found


@pytest.mark.parametrize("method", ["hstu", *(pytest.param(m, marks=pytest.mark.slow) for m in LAYERS if m != "hstu")])
def test_a_finished_run_has_every_number(tmp_path, method):
    config = tiny_config(tmp_path, method=method, name="trial", seed=3)
    found = run(tmp_path, config)
    key = LAYERS[method]
    section, name = key.split(".")
    depth = getattr(getattr(config, section), name)
    trial = read_trial(found.path, method, depth, varied=[key, f"{section}.optim.learning_rate"])
    assert (trial.name, trial.arm, trial.depth, trial.seed) == ("trial", method, depth, 3)
    assert (trial.state, trial.reason) == ("finished", None)
    assert trial.hyperparameters == {key: depth, f"{section}.optim.learning_rate": 0.001}
    sizes = trial.num_parameters
    assert 0 < sizes["layers"] <= sizes["non_embedding"] < sizes["total"]
    assert trial.metrics == read_json(found.path / "metrics.json")["main"]["test"]
    artifact = found.artifact(model_stage(config))
    summary, records = read_json(artifact / "summary.json"), read_jsonl(artifact / "curves.jsonl")
    assert [point.step for point in trial.curve] == [r["step"] for r in records if r["split"] == "valid"]
    best = next(point for point in trial.curve if point.step == summary["best_step"])
    assert trial.train_flops == best.flops == summary["best_flops"] > 0
    assert trial.bits_per_item == best.bits_per_item
    assert 1 < trial.bits_per_item < 25  # 60 items alike: 5.9; cosines at temperature .07 start worse
    assert best.metrics["ndcg@10"] == summary["best_valid_ndcg@10"]
    assert trial.curve[0].flops * 2 == pytest.approx(trial.curve[1].flops)
    assert trial.curve[1].train_loss < trial.curve[0].train_loss
    assert min(trial.tokens_per_second, trial.mfu, trial.peak_memory_bytes) > 0
    assert trial.hardware.endswith("cores")
    artifact.rename(tmp_path / "elsewhere")  # as where the runs are copied and the store is not
    lost = read_trial(found.path, method, depth)
    assert (lost.state, lost.curve, lost.metrics) == ("failed", (), {})
    assert f"{artifact.parent.name}/{artifact.name} is not in the store" in lost.reason


def test_training_loss_of_a_point_is_the_mean_of_the_steps_since_the_last():
    records = [
        {"split": "train", "step": 4, "epoch": 0.4, "loss": 5.0},
        {"split": "train", "step": 10, "epoch": 1, "loss": 3.0},
        {"split": "valid", "step": 10, "epoch": 1, "flops": 7.0, "ndcg@10": 0.1, "bits_per_item": 9.0},
        {"split": "train", "step": 12, "epoch": 1.2, "loss": 2.0},
        {"split": "valid", "step": 12, "epoch": 1.2, "ndcg@10": 0.2},
    ]
    first, second = curve_of(records)
    assert (first.train_loss, first.bits_per_item, first.flops) == (pytest.approx((4 * 5 + 6 * 3) / 10), 9.0, 7.0)
    assert (second.train_loss, second.bits_per_item, second.metrics) == (2.0, None, {"ndcg@10": 0.2})


def unfinished(tmp_path: Path, *events: dict) -> Path:
    found = RunFolder(tmp_path, "trial")
    found.create(Config(name="trial", method="hstu"), ["genrec", "run"])
    for event in events:
        append_jsonl(found.path / "events.jsonl", {"time": 0.0, **event})
    return found.path


def process(pid: int, created: float) -> dict:
    return {"event": "process", "host": platform.node(), "pid": pid, "created": created}


def test_states_of_runs_that_are_not_finished(tmp_path):
    own = psutil.Process(os.getpid()).create_time()
    failed = {"event": "run_failed", "exit_code": 5, "error": "loss is not finite\n  where: step 3"}
    cases = [
        ([], "running", None),
        ([process(os.getpid(), own)], "running", None),
        ([process(os.getpid(), own - 100)], "pending", "its process is gone, the same command continues it"),
        ([process(os.getpid(), own) | {"host": "elsewhere"}], "running", None),
        ([failed], "failed", "loss is not finite"),
        ([failed, {"event": "run_started"}], "running", None),
        ([failed, {"event": "run_restarted"}], "pending", "ended early, its sweep starts it again"),
        ([{"event": "preempted", "exit_code": 75}], "pending", "preempted, the same command continues it"),
        ([{"event": "run_finished"}, {"event": "run_started"}, failed], "failed", "loss is not finite"),
    ]
    for i, (events, state, reason) in enumerate(cases):
        trial = read_trial(unfinished(tmp_path / str(i), *events), "hstu", 2)
        assert (trial.state, trial.reason) == (state, reason)
        assert (trial.num_parameters, trial.metrics, trial.curve, trial.bits_per_item) == ({}, {}, (), None)
    assert read_trial(tmp_path / "none", "hstu", 2).state == "pending"
    with pytest.raises(ConfigError, match="no layers"):
        model_stage(Config(method="popularity"))
    with pytest.raises(ConfigError, match="no such setting"):
        read_trial(unfinished(tmp_path / "last"), "hstu", 2, varied=["hstu.depth"])
