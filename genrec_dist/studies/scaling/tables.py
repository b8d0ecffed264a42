"""Tables of the scaling report: verdicts, fits, families, claims, runs, runs without numbers, choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from genrec_dist.studies.blocks import NONE, Cell, Table, number, percent
from genrec_dist.studies.scaling.fits import HELD_OUT_ABOVE, Interval
from genrec_dist.studies.scaling.plot import scientific, si
from genrec_dist.studies.scaling.points import COMPUTE, LOSSES, QUANTITIES, SIZES, value_of
from genrec_dist.studies.scaling.study import MAIN_SIZE, Case, ScalingStudy
from genrec_dist.studies.scaling.trials import Trial

FAMILY_NAMES = {
    "constant": "constant",
    "log_linear": "log-linear",
    "power": "power law",
    "saturating": "saturating",
    "peaked": "peaked",
}
NOT_STATED = "not stated"


def verdicts(study: ScalingStudy) -> Table:
    """The word on every arm and quantity, over N and C."""
    rows: list[list[Cell | str]] = []
    for case in _in_order(study, (MAIN_SIZE, COMPUTE)):
        points, verdict = case.points, case.verdict
        rows.append(
            [
                points.arm,
                QUANTITIES[points.quantity],
                _over(points.size),
                "supported" if verdict.supported else "not supported",
                "; ".join(verdict.against) or verdict.sentence,
                "; ".join(verdict.trust),
            ]
        )
    head = ["arm", "of", "over", "power law", "why", "how far to trust it"]
    return Table(head, rows, f"N: {SIZES[MAIN_SIZE]}. C: {SIZES[COMPUTE]} to the best checkpoint.", set(range(6)))


def fits(study: ScalingStudy, sizes: Sequence[str]) -> Table:
    """Parameters of the power laws over `sizes`."""
    rows: list[list[Cell | str]] = []
    for case in _in_order(study, sizes):
        if case.fit is None:
            continue
        points, power = case.points, case.fit.power
        rows.append(
            [
                points.arm,
                QUANTITIES[points.quantity],
                _over(points.size),
                Cell(f"{power.alpha:.3f}", _span(power.alpha_interval, ".2f")),
                Cell(f"{power.e:.4g}", _span(power.e_interval, ".4g")),
                Cell(f"{power.a:.3g}", _span(power.a_interval, ".3g")),
                percent(power.noise, 2),
                percent(case.fit.families["power"].left_out_error, 2),
                FAMILY_NAMES[case.fit.best.curve.name] if case.fit.best else "too few runs",
                str(len(points.x)),
            ]
        )
    caption = (
        "E + A N^−α for the loss, M∞ − A N^−α for metrics. Below a number: its 95% bootstrap interval. Noise: standard "
        "deviation of one run about the curve of its seed. Left out: root mean square relative error at depths left "
        "out in turn."
    )
    head = ["arm", "of", "over", "α", "E or M∞", "A", "noise", "left out", "lowest AICc", "runs"]
    return Table(head, rows, caption, {0, 1, 2, 8})


def families(study: ScalingStudy) -> Table:
    """AICc of each family above the lowest, and its error at left-out depths."""
    rows: list[list[Cell | str]] = []
    for case in _in_order(study, (MAIN_SIZE, COMPUTE)):
        if case.fit is None:
            continue
        best = case.fit.best
        cells = []
        for name in FAMILY_NAMES:
            family = case.fit.families[name]  # type: ignore[index]
            gap = "too few runs" if best is None else f"{family.aicc - best.aicc:.1f}"
            cells.append(Cell(gap, percent(family.left_out_error, 2)))
        rows.append([case.points.arm, QUANTITIES[case.points.quantity], _over(case.points.size), *cells])
    caption = (
        "AICc above that of the best family (0), which counts parameters against the fit; below it the error at depths "
        "left out in turn. A gap under 2 separates nothing."
    )
    return Table(["arm", "of", "over", *FAMILY_NAMES.values()], rows, caption, {0, 1, 2})


def claims(study: ScalingStudy) -> Table:
    """Figure 6 of PRORec, claim by claim."""
    rows = [[v.claim.text, v.judgement, v.sentence] for v in study.claims]
    caption = (
        "Of depths: confirmed or contradicted where the 95% t interval of the difference over the same seeds, the "
        "noise of a run pooled over the depths of its arm, is on one side of zero; undecided where it covers zero, or "
        "a depth or a second seed is missing. Of two systems: confirmed where the interval of every depth is above "
        "zero, contradicted where one is below; these intervals are for seeds at large. No value was read off the "
        "figure."
    )
    return Table(["claim of PRORec, Figure 6", "", "in these runs"], rows, caption, {0, 1, 2})


def runs(study: ScalingStudy) -> Table:
    """Every finished run with its numbers; of its commit where there are several."""
    several = len({trial.commit for trial in study.finished}) > 1
    rows: list[list[Cell | str]] = [
        [
            Cell(trial.name, trial.commit[:10] if several else ""),
            trial.arm,
            str(trial.depth),
            str(trial.seed),
            *(si(trial.num_parameters.get(size)) for size in SIZES if size != COMPUTE),
            scientific(trial.train_flops),
            *(number(value_of(trial, name), 3 if name in LOSSES else 4) for name in QUANTITIES),
            si(trial.tokens_per_second),
            f"{trial.peak_memory_bytes / 2**30:.2f}" if trial.peak_memory_bytes else NONE,
            percent(trial.mfu),
        ]
        for trial in study.finished
    ]
    head = [
        "run",
        "arm",
        "layers",
        "seed",
        *(f"N, {s.replace('_', '-')}" for s in SIZES if s != COMPUTE),
        "FLOPs",
        "bits an item",
        "lowest",
    ]
    head += ["NDCG@20", "Recall@20", "tokens/s", "GiB", "MFU"]
    return Table(
        head,
        rows,
        "FLOPs: of training, up to the best checkpoint. Lowest: bits an item of the validation where they were fewest.",
        {0, 1},
    )


def without_numbers(study: ScalingStudy) -> Table | None:
    """Runs that are not finished, with the reason; they enter nothing."""
    rows = [
        [trial.name, trial.arm, str(trial.depth), str(trial.seed), trial.state, trial.reason or NONE]
        for trial in study.trials
        if trial.state != "finished"
    ]
    caption = "These runs have no numbers and enter no fit, mean or figure."
    return Table(["run", "arm", "layers", "seed", "state", "why"], rows, caption, {0, 1, 4, 5}) if rows else None


def settings(study: ScalingStudy) -> Table | None:
    """Settings that vary between trials, one row for each set of values."""
    keys = sorted({key for trial in study.trials for key in trial.hyperparameters})
    if not keys:
        return None
    found: dict[tuple, list[Trial]] = {}
    for trial in study.trials:
        values = tuple(str(trial.hyperparameters.get(key, NONE)) for key in keys)
        found.setdefault((trial.arm, trial.depth, values), []).append(trial)
    rows = [
        [arm, str(depth), ", ".join(str(t.seed) for t in same), *values] for (arm, depth, values), same in found.items()
    ]
    return Table(["arm", "layers", "seeds", *keys], rows, text_columns={0, 2})


def choices(study: ScalingStudy, facts: Mapping[str, str]) -> Table:
    """What was chosen, so that the study can be judged and repeated; what nobody stated says so."""
    done = study.finished
    counted = sorted({name for trial in done for name in trial.num_parameters})
    ranges = []
    for arm in study.arms:
        sizes = [t.num_parameters[MAIN_SIZE] for t in done if t.arm == arm and MAIN_SIZE in t.num_parameters]
        depths = sorted({t.depth for t in done if t.arm == arm})
        span = f", N {si(min(sizes))} to {si(max(sizes))}" if sizes else ""
        ranges.append(f"{arm}: {', '.join(map(str, depths)) or 'none'} layers{span}")
    seeds = {
        arm: sorted(
            {
                len({t.seed for t in done if t.arm == arm and t.depth == d})
                for d in {t.depth for t in done if t.arm == arm}
            }
        )
        for arm in study.arms
    }
    stated: dict[str, str] = {
        "Sizes": "; ".join(ranges),
        "Counting of N": f"figures and verdicts: {SIZES[MAIN_SIZE]}; counted: {', '.join(counted) or 'nothing'}",
        "Compute C": "FLOPs of the training up to the best checkpoint, as the trial gives them",
        "Seeds a depth": "; ".join(f"{arm}: {_range(counts)}" for arm, counts in seeds.items()),
        "Points": "every finished run, no means over seeds, none left out; what a seed adds at every depth is fitted",
        "Loss": "bits an item of the best checkpoint on the validation set; lowest loss: the least of the training's "
        "validations, and the FLOPs up to it; metrics are of the test set",
        "Schedule": facts.get("schedule", NOT_STATED),
        "Data": facts.get("data", NOT_STATED),
        "Order of interactions": facts.get("order", NOT_STATED),
        "Early stopping": facts.get("early stopping", NOT_STATED),
        "Tuning": facts.get("tuning", NOT_STATED),
        "Hardware": "; ".join(dict.fromkeys(t.hardware for t in done if t.hardware)) or NOT_STATED,
        "Commits": ", ".join(dict.fromkeys(t.commit[:10] for t in done if t.commit)) or NOT_STATED,
        "Fit": "sum of Huber losses of log residuals, δ = 0.001; exhaustive search over the exponent",
        "Intervals": "95%, for these seeds: percentiles of a smoothed bootstrap of the runs' residuals; of means over "
        "seeds and of differences: t, the noise of a run pooled over the depths of its arm",
        "Extrapolation test": f"fitted on at most {HELD_OUT_ABOVE} layers, asked for the deeper runs",
    }
    known = {"schedule", "data", "order", "early stopping", "tuning"}
    stated |= {key[:1].upper() + key[1:]: value for key, value in facts.items() if key not in known}
    return Table(["choice", "here"], [[key, value] for key, value in stated.items()], text_columns={0, 1})


def _range(counts: Sequence[int]) -> str:
    if not counts:
        return "none"
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _in_order(study: ScalingStudy, sizes: Sequence[str]) -> list[Case]:
    found = (study.case(arm, size, q) for arm in study.arms for q in QUANTITIES for size in sizes)
    return [case for case in found if case]


def _over(size: str) -> str:
    return "C" if size == COMPUTE else "N" if size == MAIN_SIZE else f"N, {size}"


def _span(interval: Interval, form: str) -> str:
    return f"{interval[0]:{form}} to {interval[1]:{form}}"
