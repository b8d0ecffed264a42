"""Evaluation stage: full-ranking leave-one-out metrics, intervals and the rank of every user.

Writes metrics.json and ranks.parquet. Batches are fixed and shared out whole over Ray tasks (or torchrun
workers), so the result is the same for any number of workers.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.numpy import load_file, save_file

from genrec_dist.artifacts.files import write_json
from genrec_dist.catalog.dataset import Catalog, Sequences
from genrec_dist.cluster import ensure_ray, gpus_per_worker, worker_threads
from genrec_dist.config import Config, EvaluationConfig, RuntimeConfig
from genrec_dist.evaluation.bootstrap import bootstrap_intervals
from genrec_dist.evaluation.metrics import rank_metrics
from genrec_dist.evaluation.ranking import GENERATORS, Arrays, mix_weight_of, rank_users
from genrec_dist.pipeline import Stage, StageContext
from genrec_dist.training.company import world_size
from genrec_dist.training.launch import launch
from genrec_dist.training.samples import holdout_samples
from genrec_dist.training.worker import Worker, plain_worker, setup_torch

SPLITS = ("test", "valid")


def evaluation_stage(config: Config, method: str, inputs: dict[str, Stage], label: str) -> Stage:
    """Stage that evaluates one trained model.

    Args:
        method: 'generator', 'gpt', 'fusion', 'sasrec_inner', 'sasrec_cosine', 'hstu' or 'popularity'.
        inputs: 'catalog', and the model's own artifacts.
        label: title of the stage.
    """
    settings: dict[str, Any] = {
        "method": method,
        "order": config.catalog.order,
        "seed": config.seed,
        "evaluation": config.evaluation.model_dump(mode="json"),
    }
    if method == "generator":
        settings["generator"] = config.generator.model_dump(mode="json")
    elif method == "gpt":
        settings["gpt"] = config.gpt.model_dump(mode="json")
        del settings["evaluation"]["mix_weight"]  # no distillation token
    elif method == "fusion":
        settings["fusion"] = config.fusion.model_dump(mode="json")
    elif method == "hstu":
        settings["hstu"] = config.hstu.model_dump(mode="json")
    elif method.startswith("sasrec"):
        settings["sasrec"] = config.sasrec.model_copy(update={"similarity": method[7:]}).model_dump(mode="json")
    else:
        settings["evaluation"] = {
            k: v for k, v in settings["evaluation"].items() if k in ("cutoffs", "bootstrap_samples")
        }
    return Stage("evaluation", 2, settings, inputs, lambda context: build_evaluation(context, settings), label)


def build_evaluation(context: StageContext, settings: dict) -> None:
    """Rank every user's held-out items and write the metrics."""
    started = time.monotonic()
    evaluation = EvaluationConfig.model_validate(settings["evaluation"])
    sequences = Catalog(context.inputs["catalog"], settings["order"]).sequences
    ranks = _collect(context, settings, sequences)
    test, valid = ranks["test"], ranks["valid"]
    _, users = holdout_samples(sequences, 1, "test", torch.device("cpu"))
    _, _, position = sequences.split_ends()
    pq.write_table(
        pa.table(
            {
                "user_index": users.astype(np.int32),
                "target": sequences.items[position[users]],
                "rank": test["rank"].astype(np.int32),
                "valid_rank": valid["rank"].astype(np.int32),
            }
        ),
        context.out / "ranks.parquet",
    )
    metrics = summarise(test, valid, sequences.tied_users()[users], settings, evaluation)
    write_json(context.out / "metrics.json", metrics | {"seconds": round(time.monotonic() - started, 2)})


def summarise(test: Arrays, valid: Arrays, tied: np.ndarray, settings: dict, evaluation: EvaluationConfig) -> dict:
    """metrics.json from the ranks of all users."""
    cutoffs = evaluation.cutoffs
    generative = settings["method"] in GENERATORS
    metrics = {
        "method": settings["method"],
        "order": settings["order"],
        "users": len(test["rank"]),
        "beam_width": evaluation.beam_width if generative else None,
        "mix_weight": mix_weight_of(settings),
        "test": rank_metrics(test["rank"], cutoffs),
        "valid": rank_metrics(valid["rank"], cutoffs),
        "intervals": bootstrap_intervals(test["rank"], cutoffs, evaluation.bootstrap_samples, settings["seed"])
        if evaluation.bootstrap_samples
        else {},
        "without_ties": {"users": int((~tied).sum()), **rank_metrics(test["rank"][~tied], cutoffs)}
        if (~tied).any()
        else {"users": 0},
        "masked_seen": rank_metrics(test["rank_masked"], cutoffs),
    }
    if "rank_without_mix" in test:
        metrics["without_mix"] = rank_metrics(test["rank_without_mix"], cutoffs)
    if "rank_exact" in test:
        checked = test["rank_exact"] > 0
        metrics["exact"] = {
            "users": int(checked.sum()),
            "beam": rank_metrics(test["rank_checked"][checked], cutoffs),
            "exact": rank_metrics(test["rank_exact"][checked], cutoffs),
            "top10_agreement": float(test["same_top10"][checked].mean() / 10),
        }
    return metrics


def _collect(context: StageContext, settings: dict, sequences: Sequences) -> dict[str, Arrays]:
    """Ranks of all users by split, gathered from all workers."""
    runtime = context.runtime
    if runtime.backend == "ray":
        ray = ensure_ray(runtime)
        gpus = gpus_per_worker(runtime, ray)
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=runtime.max_preemptions)(_share)
        parts = ray.get(
            [
                task.remote(rank, runtime.num_workers, context.inputs, settings, runtime)
                for rank in range(runtime.num_workers)
            ]
        )
        return {
            split: {name: sum(part[split][name] for part in parts) for name in parts[0][split]} for split in parts[0]
        }
    if world_size() > 1:
        launch(rank_together, context, settings)
        return {split: load_file(ranks_file(context, split)) for split in SPLITS}
    worker = plain_worker(runtime)
    setup_torch(worker, worker_threads(runtime))
    return rank_users(worker, context.inputs, settings, runtime, SPLITS, context, sequences)


def ranks_file(context: StageContext, split: str) -> Path:
    """Where the ranks of all users are, under torchrun, until they are written into the artifact."""
    return context.scratch / f"ranks-{split}.safetensors"


def rank_together(worker: Worker, context: StageContext, settings: dict) -> None:
    """Worker function: rank all users, each worker its batches."""
    told = context if worker.is_main else None
    ranks = rank_users(worker, context.inputs, settings, context.runtime, SPLITS, told)
    for split, arrays in ranks.items():
        together = {n: worker.sum(torch.from_numpy(a).to(worker.device)).cpu().numpy() for n, a in arrays.items()}
        if worker.is_main:
            save_file(together, ranks_file(context, split))


def _share(
    rank: int, world_size: int, inputs: dict[str, Path], settings: dict, runtime: RuntimeConfig
) -> dict[str, Arrays]:
    from genrec_dist.training.worker import pick_device

    worker = Worker(rank, world_size, pick_device(runtime.device))
    setup_torch(worker, worker_threads(runtime))
    return rank_users(worker, inputs, settings, runtime)
