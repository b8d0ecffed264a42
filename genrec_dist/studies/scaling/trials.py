"""One trial of a sweep as the fits and the report see it: sizes, costs, losses, metrics, how it ended.

Holds data only. Sweeps fill it from run folders; fits and report read nothing else, so that a study of another
origin can be reported too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from genrec_dist.errors import DataError

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
    depth: int
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


def record_of(trial: Trial) -> dict[str, Any]:
    """A trial as plain data for JSON; numbers that are not finite, which JSON has not, are left out."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            found = {key: plain(inner) for key, inner in value.items()}
            return {key: inner for key, inner in found.items() if inner is not None}
        if isinstance(value, (list, tuple)):
            return [plain(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return plain(asdict(trial))


def trials_of(records: Any, where: Path) -> Sequence[Trial]:
    """Trials from plain data.

    Args:
        records: list of them, as `record_of` makes them.
        where: file that they stand in, for errors.

    Raises:
        DataError: it is no such list; the first fault is named.
    """
    try:
        return TypeAdapter(list[Trial]).validate_python(records)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise DataError(
            "not the trials of a scaling report",
            where=f"{where}: {'.'.join(map(str, ('trials', *fault['loc'])))}",
            got=fault["input"],
            expected=fault["msg"],
            fix="a report.json that an earlier version wrote has no trials: write the report from the runs",
        ) from error
