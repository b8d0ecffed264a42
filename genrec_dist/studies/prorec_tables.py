"""Pages of the PRORec paper's Tables 3 (performance), 4 (similarity), 5 (modalities) and 6 (tasks).

The paper prints Tables 4 to 6 for Beauty only; on another data set its rows are left out. It states no order of
interactions. All of it is drawn from finished runs; nothing is computed again.
"""

from __future__ import annotations

from collections.abc import Callable

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
from genrec_dist.studies.results import HEADLINE, ORDER_NOTES, metric_label
from genrec_dist.studies.study_data import Pooled, StudyData, dig
from genrec_dist.studies.study_page import StudyPage

SIDES = ("semantic", "collaborative")
MODES = {"concat": "concat_pca", "ours": "ours"}
"""Variant -> the name of its integrated table in similarity.json."""
TASK_NAMES = {"neither": "neither task", "alignment": "alignment", "both": "alignment and distillation"}
MODALITY_NAMES = {
    "semantic": "semantic only",
    "collaborative": "collaborative only",
    "concat": "concat",
    "ours": "ours",
}
"""Variant -> row of the printed table."""
TABLE_NOTE = (
    "The paper prints the same numbers for Table 5's concatenation and Table 6's column without either task: its "
    "single-modality and concatenation rows have no distillation, and here they have none either."
)


def known_metrics(data: StudyData, names: tuple[str, ...] = HEADLINE) -> list[str]:
    """Those of the paper's metrics that the runs have."""
    return [name for name in names if int(name.split("@")[1]) in data.config.evaluation.cutoffs]


def performance(data: StudyData) -> StudyPage:
    """Table 3: PRORec beside the references of the same harness and all printed methods."""
    metrics = known_metrics(data)
    rivals = [name for name in data.references if name not in ("popularity", "stage_one")]
    labels = data.labels | {name: name.replace("_", " ") for name in rivals}

    def value(who: str, metric: str) -> Pooled | None:
        return data.metric(who, metric) if who in data.labels else data.reference(who, metric)

    said = f"PRORec above {' and '.join(labels[name] for name in rivals) or 'the references'}"
    verdict = judge(
        said,
        [Claim(metric, "prorec", rival) for rival in rivals for metric in metrics],
        value,
        labels,
        metric_label=metric_label,
    )
    printed = paper.PERFORMANCE.get(data.data_set or "", {})
    ours, references = result_rows(data, metrics), reference_rows(data, metrics)
    alone = _without_mix(data, metrics)
    rows = [*ours, *alone]
    if printed and ours:
        rows.append(_difference(data, metrics, printed["PRORec"]))
    papers = [Row(f"{name}, paper", PAPER, dict(values)) for name, values in reversed(printed.items())]
    grid = Grid(
        "performance", "", [Column(name, metric_label(name)) for name in metrics], [*rows, *references, *papers]
    )
    grid.caption = f"{bounds_note(data)} The paper: Table 3. References: same harness, same users."
    grid.highlight = True
    blocks: list[Block] = [grid.table()]
    if ours:
        shown = [name for name in metrics if name.endswith("@10")] or metrics[:2]
        drawn = [*ours, *references, *(row for row in papers if row.label.split(",")[0] in ("PRORec", "SASRec"))]
        blocks.insert(0, Figure(plots.headline(entries(drawn), shown, data.any_run.oracle if data.any_run else {})))
    blocks += [Text(text, note=True) for text in (_advantages(data), ORDER_NOTES[data.config.catalog.order]) if text]
    return StudyPage(verdict, [grid], [Section("performance", "Performance", blocks), *grid.seed_sections()])


def _advantages(data: StudyData) -> str:
    """What PRORec is given here that SASRec is not."""
    config = data.config
    has = []
    if config.fusion.time_bumps or config.generator.time_bumps:
        has.append(
            "the times of a user's history (never the target's; purchases of others that come later in time are in the "
            "training data, as leave-one-out has it)"
        )
    if config.fusion.label_smoothing or config.generator.label_smoothing:
        has.append("smoothed labels")
    if (config.fusion.optim.ema_decay or config.generator.optim.ema_decay) and not config.sasrec.optim.ema_decay:
        has.append("averaged weights")
    if not has:
        return ""
    said = f"PRORec has, and SASRec has not: {'; '.join(has)}."
    return said + (
        " Stage one is PRORec's own sequence model alone, with all of that." if "stage_one" in data.references else ""
    )


def _difference(data: StudyData, metrics: list[str], printed: dict[str, float]) -> Row:
    found = {name: data.metric("prorec", name) for name in metrics}
    values: dict[str, Pooled | float | None] = {n: v.mean / printed[n] - 1 for n, v in found.items() if v is not None}
    return Row("PRORec against the paper", DERIVED, values, signed_percent)


def _without_mix(data: StudyData, metrics: list[str]) -> list[Row]:
    """The beam alone, as the paper decodes, of variants whose result has the token's dense score mixed in."""
    rows = []
    for variant in data.variants:
        values: dict[str, Pooled | float | None] = {n: data.without_mix(variant.name, n) for n in metrics}
        if any(values.values()):
            rows.append(Row(f"{variant.label}, beam alone", OURS, values))
    return rows


def similarity(data: StudyData) -> StudyPage:
    """Table 4: how near the final table is to either modality (equations 9 and 10)."""

    def share(variant: str, side: str) -> Pooled | None:
        return data.pool(variant, lambda run: dig(run.json("fusion", "similarity.json"), MODES[variant], side))

    def value(who: str, what: str) -> Pooled | None:
        return share(who, what) if who in MODES else share(what, who)

    labels = data.labels | {side: f"the {side} modality" for side in SIDES}
    verdict = judge(
        "the concatenation is nearer to the semantic modality, and nearer to it than the integrated embeddings are",
        [Claim("concat", *SIDES), Claim("semantic", "concat", "ours")],
        value,
        labels,
        metric_label=lambda name: f"similarity {'to the ' + name + ' modality' if name in SIDES else 'of ' + name}",
        show=lambda found: percent(found, 2),
    )
    columns = [Column(side, f"{side} modality", lambda found: percent(found, 2)) for side in SIDES]
    columns += [Column(f"kl_{side}", f"KL from {side}, nats") for side in SIDES]
    keys = [column.key for column in columns]
    rows = [Row(v.label, OURS, {key: share(v.name, key) for key in keys}) for v in data.variants]
    rows = [row for row in rows if any(row.values.values())]
    if data.data_set == "beauty":
        rows += [Row(f"{data.labels[v]}, paper", PAPER, dict(paper.MODALITY_SIMILARITY[v])) for v in MODES]
    caption = (
        "Proportional similarity of the final embeddings to either modality, equations 9 and 10; the collaborative "
        "table is that of the same run, for the concatenation from a model that never saw the text. The paper (Table "
        "4, Beauty) does not say of what the KL divergence is taken: here of softmax distributions over the cosine "
        f"similarities to other items, so compare the direction and not the sizes. {bounds_note(data, False)}"
    ).strip()
    grid = Grid("similarity", "", columns, rows, caption)
    return StudyPage(
        verdict, [grid], [Section("similarity", "Similarity of the modalities", [grid.table()]), *grid.seed_sections()]
    )


def modalities(data: StudyData) -> StudyPage:
    """Table 5: one modality, both concatenated, both integrated."""
    claims = [
        Claim(metric, "ours", other) for other in ("semantic", "collaborative", "concat") for metric in _names(data)
    ]
    claims += [Claim(metric, "semantic", "concat") for metric in _names(data) if metric.startswith("recall")]
    said = (
        "PRORec above both modalities alone and their concatenation, and the concatenation below text alone in Recall"
    )
    return _ablation(data, "modalities", "Modalities", claims, said, paper.FUSION_VARIANTS, MODALITY_NAMES, "Table 5")


def tasks(data: StudyData) -> StudyPage:
    """Table 6: the alignment task of Stage I and the distillation task of Stage II, added one after the other."""
    steps = (("alignment", "neither"), ("both", "alignment"))
    claims = [Claim(metric, *step) for step in steps for metric in _names(data)]
    said = "alignment improves on the concatenation without either task, and distillation on alignment"
    return _ablation(data, "tasks", "Tasks", claims, said, paper.TASK_VARIANTS, TASK_NAMES, "Table 6")


def _names(data: StudyData) -> list[str]:
    return known_metrics(data)


def _ablation(
    data: StudyData,
    name: str,
    title: str,
    claims: list[Claim],
    said: str,
    printed: dict[str, dict[str, float]],
    rows_of: dict[str, str],
    where: str,
) -> StudyPage:
    """A table of variants beside its printed form, each row of ours above the paper's of the same variant."""

    def decoded(who: str, metric: str) -> Pooled | None:
        """By the beam alone, which every variant and the paper have."""
        return data.without_mix(who, metric) or data.metric(who, metric)

    verdict = judge(said, claims, decoded, data.labels, metric_label=metric_label)
    metrics = known_metrics(data)
    ours, alone, references = result_rows(data, metrics), _without_mix(data, metrics), reference_rows(data, metrics)
    on_beauty = data.data_set == "beauty"
    rows: list[Row] = []
    for variant in data.variants:
        rows += [row for row in (*ours, *alone) if row.label in (variant.label, f"{variant.label}, beam alone")]
        if on_beauty and variant.name in rows_of:
            rows.append(Row(f"{variant.label}, paper", PAPER, dict(printed[rows_of[variant.name]])))
    grid = Grid(name, "", [Column(n, metric_label(n)) for n in metrics], [*rows, *references])
    grid.caption = f"{bounds_note(data)} The paper: {where}, Beauty{'' if on_beauty else ', not this data set'}."
    blocks: list[Block] = [grid.table()]
    if ours:
        shown = [n for n in metrics if n.endswith("@10")] or metrics[:2]
        blocks.insert(0, Figure(plots.headline(entries(rows), shown, data.any_run.oracle if data.any_run else {})))
    blocks += [Text(text) for text in _largest_step(data, claims, decoded)]
    note = (
        "Beam alone: without the distillation token's dense score, which variants without the token do not have and "
        "the paper does not use in decoding. The verdict and the sentence on Recall@10 compare beams alone."
    )
    blocks.append(Text(f"{TABLE_NOTE} {note if alone else ''}".strip(), note=True))
    return StudyPage(verdict, [grid], [Section(name, title, blocks), *grid.seed_sections()])


def _largest_step(data: StudyData, claims: list[Claim], value: Callable[[str, str], Pooled | None]) -> list[str]:
    """What each comparison of Recall@10 amounts to, in one sentence."""
    said = []
    for claim in claims:
        above, below = value(claim.above, claim.metric), value(claim.below, claim.metric)
        if claim.metric == "recall@10" and above and below and below.mean > 0:
            step = signed_percent(above.mean / below.mean - 1)
            said.append(
                f"{data.labels[claim.above]} {step} over {data.labels[claim.below]} "
                f"({number(above.mean)} against {number(below.mean)})"
            )
    return [f"Recall@10: {'; '.join(said)}."] if said else []
