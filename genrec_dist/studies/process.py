"""Sections of the report that speak of how the result came about: training, embeddings, data, stages, settings.

Reads through RunData; only the t-SNE cache is written.
"""

from __future__ import annotations

from statistics import median

from genrec_dist.artifacts.embeddings import ARRAY
from genrec_dist.artifacts.reader import EmbeddingStore
from genrec_dist.studies import paper, plots
from genrec_dist.studies.blocks import (
    Block,
    Details,
    Figure,
    Section,
    Table,
    Text,
    flatten,
    pairs,
    percent,
    plain,
    seconds,
)
from genrec_dist.studies.embedding_facts import embedding_facts
from genrec_dist.studies.identifier_section import STAGE as IDENTIFIERS
from genrec_dist.studies.results import CSJ_METHODS
from genrec_dist.studies.run_data import RunData
from genrec_dist.studies.tsne import tsne_maps

NO_RECORD = "no record"


def training_section(data: RunData) -> Section | None:
    """Curves of every training stage."""
    blocks = []
    for i, (stage, records) in enumerate(data.curves.items()):
        if stage == IDENTIFIERS:  # shown with the identifiers
            continue
        svg = plots.stage_curves(records, f"curves{i}")
        if svg is not None:
            blocks.append(Figure(svg, f"Stage “{stage}”. {_training_facts(records)}"))
    return Section("training", "Training", blocks) if blocks else None


def _training_facts(records: list[dict]) -> str:
    facts = []
    last = records[-1]
    if "epoch" in last and "step" in last:
        facts.append(f"{last['step']:,} steps, {last['epoch']:.3g} epochs")
    scored = [r for r in records if r.get("split") == "valid" and r.get("ndcg@10") is not None]
    if scored:
        best = max(scored, key=lambda r: r["ndcg@10"])
        where = f" at epoch {best['epoch']:.3g}" if "epoch" in best else ""
        facts.append(f"best validation NDCG@10 {best['ndcg@10']:.4f}{where}, dotted")
    speeds = [r["samples_per_second"] for r in records if r.get("samples_per_second")]
    if speeds:
        facts.append(f"median {median(speeds):,.0f} samples/s")
    return "; ".join(facts) + "." if facts else ""


def embeddings_section(data: RunData) -> Section | None:
    """The text embeddings, modality similarity (Table 4) and t-SNE maps (Figure 5)."""
    blocks = [*_text_embeddings(data), *_similarity(data), *_maps(data)]
    return Section("embeddings", "Embeddings", blocks) if blocks else None


def _text_embeddings(data: RunData) -> list[Block]:
    """Facts of the semantic stage, and what its ledger holds."""
    report = data.json("semantic", "report.json")
    if not report:
        return []
    blocks: list[Block] = [Table(["", "text embeddings"], [list(fact) for fact in embedding_facts(report)], "", {0, 1})]
    counts = (data.json("semantic", "ledger.json") or {}).get("counts", {})
    rows = [
        [reason.replace("_", " "), action, plain(count)]
        for reason, actions in counts.items()
        for action, count in actions.items()
    ]
    if rows:
        caption = "Ledger: items whose text had to be mended (kept) or that have no vector (failed)."
        blocks.append(Table(["reason", "action", "items"], rows, caption, text_columns={0, 1}))
    return blocks


def _similarity(data: RunData) -> list[Block]:
    found = data.json("fusion", "similarity.json")
    if not found:
        return []
    labels = {
        "ours": "this run, integrated",
        "concat": "this run, naive concatenation",
        "concat_pca": "this run, integrated (naive)",
        "collaborative": "this run, collaborative alone",
    }
    rows = [(labels.get(k, k), v["semantic"], v["collaborative"]) for k, v in found.items() if isinstance(v, dict)]
    printed = paper.MODALITY_SIMILARITY
    rows += [(f"paper, {k}", printed[k]["semantic"], printed[k]["collaborative"]) for k in ("ours", "concat")]
    table = Table(
        ["", "semantic", "collaborative"],
        [[label, percent(semantic, 2), percent(collaborative, 2)] for label, semantic, collaborative in rows],
        "Proportional similarity of each modality to the final embeddings (equations 9 and 10; the paper: Table 4, "
        "Beauty). The paper does not say of what the KL divergence is taken; here it is of the softmax over cosine "
        "similarities to other items, so only the direction compares with the paper's numbers.",
        faint_rows={len(rows) - 1, len(rows) - 2},
    )
    return [Figure(plots.similarity_bars(rows)), table]


def _maps(data: RunData) -> list[Block]:
    num_items = data.config.report.tsne_items
    semantic, fusion, lightgcn = (data.folder(title) for title in ("semantic", "fusion", "lightgcn"))
    sources = {"semantic": (semantic, "semantic")} if semantic else {}
    if fusion:
        sources |= {"collaborative": (fusion / "collaborative", "fusion"), "integrated": (fusion, "fusion")}
    else:
        sources |= {"collaborative": (lightgcn, "lightgcn")} if lightgcn else {}
        coded = data.folder(IDENTIFIERS)
        title = "quantised" if data.config.identifiers.tokenizer in ("rqvae", "residual_kmeans") else "joint"
        sources |= {title: (coded, IDENTIFIERS)} if coded else {}
    sources = {title: source for title, source in sources.items() if (source[0] / ARRAY).exists()}
    if num_items < 10 or not sources:
        return []
    tables = {title: EmbeddingStore(folder) for title, (folder, _) in sources.items()}
    keys = {title: data.key(stage) for title, (_, stage) in sources.items()}
    maps = tsne_maps(tables, keys, data.run.path, num_items, data.config.seed)
    caption = (
        f"t-SNE of {len(maps[0].points):,} items; colours are the 10 k-means clusters of each table by itself "
        "(the paper's Figure 5). Unit rows, perplexity 30."
    )
    return [Figure(plots.maps(maps), caption)]


def data_section(data: RunData) -> Section | None:
    """Statistics of the catalog, and what was dropped."""
    blocks: list[Block] = []
    stats = data.json("catalog", "stats.json")
    if stats:
        counts = {k: v for k, v in stats.items() if k != "input"}
        blocks.append(_statistics(data, counts))
    ledger = data.json("catalog", "ledger.json")
    if ledger is not None:
        rows = [
            [reason.replace("_", " "), action, plain(count)]
            for reason, actions in ledger.get("counts", {}).items()
            for action, count in actions.items()
        ]
        if rows:
            caption = f"Ledger: input rows that were dropped or stand out, {plain(ledger.get('total'))} in all."
            blocks.append(Table(["reason", "action", "rows"], rows, caption, text_columns={0, 1}))
        else:
            blocks.append(Text("Ledger: empty, no input row was faulty."))
    if stats and stats.get("input"):
        blocks.append(Details("What happened to the input rows", table=pairs(stats["input"])))
    oracle = data.json("catalog", "oracle.json")
    if oracle:
        blocks.append(Details("Oracle of the synthetic catalog", table=pairs(oracle)))
    return Section("data", "Data", blocks) if blocks else None


def _statistics(data: RunData, stats: dict) -> Table:
    named = [(name.removeprefix("num "), value) for name, value in flatten(stats)]
    own = data.config.method in CSJ_METHODS
    printed = (paper.CSJ_STATISTICS if own else paper.DATA_STATISTICS).get(data.data_set or "")
    if not printed:
        return Table(["", ""], [[name, plain(value)] for name, value in named])
    rows = [[name, plain(value), plain(printed[name]) if name in printed else ""] for name, value in named]
    return Table(["", "this run", "CSJ-ID paper, 4.1" if own else "paper, Table 2"], rows)


def stages_section(data: RunData) -> Section | None:
    """Which artifact each stage is, and whether this command built it."""
    if not data.links:
        return None
    starts = [i for i, e in enumerate(data.events) if e["event"] == "run_started"]
    latest = data.events[starts[-1] :] if starts else data.events
    built = {(e["stage"], e["key"]): e for e in data.events if e["event"] == "stage_built"}
    begun = {e["stage"]: e for e in data.events if e["event"] == "stage_started"}
    reused = {e["stage"] for e in latest if e["event"] == "stage_reused"}
    rows, total = [], 0.0
    for title, link in data.links.items():
        event = built.get((title, link["key"]))
        took = event["seconds"] if event else None
        total += took or 0.0
        state = "reused" if title in reused else "built" if event else NO_RECORD
        if event and begun.get(title, {}).get("resumed"):
            state += ", after an interruption" if state == "built" else " (built after an interruption)"
        rows.append([title, state, seconds(took), f"{link['stage']}/{link['key']}"])
    corrupt = [e for e in data.events if e["event"] == "artifact_corrupt"]
    caption = f"Stages built by this run took {seconds(total)} in all; one without a time was built by another run."
    blocks: list[Block] = [Table(["stage", "in the last command", "build time", "artifact"], rows, caption, {0, 1, 3})]
    if corrupt:
        names = ", ".join(sorted({e["stage"] for e in corrupt}))
        blocks.append(Text(f"A stored artifact was found corrupt, quarantined and rebuilt: {names}.", note=True))
    return Section("stages", "Stages", blocks)


def settings_section(data: RunData) -> Section:
    """Resolved configuration and provenance."""
    blocks: list[Block] = []
    record = dict(data.provenance)
    if record:
        command = record.get("command")
        if isinstance(command, list):
            record["command"] = " ".join(str(part) for part in command)
        packages = record.pop("packages", {})
        blocks.append(pairs({k: v for k, v in record.items() if v is not None}, text=True))
        blocks.append(Details("Package versions", table=pairs(packages, text=True)))
    blocks.append(Details("Resolved configuration (YAML)", text=data.config_text))
    return Section("settings", "Settings and provenance", blocks)
