"""Pages of the PRORec paper's Figures 7 (text encoders), 8 (tokenizers) and 9 (number of clusters).

The paper prints these as bars and lines without numbers, so only its text is judged; no value is read off a figure.
"""

from __future__ import annotations

from genrec_dist.studies import paper, plots
from genrec_dist.studies.blocks import Block, Figure, Section, Text, percent
from genrec_dist.studies.grid import (
    PAPER,
    Column,
    Grid,
    Row,
    bounds_note,
    entries,
    reference_rows,
    result_rows,
)
from genrec_dist.studies.ordering import Claim, Verdict, judge
from genrec_dist.studies.prorec_tables import known_metrics
from genrec_dist.studies.results import metric_label
from genrec_dist.studies.study_data import StudyData, dig
from genrec_dist.studies.study_page import StudyPage
from genrec_dist.studies.study_plots import Line, pooled_line, sweep

NAMED = ("recall@20", "ndcg@20")
"""Metrics that the text names."""
OTHERS = ("rqvae", "random")


def encoders(data: StudyData) -> StudyPage:
    """PRORec, Figure 7: those encoders whose weights, or finished embeddings, are here."""
    claims = [
        Claim(name, "llama2-7b", other)
        for name in known_metrics(data, NAMED)
        for other in ("sentence-t5", "bert")
        if other in data.labels
    ]
    verdict = judge("Llama2-7b above Sentence-T5 and BERT", claims, data.metric, data.labels, metric_label=metric_label)
    metrics = known_metrics(data) or [f"recall@{data.config.evaluation.cutoffs[-1]}"]
    ours, references = result_rows(data, metrics), reference_rows(data, metrics)
    grid = Grid(
        "encoders",
        "text encoder",
        [Column(name, metric_label(name)) for name in metrics],
        [*ours, *references, *_printed(data, "Llama2-7b, paper")],
        f"{bounds_note(data)} The paper: Table 3, which is Llama2-7b; Figure 7 prints no numbers.",
    )
    grid.columns.append(Column("width", "width of the vectors", lambda value: f"{value:,.0f}"))
    for variant in data.variants:
        for row in ours:
            if row.label == variant.label:
                row.values["width"] = data.pool(
                    variant.name, lambda run: dig(run.json("semantic", "report.json"), "dim")
                )
    blocks: list[Block] = [grid.table()]
    if ours:
        shown = known_metrics(data, NAMED) or metrics[:2]
        oracle = data.any_run.oracle if data.any_run else {}
        blocks.insert(0, Figure(plots.headline(entries(grid.rows), shown, oracle)))
    blocks += [Text(f"Not run here: {data.labels[name]}. {reason}") for name, reason in data.absent.items()]
    return StudyPage(verdict, [grid], [Section("encoders", "Text encoders", blocks), *grid.seed_sections()])


def tokenizers(data: StudyData) -> StudyPage:
    """PRORec, Figure 8."""
    printed = "Printed in Table 3 with hierarchical k-means; Figure 8 is of Beauty and prints no numbers."
    verdict = _judge_tokenizers(data, "The paper's ordering")
    return _tokenizer_page(data, verdict, _printed(data, "PRORec, paper"), printed)


def csj_tokenizers(data: StudyData) -> StudyPage:
    """The same for CSJ-ID, of which its paper says nothing."""
    verdict = _judge_tokenizers(data, "The ordering of PRORec's Figure 8")
    rows = [Row("CSJ-ID, paper (RQ-VAE)", PAPER, dict(paper.CSJ_MAIN["csj_id"]))]
    return _tokenizer_page(data, verdict, rows, "The CSJ-ID paper prints its RQ-VAE only (section 4.2, Beauty).")


def _judge_tokenizers(data: StudyData, whose: str) -> Verdict:
    names = known_metrics(data, NAMED)
    claims = [Claim(name, "hierarchical_kmeans", other) for name in names for other in OTHERS if other in data.labels]
    said = f"hierarchical k-means above RQ-VAE and random codes in {', '.join(map(metric_label, names))}"
    return judge(said, claims, data.metric, data.labels, whose=whose, metric_label=metric_label)


def _printed(data: StudyData, label: str) -> list[Row]:
    """PRORec's row of Table 3 on the data set of the runs, if it is one of the paper's."""
    known = paper.PERFORMANCE.get(data.data_set or "", {})
    return [Row(label, PAPER, dict(known["PRORec"]))] if known else []


def _codes(data: StudyData, grid: Grid) -> None:
    """Columns on the codes behind a result: how many items had one of their own, and how long they are."""
    grid.columns += [
        Column("own code", "own code at once", lambda value: percent(value, 2)),
        Column("code length", "mean code length", lambda value: f"{value:.2f}"),
    ]
    for variant in data.variants:
        row = next((row for row in grid.rows if row.label == variant.label), None)
        if row is None:
            continue
        before = data.fact(variant.name, "quality.json", "before_collisions", "coverage")
        row.values["own code"] = before or data.fact(variant.name, "quality.json", "unique_fraction")
        row.values["code length"] = data.fact(variant.name, "quality.json", "mean_depth")


def _tokenizer_page(data: StudyData, verdict: Verdict, printed: list[Row], note: str) -> StudyPage:
    metrics = known_metrics(data) or [f"recall@{data.config.evaluation.cutoffs[-1]}"]
    ours, references = result_rows(data, metrics), reference_rows(data, metrics)
    grid = Grid(
        "tokenizers", "tokenizer", [Column(n, metric_label(n)) for n in metrics], [*ours, *references, *printed]
    )
    _codes(data, grid)
    grid.caption = (
        f"{bounds_note(data)} Own code at once: distinct codes an item before collisions are resolved (k-means splits "
        f"until every item has its own). {note}"
    )
    blocks: list[Block] = [grid.table()]
    if ours:
        shown = known_metrics(data, NAMED) or metrics[:2]
        oracle = data.any_run.oracle if data.any_run else {}
        blocks.insert(0, Figure(plots.headline(entries(grid.rows), shown, oracle)))
    return StudyPage(verdict, [grid], [Section("tokenizers", "Tokenizers", blocks), *grid.seed_sections()])


def clusters(data: StudyData) -> StudyPage:
    """PRORec, Figure 9."""
    names = known_metrics(data, NAMED)
    claims = [Claim(name, "k256", "k128") for name in names]
    claims += [Claim("ndcg@20", "k512", "k256"), Claim("recall@20", "k256", "k512")] if names else []
    said = "256 clusters above 128; 512 above 256 in NDCG@20 and below it in Recall@20"
    verdict = judge(said, claims, data.metric, data.labels, metric_label=metric_label)
    metrics = known_metrics(data) or [f"recall@{data.config.evaluation.cutoffs[-1]}"]
    ours, references = result_rows(data, metrics), reference_rows(data, metrics)
    rows = [*ours, *references, *_printed(data, "K = 256, paper")]
    grid = Grid("clusters", "clusters", [Column(name, metric_label(name)) for name in metrics], rows)
    _codes(data, grid)
    grid.caption = (
        f"{bounds_note(data)} The paper: Table 3, which is K = 256; Figure 9 is of Beauty and prints no numbers."
    )
    blocks: list[Block] = [grid.table()]
    if ours:
        ticks = [str(v.label.removeprefix("K = ")) for v in data.variants]
        panels = [(metric_label(name), [_line(data, name)]) for name in (names or metrics[:2])]
        blocks.insert(0, Figure(sweep(panels, ticks, "K, clusters of a level", "clusters")))
    blocks.append(Text("One K fits one number of items: 512 of 12,000 is not 512 of another catalog.", note=True))
    return StudyPage(verdict, [grid], [Section("clusters", "Number of clusters", blocks), *grid.seed_sections()])


def _line(data: StudyData, name: str) -> Line:
    found = {i: data.metric(variant.name, name) for i, variant in enumerate(data.variants)}
    return pooled_line("this study", {i: value for i, value in found.items() if value is not None})
