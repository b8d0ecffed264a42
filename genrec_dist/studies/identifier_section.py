"""Section of the report on item identifiers: training and losses of an RQ-VAE, curves of k-means, uniqueness, use of
the codes, examples.

Reads through RunData; whatever an artifact does not hold is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genrec_dist.studies import plots
from genrec_dist.studies.blocks import NONE, Block, Details, Figure, Section, Table, Text, percent, plain
from genrec_dist.studies.run_data import RunData

STAGE = "identifiers"
NUM_EXAMPLES = 6
KMEANS = "kmeans.jsonl"
TABLE_CAPTION = (
    "A node is a code prefix, its size the items below it; entropy in bits; explained: share of the variance."
)


def identifiers_section(data: RunData) -> Section | None:
    """How the codes were learned, what they are like, and a few items with theirs."""
    quality = data.json("identifiers", "quality.json")
    if not quality:
        return None
    kept = quality["neighbour_preservation"]
    sharing = round((1 - quality["unique_fraction"]) * quality["num_items"])
    summary = (
        f"{quality['num_items']:,} items, {percent(quality['unique_fraction'], 2)} with a code of their own "
        f"({sharing:,} share one), mean code length {quality['mean_depth']:.2f}, "
        f"K = {quality['num_clusters']}. "
    )
    if kept["recall"] is not None:
        summary += (
            f"{percent(kept['recall'])} of an item's {kept['neighbours']} nearest neighbours lie in its level-1 "
            f"cluster (by chance: {percent(kept['chance'])}; {kept['queries']:,} items)."
        )
    head = ["level", "items", "codes", "nodes", "entropy", "perplexity / K"]
    head += ["size min", "median", "mean", "max", "explained"]
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
            ("≈ " if "variance_sample" in level else "") + percent(level["variance_explained"]),
        ]
        for level in quality["levels"]
    ]
    blocks: list[Block] = [Text(summary), *_learned(data), *_kmeans(data), *_uniqueness(quality)]
    caption = "Entropy is log₂ K, dotted, where all K codes are equally frequent; perplexity is 2 to the entropy."
    blocks += [Figure(plots.codebook_levels(quality), caption), Figure(plots.codebook_sizes(quality))]
    blocks.append(Table(head, rows, TABLE_CAPTION + _sampled(quality)))
    examples = _example_codes(data)
    if examples:
        blocks.append(examples)
    return Section("identifiers", "Item identifiers", blocks)


def _learned(data: RunData) -> list[Block]:
    """Training curve and losses of an RQ-VAE."""
    blocks: list[Block] = []
    records = data.curves.get(STAGE, [])
    svg = plots.stage_curves(records, "tokenizer") if records else None
    if svg is not None:
        scored = [r for r in records if r.get("explained") is not None]
        caption = "Training of the tokenizer. Explained: share of the inputs' variance that the codes give back"
        caption += f"; best {percent(max(r['explained'] for r in scored))}, dotted." if scored else "."
        blocks.append(Figure(svg, caption))
    found = data.json(STAGE, "rqvae.json") or {}
    losses, explained = found.get("losses", {}), found.get("explained", {})
    rows = [[name, plain(value), percent(explained.get(name))] for name, value in losses.items()]
    if rows:
        caption = "Mean squared errors a dimension in the units of the inputs, of the final codes."
        blocks.append(Table(["reconstruction", "loss", "variance explained"], rows, caption))
    return blocks


def _sampled(quality: dict) -> str:
    """Which levels' variance is estimated."""
    samples = {level["level"]: level["variance_sample"] for level in quality["levels"] if "variance_sample" in level}
    if not samples:
        return ""
    shares = ", ".join(f"level {level} {percent(share)}" for level, share in samples.items())
    return f" ≈: estimated from some of the nodes of two items or more; share of the items in them: {shares}."


@dataclass
class _Splits:
    """What k-means did at one level, over all its nodes; those of identical rows count as nodes only."""

    nodes: int = 0
    rows: int = 0
    clustered: int = 0
    iterations: int = 0
    refilled: int = 0
    first: float = 0.0
    last: float = 0.0

    def add(self, record: dict) -> None:
        self.nodes += 1
        self.rows += record["rows"]
        objective = record.get("objective")
        if objective:
            self.clustered += 1
            self.iterations += len(objective)
            self.refilled += sum(record["splits"])
            self.first += objective[0]
            self.last += objective[-1]

    def cells(self) -> list[str]:
        iterations = f"{self.iterations / self.clustered:.1f}" if self.clustered else NONE
        share = percent(self.last / self.first if self.first else None)
        return [plain(self.nodes), plain(self.rows), iterations, plain(self.refilled), share]


def _kmeans(data: RunData) -> list[Block]:
    """Curves of the first split, and what became of all of them by level."""
    folder = data.folder(STAGE)
    if folder is None or not (folder / KMEANS).is_file():
        return []
    blocks: list[Block] = []
    levels: dict[int, _Splits] = {}
    for record in _records(folder / KMEANS):
        above = len(record["path"]) if "path" in record else record["level"]  # residual: one k-means a level
        levels.setdefault(above + 1, _Splits()).add(record)
        if above == 0 and record.get("objective"):
            svg = plots.kmeans_curves(record["objective"], record["imbalance"])
            blocks.append(Figure(svg, f"k-means of all {plain(record['rows'])} items into the level-1 clusters."))
    head = ["level", "nodes split", "rows", "mean iterations", "clusters refilled", "objective, last / first"]
    rows = [[str(level), *splits.cells()] for level, splits in sorted(levels.items())]
    caption = (
        "k-means by the level of codes that it makes. A cluster that lost all its rows is refilled; objectives are "
    )
    caption += "summed over the level's nodes, after the first iteration and after the last."
    return [*blocks, Table(head, rows, caption)] if rows else []


def _records(file: Path) -> Iterator[dict]:
    """Records of a JSON Lines file one at a time: a large catalog has one for every node."""
    with open(file, encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _uniqueness(quality: dict) -> list[Block]:
    """Distinct code sequences before collisions were resolved, and after."""
    before, resolved = quality.get("before_collisions"), quality.get("collision_handling")
    if not before or not resolved:
        return []
    rows = [
        ["before collisions are resolved", plain(before["unique_codes"]), percent(before["coverage"], 2)],
        ["after", plain(round(resolved["after"] * quality["num_items"])), percent(resolved["after"], 2)],
    ]
    caption = f"Collisions are resolved by {resolved['method']}: {plain(resolved['moved'])} items get other codes."
    return [Table(["", "distinct codes", "of the items"], rows, caption)]


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
