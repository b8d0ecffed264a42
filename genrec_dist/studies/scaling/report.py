"""The scaling report of a sweep: report.html with interactive figures, report.json, and figures/ID.csv and .json.

The page is one file: plotly.js stands in it, nothing is fetched, and only that script and the page's own may run. It
computes no result of a run: trials bring them, fits.py and claims.py weigh them.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from genrec_dist import __version__
from genrec_dist.artifacts.files import read_json, write_atomic, write_json
from genrec_dist.errors import DataError
from genrec_dist.studies.blocks import Block, Details, Section, Text, Tile
from genrec_dist.studies.report import TEMPLATES, render
from genrec_dist.studies.scaling import fit_figures, run_figures, tables
from genrec_dist.studies.scaling.fits import NUM_RESAMPLES
from genrec_dist.studies.scaling.plot import Plot
from genrec_dist.studies.scaling.points import COMPUTE, LOSS, LOWEST_LOSS
from genrec_dist.studies.scaling.study import MAIN_SIZE, ScalingStudy, study_of
from genrec_dist.studies.scaling.trials import Trial, record_of, study_record

FIGURES = "figures"
RECORD = "report.json"


def write_report(
    trials: Sequence[Trial],
    folder: Path,
    title: str,
    facts: Mapping[str, str] | None = None,
    num_resamples: int = NUM_RESAMPLES,
) -> Path:
    """Write the report of a sweep, complete or not.

    Args:
        trials: of all arms, also those without numbers, which are listed.
        folder: gets report.html, report.json, from which `rewrite_report` makes it again, and figures/.
        title: of the page.
        facts: for the table of choices what trials do not say: 'schedule', 'data', 'order', 'early stopping', 'tuning';
            other keys become rows of their own.
        num_resamples: of each bootstrap.

    Returns:
        Path of report.html.

    Raises:
        DataError: no trials, two finished ones of one arm, depth and seed, or a size or loss that is not positive.
    """
    if not trials:
        raise DataError("a sweep without trials has no report", where=folder, fix="give at least one trial")
    study = study_of(trials, num_resamples)
    sections = _sections(study, facts or {})
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Plot):
                write_atomic(folder / FIGURES / f"{block.id}.csv", block.csv().encode())
                write_json(folder / FIGURES / f"{block.id}.json", block.as_dict())
    write_json(folder / RECORD, _record(study, title, facts or {}))
    scripts = [get_plotlyjs(), (TEMPLATES / "scaling.js").read_text(encoding="utf-8")]
    page = render(
        "scaling.html",
        kind="scaling report",
        name=title,
        protocol=_protocol(study, facts or {}),
        tiles=_tiles(study),
        verdicts=_headline(study),
        missing=sum(trial.state != "finished" for trial in trials),
        sections=sections,
        figures=FIGURES,
        script_hashes=[_hash(script) for script in scripts],
        scripts=[Markup(script) for script in scripts],
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )
    path = folder / "report.html"
    write_atomic(path, page.encode("utf-8"))
    return path


def rewrite_report(record: Path, num_resamples: int = NUM_RESAMPLES) -> Path:
    """Write a report again from its report.json, with the fits of this version; its runs are not needed.

    Args:
        record: report.json, beside which the report is written.
        num_resamples: of each bootstrap.

    Returns:
        Path of report.html.

    Raises:
        DataError: the file is no report's record or holds no trials, as those of earlier versions.
    """
    try:
        plain = read_json(record)
    except (OSError, ValueError) as error:
        raise DataError(
            "not the record of a scaling report",
            where=record,
            got=f"{type(error).__name__}: {error}",
            expected="a report.json that a sweep's report wrote",
        ) from error
    kept = study_record(plain, record)
    return write_report(kept.trials, record.parent, kept.title, kept.facts, num_resamples)


def _sections(study: ScalingStudy, facts: Mapping[str, str]) -> list[Section]:
    """Those that have anything to show."""
    plan: list[tuple[str, str, Sequence[Block | Plot | None]]] = [
        ("verdicts", "Verdicts", [tables.verdicts(study)] if study.cases else []),
        (
            "figure-6",
            "PRORec's Figure 6",
            [tables.claims(study) if study.claims else None, run_figures.by_depth(study)],
        ),
        (
            "loss",
            "Loss",
            [
                fit_figures.loss_over_sizes(study, (MAIN_SIZE, COMPUTE), "loss"),
                fit_figures.loss_over_sizes(study, (MAIN_SIZE, COMPUTE), "lowest-loss", LOWEST_LOSS),
                fit_figures.excess_over_sizes(study),
                fit_figures.loss_over_sizes(study, fit_figures.OTHER_SIZES, "loss-other-counts"),
            ],
        ),
        ("metrics", "Metrics", [fit_figures.metrics_over_size(study)]),
        ("extrapolation", "Prediction against actual", [fit_figures.extrapolation(study)]),
        ("fits", "Fits", _fit_blocks(study)),
        ("seeds", "Seeds", [run_figures.seed_spread(study)]),
        ("costs", "Costs", [run_figures.costs(study)]),
        ("learning-curves", "Learning curves", [run_figures.learning_curves(study)]),
        ("runs", "Runs", _run_blocks(study)),
        ("choices", "Choices", [tables.choices(study, facts)]),
    ]
    made = [Section(name, title, [block for block in blocks if block is not None]) for name, title, blocks in plan]  # type: ignore[misc]
    return [section for section in made if section.blocks]


def _fit_blocks(study: ScalingStudy) -> list[Block]:
    if not any(case.fit for case in study.cases.values()):
        return []
    others = tables.fits(study, fit_figures.OTHER_SIZES)
    blocks: list[Block] = [tables.fits(study, (MAIN_SIZE, COMPUTE)), tables.families(study)]
    return blocks + ([Details("In other counts of parameters", table=others)] if others.rows else [])


def _run_blocks(study: ScalingStudy) -> list[Block]:
    blocks: list[Block] = []
    missing = tables.without_numbers(study)
    if missing:
        blocks += [Text(f"{len(missing.rows)} of {len(study.trials)} runs have no numbers.", note=True), missing]
    if study.finished:
        blocks.append(tables.runs(study))
    varied = tables.settings(study)
    if varied:
        blocks.append(Details("Settings that vary between runs", table=varied))
    return blocks


def _headline(study: ScalingStudy) -> list[tuple[str, str]]:
    """(CSS class, sentence) of what the page is opened for: the loss over N of each arm, then the claims."""
    said = []
    for arm in study.arms:
        case = study.case(arm, MAIN_SIZE, LOSS) or study.case(arm, MAIN_SIZE, "ndcg@20")
        if case:
            what = "Loss" if case.points.quantity == LOSS else "NDCG@20"
            said.append(("yes" if case.verdict.supported else "no", f"{what} of {arm}: {case.verdict.sentence}"))
    css = {"confirmed": "yes", "contradicted": "no", "undecided": "in-part"}
    for verdict in study.claims:
        if verdict.metric == "ndcg@20":
            said.append((css[verdict.judgement], f"“{verdict.claim.text}”: {verdict.judgement}. {verdict.sentence}"))
    return said


def _tiles(study: ScalingStudy) -> list[Tile]:
    done = study.finished
    depths = sorted({trial.depth for trial in done})
    tiles = [Tile("runs finished", f"{len(done)}", f"of {len(study.trials)}, arms {', '.join(study.arms)}")]
    if depths:
        seeds = len({trial.seed for trial in done})
        span = f"{depths[0]}–{depths[-1]}" if len(depths) > 1 else str(depths[0])
        tiles.append(Tile("layers", span, f"{len(depths)} depths, {seeds} seed{'s' if seeds > 1 else ''}"))
    for arm in study.arms:
        case = study.case(arm, MAIN_SIZE, LOSS)
        if case and case.fit:
            low, high = case.fit.power.alpha_interval
            note = f"95% {low:.2f} to {high:.2f}" + ("" if case.verdict.supported else "; not supported")
            tiles.append(Tile(f"α of {arm}, loss over N", f"{case.fit.power.alpha:.2f}", note))
    return tiles


def _protocol(study: ScalingStudy, facts: Mapping[str, str]) -> str:
    parts = [facts["data"]] if "data" in facts else []
    parts += [f"order {facts['order']}"] if "order" in facts else []
    parts += dict.fromkeys(trial.hardware for trial in study.finished if trial.hardware)
    return " · ".join(parts)


def _record(study: ScalingStudy, title: str, facts: Mapping[str, str]) -> dict:
    return {
        "title": title,
        "facts": dict(facts),
        "arms": study.arms,
        "fits": [case.as_dict() for case in study.cases.values()],
        "claims": [
            {
                "arm": v.claim.arm,
                "claim": v.claim.text,
                "metric": v.metric,
                "judgement": v.judgement,
                "sentence": v.sentence,
                "difference": v.difference and v.difference.mean,
                "interval": v.difference and v.difference.interval,
            }
            for v in study.claims
        ],
        "without_numbers": [
            {"run": t.name, "arm": t.arm, "depth": t.depth, "seed": t.seed, "state": t.state, "reason": t.reason}
            for t in study.trials
            if t.state != "finished"
        ],
        "trials": [record_of(trial) for trial in study.trials],
        "genrec_dist": __version__,
    }


def _hash(script: str) -> str:
    """What a content security policy names a script by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode('utf-8')).digest()).decode()}"
