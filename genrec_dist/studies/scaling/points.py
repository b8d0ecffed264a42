"""What of a sweep's trials is fitted: one number of every finished run against its size or its training compute.

Runs stay apart: no mean over seeds is taken. Runs that are not finished, or lack one of the two numbers, are no points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from genrec_dist.errors import DataError
from genrec_dist.studies.scaling.trials import CurvePoint, Trial

COMPUTE = "compute"
SIZES = {
    "non_embedding": "parameters without embeddings",
    "total": "parameters",
    "layers": "parameters of the layers",
    COMPUTE: "training FLOPs",
}
"""What a curve can be drawn over: counting conventions of N, and C."""
LOSS, LOWEST_LOSS = "bits_per_item", "lowest_bits_per_item"
LOSSES = (LOSS, LOWEST_LOSS)
"""Of the best checkpoint, which early stopping chose by a metric; of the validation where the loss was least."""
QUANTITIES = {
    LOSS: "loss, bits an item",
    LOWEST_LOSS: "lowest loss, bits an item",
    "ndcg@20": "NDCG@20",
    "recall@20": "Recall@20",
}


@dataclass(frozen=True)
class Points:
    """Runs of one arm as points.

    Shapes:
        x, y: (num_runs,) float64, positive; sorted by depth, then seed.
        depth, seed: (num_runs,) int64.
        epoch: (num_runs,) float64, at whose end the lowest loss was; of other quantities NaN.
    """

    arm: str
    size: str
    quantity: str
    x: np.ndarray
    y: np.ndarray
    depth: np.ndarray
    seed: np.ndarray
    epoch: np.ndarray

    @property
    def sign(self) -> int:
        """1 for a loss, which falls when things go well; -1 for a metric."""
        return 1 if self.quantity in LOSSES else -1

    @property
    def limit(self) -> float:
        """No metric exceeds 1; a loss may be of any size."""
        return np.inf if self.quantity in LOSSES else 1.0

    @property
    def depths(self) -> list[int]:
        """Different depths, rising."""
        return [int(depth) for depth in np.unique(self.depth)]

    @property
    def decades(self) -> float:
        """Span of x in powers of ten."""
        return float(np.log10(self.x.max() / self.x.min())) if len(self.x) else 0.0

    def where(self, chosen: np.ndarray) -> Points:
        """The points of a boolean mask."""
        parts = (part[chosen] for part in (self.x, self.y, self.depth, self.seed, self.epoch))
        return Points(self.arm, self.size, self.quantity, *parts)


def arms_of(trials: Sequence[Trial]) -> list[str]:
    """Arms in the order in which they first appear."""
    return list(dict.fromkeys(trial.arm for trial in trials))


def finished(trials: Sequence[Trial]) -> list[Trial]:
    """Trials with numbers, by arm, depth and seed."""
    order = arms_of(trials)
    return sorted(
        (trial for trial in trials if trial.state == "finished"), key=lambda t: (order.index(t.arm), t.depth, t.seed)
    )


def value_of(trial: Trial, quantity: str) -> float | None:
    """Test metric or validation loss of a trial."""
    if quantity == LOWEST_LOSS:
        lowest = _lowest(trial)
        return lowest.bits_per_item if lowest else None
    return trial.bits_per_item if quantity == LOSS else trial.metrics.get(quantity)


def size_of(trial: Trial, size: str, quantity: str) -> float | None:
    """Parameters by a counting convention, or training FLOPs up to where the quantity was taken."""
    if size != COMPUTE:
        return trial.num_parameters.get(size)
    lowest = _lowest(trial) if quantity == LOWEST_LOSS else None
    return lowest.flops if lowest else trial.train_flops


def _lowest(trial: Trial) -> CurvePoint | None:
    """The validation with the fewest bits an item; None where the curve has none."""
    known = [p for p in trial.curve if p.bits_per_item is not None and np.isfinite(p.bits_per_item)]
    return min(known, key=attrgetter("bits_per_item"), default=None)


def points_of(trials: Sequence[Trial], arm: str, size: str, quantity: str) -> Points:
    """The points of one arm.

    Args:
        trials: of a sweep.
        arm: which of its systems.
        size: key of SIZES.
        quantity: key of QUANTITIES, or any test metric.

    Raises:
        DataError: a number is not positive and finite, or two finished trials have one depth and seed.
    """
    rows: dict[tuple[int, int], tuple[float, float, float]] = {}
    for trial in finished(trials):
        x, y = size_of(trial, size, quantity), value_of(trial, quantity)
        if trial.arm != arm or x is None or y is None:
            continue
        if (trial.depth, trial.seed) in rows:
            raise DataError(
                "two finished trials of one arm, depth and seed",
                where=trial.name,
                got=f"arm {arm}, depth {trial.depth}, seed {trial.seed}",
                expected="one run for each",
                fix="give differing systems different arms",
            )
        for what, number in ((size, x), (quantity, y)):
            if not (np.isfinite(number) and (number > 0 or (number == 0 and what == quantity not in LOSSES))):
                raise DataError(
                    "a trial's number cannot be put on a logarithmic axis",
                    where=f"{trial.name}: {what}",
                    got=number,
                    expected="positive and finite",
                    fix="look at the run; a run that failed must have the state 'failed'",
                )
        lowest = _lowest(trial) if quantity == LOWEST_LOSS else None
        rows[trial.depth, trial.seed] = float(x), float(y), lowest.epoch if lowest else np.nan
    table = np.array([(*value, *key) for key, value in rows.items()], dtype=float).reshape(-1, 5).T
    return Points(arm, size, quantity, table[0], table[1], table[3].astype(int), table[4].astype(int), table[2])
