"""Sections of the report that speak of how the result came about: training, identifiers, embeddings, data, stages,
settings. Reads through RunData; only the t-SNE cache is written.
"""

from __future__ import annotations

from statistics import median

import numpy as np

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
from genrec_dist.studies.run_data import RunData
from genrec_dist.studies.tsne import tsne_maps

NUM_EXAMPLES = 6
NO_RECORD = "no record"


def training_section(data: RunData) -> Section | None:
    """Curves of every training stage."""
    blocks = []
    for i, (stage, records) in enumerate(data.curves.items()):
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


def identifiers_section(data: RunData) -> Section | None:
    """Codebook quality and a few items with their codes."""
    quality = data.json("identifiers", "quality.json")
    if not quality:
        return None
    kept = quality["neighbour_preservation"]
    summary = (
        f"{quality['num_items']:,} items, {percent(quality['unique_fraction'], 2)} with a code of their own "
        f"({quality['collisions']:,} share one), mean code length {quality['mean_depth']:.2f}, "
        f"K = {quality['num_clusters']}. "
    )
    if kept["recall"] is not None:
        summary += (
            f"{percent(kept['recall'])} of an item's {kept['neighbours']} nearest neighbours lie in its level-1 "
            f"cluster (by chance: {percent(kept['chance'])}; {kept['queries']:,} items)."
        )
    head = ["level", "items", "codes used", "nodes", "entropy, bits", "perplexity / K"]
    head += ["size min", "median", "mean", "max", "variance explained"]
    rows = [
        [
            str(level["level"]),
            plain(level["items"]),
            plain(level["codes_used"]),
            plain(level["nodes"]),
            f"{level['entropy_bits']:.2f}",
            f"{level['normalised_perplexity']:.3f}",
            plain(level["size_min"]),
            f"{level['size_median']:g}",
            f"{level['size_mean']:.1f}",
            plain(level["size_max"]),
            percent(level["variance_explained"]),
        ]
        for level in quality["levels"]
    ]
    blocks: list[Block] = [Text(summary), Figure(plots.codebook(quality)), Table(head, rows)]
    examples = _example_codes(data)
    if examples:
        blocks.append(examples)
    return Section("identifiers", "Item identifiers", blocks)


def _example_codes(data: RunData) -> Details | None:
    """Items below one small inner node: what the codebook thinks is alike."""
    from genrec_dist.identifiers.trie import FILE, Trie

    codebook, catalog = data.folder("identifiers"), data.folder("catalog")
    if codebook is None or catalog is None or not (codebook / FILE).is_file():
        return None
    import pyarrow.parquet as pq

    items = pq.read_table(catalog / "items.parquet", columns=["item_id", "title", "brand"])
    trie = Trie.load(codebook)
    nodes, sizes = np.unique(trie.item_path[:, 0], return_counts=True)
    rows = []
    for node in nodes[np.argsort(-sizes, kind="stable")][:3]:  # the largest level-1 clusters
        for item in np.flatnonzero(trie.item_path[:, 0] == node)[:NUM_EXAMPLES]:
            row = items.slice(int(item), 1).to_pylist()[0]
            code = " ".join(str(c) for c in trie.codes[item, : trie.depth[item]])
            rows.append([code, row["item_id"], row["title"] or "–", row["brand"] or "–"])
    table = Table(["code", "item", "title", "brand"], rows, text_columns={0, 1, 2, 3})
    return Details(f"Example items of the three largest level-1 clusters ({len(rows)})", table=table)


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
    semantic, fusion = data.folder("semantic"), data.folder("fusion")
    sources = {"semantic": (semantic, "semantic")} if semantic else {}
    if fusion:
        sources |= {"collaborative": (fusion / "collaborative", "fusion"), "integrated": (fusion, "fusion")}
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
    printed = paper.DATA_STATISTICS.get(data.data_set or "")
    if not printed:
        return Table(["", ""], [[name, plain(value)] for name, value in named])
    rows = [[name, plain(value), plain(printed[name]) if name in printed else ""] for name, value in named]
    return Table(["", "this run", "paper, Table 2"], rows)


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
