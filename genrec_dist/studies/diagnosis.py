"""A finished run's losses of recall: loads its models and users for `evaluation.diagnosis`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from genrec_dist.catalog.dataset import Catalog
from genrec_dist.evaluation.diagnosis import diagnose
from genrec_dist.evaluation.generative import GenerativeRanker
from genrec_dist.evaluation.ranking import stage_one_ranker
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
    config, target = run.generative_config(), pick_device(device)
    model = load_generator(run, target)
    evaluation, fusion = config.evaluation, config.fusion
    generator = GenerativeRanker(model, evaluation.beam_width, evaluation.mix_weight)
    sequences = Catalog(run.artifact("catalog"), config.catalog.order).sequences
    dense = {}
    if config.method == "prorec" and fusion.mode != "semantic":  # there text alone is the table, and nothing is trained
        artifacts = run.artifact("semantic"), run.artifact("fusion")
        dense["stage_one"] = stage_one_ranker(fusion, *artifacts, target)
    known = np.flatnonzero(sequences.lengths >= 3)
    count = min(users or len(known), len(known))
    chosen = np.sort(np.random.default_rng(config.seed).choice(known, count, replace=False))
    cutoffs = sorted({*evaluation.cutoffs, 10})
    found = diagnose(generator, dense, sequences, chosen, split, cutoffs, lambda done: say(done, count))
    return {"split": split} | found
