"""Section of the report on item identifiers: training and losses of an RQ-VAE, uniqueness, use of the codes, examples.

Reads through RunData; whatever an artifact does not hold is left out.
"""

from __future__ import annotations

import numpy as np

from genrec_dist.studies import plots
from genrec_dist.studies.blocks import Block, Details, Figure, Section, Table, Text, percent, plain
from genrec_dist.studies.run_data import RunData

STAGE = "identifiers"
NUM_EXAMPLES = 6


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
    blocks: list[Block] = [Text(summary), *_learned(data), *_uniqueness(quality)]
    blocks += [Figure(plots.codebook(quality)), Table(head, rows)]
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
