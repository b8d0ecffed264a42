"""A finished run's losses of recall: loads its models and users for `evaluation.diagnosis`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from genrec_dist.artifacts.reader import read_embeddings
from genrec_dist.catalog.dataset import Catalog
from genrec_dist.collaborative.stage import load_fusion
from genrec_dist.config import Config
from genrec_dist.evaluation.dense import by_history
from genrec_dist.evaluation.diagnosis import diagnose
from genrec_dist.evaluation.generative import DenseRanker, GenerativeRanker
from genrec_dist.generator.recommend import load_generator
from genrec_dist.runs import RunFolder
from genrec_dist.training.worker import pick_device


def diagnose_run(
    run: RunFolder, users: int, split: str, device: str = "auto", say: Callable[[int, int], None] = lambda *done: None
) -> dict:
    """Where a run's generator loses its users' next items.

    Args:
        run: a finished run of a method that generates codes.
        users: how many are drawn, with the run's seed; 0: all.
        split: 'test' or 'valid'.
        device: 'auto', 'cpu' or 'cuda'.
        say: told users done and users in all.

    Returns:
        As `evaluation.diagnosis.diagnose`, with `split`; Stage I's own ranking is `stage_one`, of a run that has it.

    Raises:
        ConfigError: the run has no generator.
    """
    config, target = run.config(), pick_device(device)
    model = load_generator(run, config, target)
    evaluation = config.evaluation
    generator = GenerativeRanker(model, evaluation.beam_width, evaluation.mix_weight)
    sequences = Catalog(run.artifact("catalog"), config.catalog.order).sequences
    stage_one = _stage_one(run, config, target) if config.method == "prorec" else None
    known = np.flatnonzero(sequences.lengths >= 3)
    count = min(users or len(known), len(known))
    chosen = np.sort(np.random.default_rng(config.seed).choice(known, count, replace=False))
    cutoffs = sorted({*evaluation.cutoffs, 10})
    dense = {} if stage_one is None else {"stage_one": stage_one}
    found = diagnose(generator, dense, sequences, chosen, split, cutoffs, lambda done: say(done, count))
    return {"split": split} | found


def _stage_one(run: RunFolder, config: Config, device: torch.device) -> DenseRanker | None:
    """Stage I as a recommender of its own; None where text alone is the table."""
    fusion = config.fusion
    if fusion.mode == "semantic":
        return None
    model = load_fusion(fusion, read_embeddings(run.artifact("semantic")), run.artifact("fusion")).to(device)
    return DenseRanker(by_history(model.score_catalog), fusion.max_history, times=fusion.time_bumps > 0)
