"""Ranks of all users under one trained model: a worker's share of fixed batches, for several splits at once.

Batches are cut once and shared out whole, so the result is the same for any number of workers. Nothing is fetched from
the device before a split is done. Reads artifacts, writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from genrec_dist.catalog.dataset import Catalog, Sequences
from genrec_dist.config import (
    EvaluationConfig,
    FusionConfig,
    GeneratorConfig,
    GptConfig,
    HstuConfig,
    RuntimeConfig,
    SasrecConfig,
)
from genrec_dist.evaluation.dense import batched, by_history
from genrec_dist.evaluation.generative import DenseRanker, GenerativeRanker
from genrec_dist.evaluation.replay import BatchRunner, DeviceProgress
from genrec_dist.pipeline import StageContext
from genrec_dist.training.samples import HistorySamples, holdout_samples
from genrec_dist.training.worker import Worker

Arrays = dict[str, np.ndarray]
Ranker = GenerativeRanker | DenseRanker
GENERATORS = ("generator", "gpt")
EXACT_NAMES = ["rank_exact", "rank_checked", "same_top10"]
EXACT_BATCH = 16
"""Users that are scored over the whole catalog at a time."""


@torch.no_grad()
def rank_users(
    worker: Worker,
    inputs: dict[str, Path],
    settings: dict,
    runtime: RuntimeConfig,
    splits: Sequence[str] = ("test", "valid"),
    context: StageContext | None = None,
    sequences: Sequences | None = None,
) -> dict[str, Arrays]:
    """Ranks of this worker's batches, by split; zero elsewhere, so that shares add up.

    Args:
        worker: whose share.
        inputs: folder of each artifact.
        settings: of the evaluation stage.
        runtime: `eval_batch_size` users at a time; fewer where a GPU has not the memory.
        splits: of 'test' and 'valid'. The model is loaded once for all.
        context: told of progress.
        sequences: of the catalog; None reads them.
    """
    evaluation = EvaluationConfig.model_validate(settings["evaluation"])
    if sequences is None:
        sequences = Catalog(inputs["catalog"], settings["order"]).sequences
    ranker = _ranker(settings, inputs, sequences, evaluation, worker)
    generative = isinstance(ranker, GenerativeRanker)
    runner = BatchRunner(ranker, worker.device, fixed=None if generative else False)
    out = {}
    for split in splits:
        samples, _ = holdout_samples(sequences, ranker.max_history, split, worker.device, times=ranker.times)
        names, checked = ["rank", "rank_masked"], 0
        if mix_weight_of(settings):
            names.append("rank_without_mix")
        if generative and split == "test" and evaluation.exact_users:
            names += EXACT_NAMES
            checked = min(evaluation.exact_users, len(samples))
        ranks = {name: torch.zeros(len(samples), dtype=torch.int64, device=worker.device) for name in names}
        say = partial(context.progress, total=len(samples), unit=f"{split} users") if context else lambda done: None
        _rank_split(worker, samples, ranker, runner, ranks, checked, runtime.eval_batch_size, say)
        out[split] = {name: array.cpu().numpy() for name, array in ranks.items()}
    if context is not None and runner.problem:
        context.event("evaluation_without_cuda_graph", detail=runner.problem)
    return out


def _rank_split(
    worker: Worker,
    samples: HistorySamples,
    ranker: Ranker,
    runner: BatchRunner,
    ranks: dict[str, torch.Tensor],
    checked: int,
    batch_size: int,
    say: Callable[[int], None],
) -> None:
    """Fill in the ranks of a worker's share.

    The first `checked` users come in small batches that are scored over the whole catalog as well: each is searched
    once, for the check as for the ranks.
    """
    progress = DeviceProgress(say, worker.device)
    shares = [(share, True) for share in batched(checked, EXACT_BATCH, worker)]
    shares += [(share, False) for share in batched(len(samples), batch_size, worker, checked)]
    for (start, end), exact in shares:
        batch = samples.gather(torch.arange(start, end, device=worker.device), ranker.max_history)
        for name, values in (ranker(batch, True) if exact else runner(batch)).items():
            ranks[name][start:end] = values
        progress.queued(end)
    progress.finish()


def mix_weight_of(settings: dict) -> float:
    """Weight that the distillation token's score really has; 0 for a model without the token."""
    has_token = settings["method"] == "generator" and settings["generator"]["distill_weight"]
    return settings["evaluation"]["mix_weight"] if has_token else 0.0


def stage_one_ranker(config: FusionConfig, semantic: Path, fusion: Path, device: torch.device) -> DenseRanker:
    """PRORec's Stage I as a recommender of its own, from its artifact and the text's."""
    from genrec_dist.artifacts.reader import read_embeddings
    from genrec_dist.collaborative.stage import load_fusion

    model = load_fusion(config, read_embeddings(semantic), fusion).to(device)
    return DenseRanker(by_history(model.score_catalog), config.max_history, times=config.time_bumps > 0)


def _ranker(
    settings: dict, inputs: dict[str, Path], sequences: Sequences, evaluation: EvaluationConfig, worker: Worker
) -> Ranker:
    """The stage's trained model behind one call."""
    method = settings["method"]
    if method == "generator":
        from genrec_dist.generator.stage import load_model

        config = GeneratorConfig.model_validate(settings["generator"])
        model = load_model(config, inputs["fusion"], inputs["identifiers"], inputs["generator"]).to(worker.device)
        return GenerativeRanker(model, evaluation.beam_width, evaluation.mix_weight)
    if method == "gpt":
        from genrec_dist.generator.gpt_stage import load_gpt

        gpt = load_gpt(GptConfig.model_validate(settings["gpt"]), inputs["identifiers"], inputs["generator"])
        return GenerativeRanker(gpt.to(worker.device), evaluation.beam_width, mix_weight=0.0)
    if method == "fusion":
        stage_one = FusionConfig.model_validate(settings["fusion"])
        return stage_one_ranker(stage_one, inputs["semantic"], inputs["fusion"], worker.device)
    if method == "popularity":
        from genrec_dist.baselines.popularity import popularity_scores

        scores = popularity_scores(sequences).to(worker.device)
        return DenseRanker(lambda batch: scores.expand(len(batch["history"]), -1), 1_000)
    if method == "hstu":
        from genrec_dist.baselines.hstu_stage import load_hstu

        hstu = load_hstu(HstuConfig.model_validate(settings["hstu"]), sequences.num_items, inputs["hstu"])
        hstu = hstu.to(worker.device)
        return DenseRanker(
            lambda batch: hstu.score_catalog(batch["history"], batch["mask"], batch["times"]),
            hstu.config.max_history,
            times=True,
        )
    from safetensors.torch import load_file

    from genrec_dist.baselines.sasrec import SasrecModel

    section = SasrecConfig.model_validate(settings["sasrec"])
    sasrec = SasrecModel(section, sequences.num_items)
    sasrec.load_state_dict(load_file(inputs["sasrec"] / "model.safetensors"))
    sasrec = sasrec.to(worker.device).eval()
    return DenseRanker(by_history(sasrec.score_catalog), section.max_history)
