"""Does the ordering that a paper prints hold in our numbers? Comparisons of two variants each, and one sentence.

Several seeds are compared by their means. Two numbers are told apart on pooled bounds: the lowest lower bound of all
seeds' 95% bootstrap intervals of the higher one against the highest upper bound of the other's. Numbers without
intervals (losses, shares of codes) are compared by the ranges of their seeds, one seed by its value alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from genrec_dist.studies.blocks import number
from genrec_dist.studies.study_data import Pooled

POOLING = (
    "Means of the seeds are compared. Intervals do not overlap when the lowest lower bound of all seeds' 95% bootstrap "
    "intervals of the higher one lies above the highest upper bound of the other's; numbers without intervals are told "
    "apart by the ranges of their seeds."
)
LISTED = 4


@dataclass(frozen=True)
class Claim:
    """A paper's word on two variants: `above` has more of `metric` than `below`."""

    metric: str
    above: str
    below: str


@dataclass(frozen=True)
class Comparison:
    """A claim with our numbers, None where there is no result."""

    claim: Claim
    above: Pooled | None
    below: Pooled | None

    @property
    def holds(self) -> bool | None:
        return None if self.above is None or self.below is None else self.above.mean > self.below.mean

    @property
    def apart(self) -> bool | None:
        """Whether pooled bounds do not overlap; None without bounds."""
        high, low = (self.above, self.below) if self.holds else (self.below, self.above)
        if high is None or low is None or high.spread is None or low.spread is None:
            return None
        return high.spread[0] > low.spread[1]

    @property
    def kind(self) -> str:
        """What the bounds are."""
        return "95% intervals" if self.above and self.above.intervals else "ranges of the seeds"

    def as_dict(self) -> dict:
        """JSON-ready."""
        pairs = {"above": self.above, "below": self.below}
        numbers = {f"{side}_value": pooled.mean if pooled else None for side, pooled in pairs.items()}
        claim = {"metric": self.claim.metric, "above": self.claim.above, "below": self.claim.below}
        return claim | numbers | {"holds": self.holds, "apart": self.apart}


@dataclass(frozen=True)
class Verdict:
    """The answer: 'yes', 'no', 'in part' or 'unknown', in one sentence, with what it rests on."""

    holds: str
    sentence: str
    comparisons: Sequence[dict] = field(default_factory=list)

    def as_dict(self) -> dict:
        """JSON-ready."""
        return {"holds": self.holds, "sentence": self.sentence, "comparisons": list(self.comparisons)}


def judge(
    said: str,
    claims: Sequence[Claim],
    value: Callable[[str, str], Pooled | None],
    labels: dict[str, str],
    *,
    whose: str = "The paper's ordering",
    metric_label: Callable[[str], str] = str,
    show: Callable[[float], str] = number,
) -> Verdict:
    """Compare what a paper claims with our numbers.

    Args:
        said: the ordering in words.
        claims: the ordering as comparisons.
        value: our number by (variant, metric), None where there is no result.
        labels: what the reader sees of each variant.
        whose: subject of the sentence.
        metric_label: how a metric is written.
        show: how a number is written.
    """
    found = [Comparison(c, value(c.above, c.metric), value(c.below, c.metric)) for c in claims]
    records = [comparison.as_dict() for comparison in found]
    known = [comparison for comparison in found if comparison.holds is not None]
    missing = sorted({labels[v] for c in claims for v in (c.above, c.below) if value(v, c.metric) is None})
    start = f"{whose} ({said})"
    if not known:
        without = f"no result of {', '.join(missing)}" if missing else "nothing to compare"
        return Verdict(
            "unknown", f"Whether {start[0].lower()}{start[1:]} holds cannot be said yet: {without}.", records
        )
    held = [comparison for comparison in known if comparison.holds]
    failed = [comparison for comparison in known if not comparison.holds]
    if not failed:
        values = _values(held[0], labels, show) if len(held) == 1 else ""
        holds, text = "yes", f"{start} holds here{_all(len(known))}{values}{_certainty(held, labels, metric_label)}"
    else:
        holds = "in part" if held else "no"
        text = f"{start} holds only in part: in {len(held)} of {len(known)} comparisons, not in "
        if not held:
            text = f"{start} does not hold here{_none(len(known))}: not in "
        text += _list([_failure(c, labels, metric_label, show) for c in failed], "; ")
    if missing:
        holds, text = "unknown", f"{text}; still without a result: {', '.join(missing)}"
    return Verdict(holds, text + ".", records)


def _all(count: int) -> str:
    return f" in all {count} comparisons" if count > 1 else ""


def _none(count: int) -> str:
    return f" in any of {count} comparisons" if count > 1 else ""


def _values(comparison: Comparison, labels: dict[str, str], show: Callable[[float], str]) -> str:
    claim = comparison.claim
    assert comparison.above is not None
    assert comparison.below is not None
    above, below = show(comparison.above.mean), show(comparison.below.mean)
    return f" ({above} for {labels[claim.above]}, {below} for {labels[claim.below]})"


def _certainty(held: list[Comparison], labels: dict[str, str], metric_label: Callable[[str], str]) -> str:
    told = [comparison for comparison in held if comparison.apart is not None]
    if not told:
        return ""
    overlapping = [comparison for comparison in told if not comparison.apart]
    if not overlapping:
        return f"{', each' if len(told) > 1 else ''} with non-overlapping {told[0].kind}"
    if len(overlapping) == len(told):
        return f", but the {told[0].kind} overlap{' in every one' if len(told) > 1 else ''}"
    names = [_name(comparison, labels, metric_label) for comparison in overlapping]
    return f", but the {told[0].kind} overlap in {_list(names, ', ')}"


def _name(comparison: Comparison, labels: dict[str, str], metric_label: Callable[[str], str]) -> str:
    claim = comparison.claim
    return f"{metric_label(claim.metric)} of {labels[claim.above]} over {labels[claim.below]}"


def _failure(
    comparison: Comparison, labels: dict[str, str], metric_label: Callable[[str], str], show: Callable[[float], str]
) -> str:
    apart = {True: f", {comparison.kind} apart", False: f", {comparison.kind} overlap", None: ""}[comparison.apart]
    return f"{metric_label(comparison.claim.metric)}{_values(comparison, labels, show)[:-1]}{apart})"


def _list(parts: list[str], separator: str) -> str:
    shown = separator.join(parts[:LISTED])
    return shown + (f" and {len(parts) - LISTED} more" if len(parts) > LISTED else "")
