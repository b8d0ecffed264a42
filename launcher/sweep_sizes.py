"""What the trials of a sweep hold and compute, before anything starts: the arithmetic of `genrec run --dry-run`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from genrec_dist.studies.scaling.counts import planned_parameters
from genrec_dist.studies.scaling.ladder import DEPTH_KEYS
from genrec_dist.studies.scaling.plan import Plan, PlannedTrial
from genrec_dist.studies.sizes import CodebookSize, Counts
from launcher.dryrun import Loop, catalog_counts, integrated_width, section_loop
from launcher.run import is_finished


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

    @property
    def memory(self) -> float | None:
        """Bytes a worker."""
        return sum(self.loop.memory.values()) if self.loop else None

    @property
    def flops(self) -> float:
        """Of the whole training, all its epochs."""
        return (
            self.loop.size.training_flops * self.loop.batches.samples * self.loop.batches.epochs if self.loop else 0.0
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
