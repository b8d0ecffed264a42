"""What the trials of a sweep hold and compute, before anything starts: the arithmetic of `genrec run --dry-run`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from genrec_dist.config import Config
from genrec_dist.evaluation.dense import HELD
from genrec_dist.evaluation.generative import users_of_search
from genrec_dist.studies.memory import FLOAT, search_memory
from genrec_dist.studies.scaling.counts import planned_parameters
from genrec_dist.studies.scaling.ladder import DEPTH_KEYS
from genrec_dist.studies.scaling.plan import Plan, PlannedTrial
from genrec_dist.studies.sizes import CodebookSize, Counts
from launcher.dryrun import Loop, catalog_counts, integrated_width, section_loop
from launcher.run import is_finished

SCORES = 4
"""Copies of a batch of scores in a validation: themselves, logits, log-probabilities, those of the batch before."""


@dataclass(frozen=True)
class TrialSize:
    """One trial's model.

    Args:
        trial: which.
        section: of the swept model.
        loop: sizes, batches, memory of a worker; None before the catalog of raw reviews is there.
        counts, codebook: what they follow from.
        width: columns of the embeddings that the model starts from.
        notes: what had to be assumed.
    """

    trial: PlannedTrial
    section: str
    loop: Loop | None
    counts: Counts | None
    codebook: CodebookSize | None
    width: int
    notes: list[str]

    @property
    def parameters(self) -> dict[str, int]:
        """Number of parameters: total, non_embedding, layers."""
        assert self.loop is not None
        return planned_parameters(self.trial.config, self.section, self.loop.size, self.codebook)

    def memory(self, on_gpu: bool) -> float | None:
        """Bytes a worker: of the training, and of the validation too where both stay reserved, on a GPU."""
        if self.loop is None or self.counts is None:
            return None
        if on_gpu:
            return gpu_memory(self.trial.config, self.section, self.loop, self.counts, self.codebook)
        return sum(self.loop.memory.values())

    @property
    def flops(self) -> float:
        """Of the whole training, all its epochs."""
        return (
            self.loop.size.training_flops * self.loop.batches.samples * self.loop.batches.epochs if self.loop else 0.0
        )


def gpu_memory(config: Config, section: str, loop: Loop, counts: Counts, codebook: CodebookSize | None) -> float:
    """Bytes that a worker needs of a GPU, the process's own and the allocator's slack left out.

    Captured graphs of the training keep their activations while a validation has its own memory. Evaluation comes when
    the training's is gone.

    Args:
        config: resolved.
        section: of the trained model.
        loop: its sizes.
        counts, codebook: what they follow from.
    """
    training = sum(loop.memory.values()) + FLOAT * loop.size.padded_values * loop.batches.per_worker
    evaluation = config.evaluation
    if codebook is None:
        return training + SCORES * FLOAT * min(HELD, counts.num_users * counts.num_items)
    model = config.generator if section == "generator" else config.gpt
    searches = (
        (users_of_search(evaluation.validation_beam, "cuda"), evaluation.validation_beam),
        (config.runtime.eval_batch_size, evaluation.beam_width),
    )
    return training + max(
        search_memory(model, codebook, min(users, counts.num_users), width) for users, width in searches
    )


def size_trials(plan: Plan, store: Path) -> list[TrialSize]:
    """Sizes of every trial, in the plan's order."""
    known: dict[str, Counts | None] = {}
    return [_size(trial, store, known) for trial in plan.trials]


def _size(trial: PlannedTrial, store: Path, known: dict[str, Counts | None]) -> TrialSize:
    config, section = trial.config, DEPTH_KEYS[trial.config.method].split(".")[0]
    stages = {stage.name: stage for stage in trial.stages}
    finished = {name: store / name / s.key for name, s in stages.items() if is_finished(s, store)}
    catalog = stages["catalog"].key + config.catalog.order
    if catalog not in known:
        known[catalog] = catalog_counts(config, finished.get("catalog"))
    counts, notes = known[catalog], []
    if counts is None:
        return TrialSize(trial, section, None, None, None, 0, ["sizes are known after the catalog stage"])
    if counts.note != "exact":
        notes.append(f"counts: {counts.note}; what follows from them is an estimate too")
    loop, codebook = section_loop(config, section, counts, finished, notes)
    if section == "generator":
        width = integrated_width(config, finished.get("semantic"), notes)
    else:
        width = config.identifiers.rqvae.latent_dim
    return TrialSize(trial, section, loop, counts, codebook, width, notes)
