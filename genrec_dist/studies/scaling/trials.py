"""One trial of a sweep as the fits and the report see it: sizes, costs, losses, metrics, how it ended.

Holds data only. Sweeps fill it from run folders; fits and report read nothing else, so that a study of another
origin can be reported too.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from genrec_dist.errors import DataError

MOST_LAYERS = 1_000_000
TrialState = Literal["finished", "running", "failed", "pending"]


@dataclass(frozen=True)
class CurvePoint:
    """One validation of a training.

    Args:
        epoch: epochs done.
        step: optimiser steps done.
        flops: training floating-point operations spent so far, of the generator alone.
        train_loss: mean training loss since the last point, in the task's own units; None where it is not recorded.
        bits_per_item: validation loss, bits an item; None where the model gives no distribution over items.
        metrics: validation metrics by name, e.g. 'ndcg@10'.
    """

    epoch: float
    step: int
    flops: float
    train_loss: float | None = None
    bits_per_item: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Args:
        name: of the run folder.
        arm: which system, e.g. 'prorec', 'hstu'; seeds and depths of one arm make one curve.
        depth: layers, the swept number.
        seed: of the run.
        state: a trial that is not finished has no numbers below, and is listed, never filled in.
        reason: why it failed, one line; None otherwise.
        num_parameters: by counting convention: 'total', 'non_embedding' (without item, code and position tables and
            output heads over them), 'layers' (Transformer layers alone).
        train_flops: floating-point operations of the training up to the best checkpoint.
        bits_per_item: validation loss of the best checkpoint, bits an item: the negative base-2 logarithm of the
            probability that the model gives the next item among all items, so that tokenizers compare.
        metrics: test metrics by name, e.g. 'recall@20', 'ndcg@20'.
        curve: validations in order.
        tokens_per_second, peak_memory_bytes, mfu: of the training; None where they were not measured.
        hyperparameters: settings that vary between trials, by dotted key.
        hardware: one line.
        commit: of the code.
    """

    name: str
    arm: str
    depth: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    seed: int
    state: TrialState
    reason: str | None = None
    num_parameters: dict[str, int] = field(default_factory=dict)
    train_flops: float | None = None
    bits_per_item: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    curve: tuple[CurvePoint, ...] = ()
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    mfu: float | None = None
    hyperparameters: dict[str, str | int | float | bool] = field(default_factory=dict)
    hardware: str = ""
    commit: str = ""


@dataclass(frozen=True)
class StudyRecord:
    """What a report is written from, as its report.json holds it."""

    title: str
    facts: dict[str, str]
    trials: list[Trial]


def record_of(trial: Trial) -> dict[str, Any]:
    """A trial as plain data for JSON; numbers that are not finite, which JSON has not, are left out."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            found = {key: plain(inner) for key, inner in value.items()}
            return {key: inner for key, inner in found.items() if inner is not None}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    curve = [plain(asdict(point)) for point in trial.curve if math.isfinite(point.epoch) and math.isfinite(point.flops)]
    return plain(asdict(trial)) | {"curve": curve}


def study_record(record: Any, where: Path) -> StudyRecord:
    """What a report is written from, out of plain data.

    Args:
        record: whole report.json.
        where: file that it stands in, for errors.

    Raises:
        DataError: it is no such record; the first fault is named.
    """
    try:
        return TypeAdapter(StudyRecord).validate_python(record)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise DataError(
            "not the record of a scaling report",
            where=f"{where}: {'.'.join(map(str, fault['loc'])) or 'whole file'}",
            got=str(fault["input"])[:200],
            expected=fault["msg"],
            fix="write the report from the runs; a report.json of an earlier version has no trials",
        ) from error
