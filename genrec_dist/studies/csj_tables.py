"""Pages of the CSJ-ID paper's tables: main result (4.2), lambda (4.3.1), uniqueness of codes (4.3.2)."""

from __future__ import annotations

from itertools import pairwise

from genrec_dist.studies import paper, plots
from genrec_dist.studies.blocks import Block, Figure, Section, Text, number, percent
from genrec_dist.studies.grid import (
    DERIVED,
    OURS,
    PAPER,
    Column,
    Grid,
    Row,
    bounds_note,
    entries,
    reference_rows,
    result_rows,
    signed_percent,
)
from genrec_dist.studies.ordering import Claim, judge
from genrec_dist.studies.results import metric_label
from genrec_dist.studies.study_data import Pooled, StudyData, Variant
from genrec_dist.studies.study_page import StudyPage
from genrec_dist.studies.study_plots import Line, pooled_line, sweep

PAIR = ("csj_id", "semantic_only")
LOSSES = ("semantic", "collaborative", "total")
MAIN_NOTE = f"The paper's rows: {paper.CSJ_PROTOCOL} They are context for the difference, not targets for the values."


def csj_main(data: StudyData) -> StudyPage:
    """Section 4.2: CSJ-ID against codes of the text alone."""
    cutoffs = data.config.evaluation.cutoffs
    metrics = [f"recall@{k}" for k in cutoffs] + [f"ndcg@{k}" for k in cutoffs if k > 1]
    claims = [Claim(name, *PAIR) for name in paper.CSJ_IMPROVEMENT if name in metrics]
    names = ", ".join(metric_label(claim.metric) for claim in claims)
    verdict = judge(
        f"CSJ-ID above semantic-only in {names}", claims, data.metric, data.labels, metric_label=metric_label
    )
    gain = {name: _gain(data.metric("csj_id", name), data.metric("semantic_only", name)) for name in metrics}
    ours, references = result_rows(data, metrics), reference_rows(data, metrics)
    printed = [Row(f"{data.labels[v]}, paper", PAPER, dict(paper.CSJ_MAIN[v])) for v in PAIR]
    rows = [*ours, Row("improvement", DERIVED, dict(gain), signed_percent), *references, *printed]
    rows.append(Row("improvement, paper", PAPER, dict(paper.CSJ_IMPROVEMENT), signed_percent))
    caption = f"{bounds_note(data)} The paper: section 4.2, Beauty. References: same harness, same users."
    grid = Grid("main", "", [Column(name, metric_label(name)) for name in metrics], rows, caption, highlight=True)
    blocks: list[Block] = [grid.table()]
    if ours:
        shown = [name for name in metrics if name in ("recall@10", "ndcg@10")] or metrics[:2]
        oracle = data.any_run.oracle if data.any_run else {}
        blocks.insert(0, Figure(plots.headline(entries([*ours, *references, *printed]), shown, oracle)))
    blocks += _stronger(data, references)
    blocks.append(Text(MAIN_NOTE, note=True))
    return StudyPage(verdict, [grid], [Section("result", "Main result", blocks), *grid.seed_sections()])


def _gain(above: Pooled | None, below: Pooled | None) -> float | None:
    return above.mean / below.mean - 1 if above and below and below.mean > 0 else None


def _stronger(data: StudyData, references: list[Row]) -> list[Block]:
    """References that CSJ-ID does not reach: what the paper's own comparison cannot show."""
    own, name = data.metric("csj_id", "recall@10"), "recall@10"
    found = [(row.label, row.values.get(name)) for row in references]
    above = [(label, v.mean) for label, v in found if own and isinstance(v, Pooled) and v.mean > own.mean]
    if not own or not above:
        return []
    listed = ", ".join(f"{label} ({number(value)})" for label, value in above)
    return [Text(f"In the same harness CSJ-ID's Recall@10 ({number(own.mean)}) is below that of {listed}.")]


def csj_lambda(data: StudyData) -> StudyPage:
    """Section 4.3.1: losses of the RQ-VAE, and Recall@10 where the generator was run, by lambda."""
    claims = [claim for name in LOSSES for claim in _neighbours(name, data.variants)]
    verdict = judge(
        "with λ the semantic loss falls, the collaborative loss rises and the total falls",
        claims,
        lambda variant, name: data.fact(variant, "rqvae.json", "losses", name),
        data.labels,
        metric_label=lambda name: f"{name} loss",
        show=lambda value: f"{value:.4g}",
    )
    recall = {v.name: data.metric(v.name, "recall@10") for v in data.variants}
    columns = []
    for name in LOSSES:
        columns += [Column(name, f"{name} loss", _loss), Column(f"paper {name}", "paper", _loss)]
    printed = [column.key for column in columns]
    columns += [Column(f"explained {name}", f"{name} explained", percent) for name in LOSSES[:2]]
    columns += [Column("recall@10", "Recall@10")] if any(recall.values()) else []
    grid = Grid("lambda", "λ", columns, [_lambda_row(data, v, recall[v.name]) for v in data.variants])
    grid.caption = (
        "Mean squared error a dimension in the units of the inputs, of the final codes; total: weighted by λ, with the "
        "commitment, which is in the units of the codes. The paper: section 4.3.1, Beauty; its units are not stated: "
        f"compare how the numbers change with λ, not their sizes. {bounds_note(data, False)}"
    ).strip()
    panels = [(f"{name} loss", _lines(grid, name, f"paper {name}")) for name in LOSSES]
    ticks = [v.label.removeprefix("λ = ") for v in data.variants]
    blocks: list[Block] = [Figure(sweep(panels, ticks, "λ", "losses", log=True), "Hollow: the paper.")]
    more = grid.table([column.key for column in columns if column.key not in printed])
    more.caption = "Explained: share of an input's variance that its decoder gives back from the codes."
    more.caption += f" {bounds_note(data)}" if any(recall.values()) else ""
    blocks += [grid.table(printed), more]
    balance = _balance(data, recall)
    if balance:
        blocks.insert(0, Text(balance))
    facts = {"balance": balance} if balance else {}
    return StudyPage(verdict, [grid], [Section("losses", "Losses by λ", blocks), *grid.seed_sections()], facts)


def weight_of(variant: Variant) -> float:
    """Lambda of a variant of this study."""
    return float(variant.overrides[-1].partition("=")[2])


def _loss(value: float) -> str:
    return f"{value:.4g}"


def _neighbours(name: str, variants: tuple[Variant, ...]) -> list[Claim]:
    """The printed order of neighbouring lambdas; printed ties claim nothing."""
    claims = []
    for left, right in pairwise(variants):
        first, second = (paper.CSJ_LAMBDA[weight_of(v)][name] for v in (left, right))
        if first != second:
            claims.append(Claim(name, *((left.name, right.name) if first > second else (right.name, left.name))))
    return claims


def _lambda_row(data: StudyData, variant: Variant, recall: Pooled | None) -> Row:
    printed = paper.CSJ_LAMBDA[weight_of(variant)]
    values: dict[str, Pooled | float | None] = {}
    for name in LOSSES:
        values |= {name: data.fact(variant.name, "rqvae.json", "losses", name), f"paper {name}": printed[name]}
    for name in LOSSES[:2]:
        values[f"explained {name}"] = data.fact(variant.name, "rqvae.json", "explained", name)
    return Row(variant.label.removeprefix("λ = "), OURS, values | {"recall@10": recall})


def _lines(grid: Grid, ours: str, printed: str) -> list[Line]:
    pooled = {i: value for i, row in enumerate(grid.rows) if isinstance(value := row.values[ours], Pooled)}
    theirs = {i: row.values[printed] for i, row in enumerate(grid.rows)}
    lines = [Line("paper", {i: v for i, v in theirs.items() if isinstance(v, float)}, paper=True)]
    if pooled:
        lines.insert(0, pooled_line("this study", pooled))
    return lines


def _balance(data: StudyData, recall: dict[str, Pooled | None]) -> str:
    """Which lambda is best, on the two counts that can be measured."""
    said = []
    worst = {}
    for variant in data.variants:
        shares = [data.fact(variant.name, "rqvae.json", "explained", name) for name in LOSSES[:2]]
        known = [share.mean for share in shares if share is not None]
        if len(known) == 2:
            worst[variant.label] = min(known)
    if worst:
        best = max(worst, key=lambda label: worst[label])
        said.append(f"the worse explained of the two inputs is explained best at {best} ({percent(worst[best])})")
    scored = {data.labels[name]: pooled.mean for name, pooled in recall.items() if pooled is not None}
    if scored:
        best = max(scored, key=lambda label: scored[label])
        said.append(f"Recall@10 is highest at {best} ({number(scored[best])})")
    return (
        f"The paper calls λ = 0.5 the optimal balance and names no measure; here {', and '.join(said)}." if said else ""
    )


def csj_unique(data: StudyData) -> StudyPage:
    """Section 4.3.2: distinct codes before and after collisions are resolved."""
    verdict = judge(
        "CSJ-ID covers more items with codes of their own than semantic-only",
        [Claim("coverage", *PAIR)],
        lambda variant, name: data.fact(variant, "quality.json", "before_collisions", name),
        data.labels,
        show=lambda value: percent(value, 2),
    )
    columns = [
        Column("items", "items", _count),
        Column("unique_codes", "unique codes", _count),
        Column("coverage", "coverage", lambda value: percent(value, 2)),
        Column("moved", "items moved", _count),
        Column("after", "coverage after", lambda value: percent(value, 2)),
    ]
    rows = [_unique_row(data, v) for v in data.variants]
    rows += [
        Row(f"{data.labels[v]}, paper", PAPER, {k: float(x) for k, x in paper.CSJ_UNIQUE[v].items()}) for v in PAIR
    ]
    ways = {run.config.identifiers.collisions for run in data.runs.values()}
    caption = (
        "Unique codes: distinct code sequences before collisions are resolved; coverage: of them an item. Then every "
        f"item gets a sequence of its own ({', '.join(sorted(ways)) or 'not run yet'}). The paper: section 4.3.2, "
        f"Beauty; its counts are approximate, what it does with collisions is not said. {bounds_note(data, False)}"
    ).strip()
    grid = Grid("unique", "", columns, [row for row in rows if any(row.values.values())], caption, True)
    return StudyPage(
        verdict, [grid], [Section("unique", "Uniqueness of the codes", [grid.table()]), *grid.seed_sections()]
    )


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _unique_row(data: StudyData, variant: Variant) -> Row:
    name = variant.name
    return Row(
        variant.label,
        OURS,
        {
            "items": data.fact(name, "quality.json", "num_items"),
            "unique_codes": data.fact(name, "quality.json", "before_collisions", "unique_codes"),
            "coverage": data.fact(name, "quality.json", "before_collisions", "coverage"),
            "moved": data.fact(name, "quality.json", "collision_handling", "moved"),
            "after": data.fact(name, "quality.json", "collision_handling", "after"),
        },
    )
