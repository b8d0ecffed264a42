"""Page of the CSJ-ID paper's section 4.4: maps of the codes by content and by behaviour, and how far they follow each.

A map is a picture; the claim is judged by numbers: of an item's 10 nearest in the quantised space, the share that
bears its label, beside the share that chance would give.
"""

from __future__ import annotations

from pathlib import Path

from genrec_dist.artifacts.embeddings import ARRAY
from genrec_dist.artifacts.reader import EmbeddingStore
from genrec_dist.studies.blocks import Block, Figure, Section, Text, percent
from genrec_dist.studies.grid import OURS, REFERENCE, Column, Grid, Row
from genrec_dist.studies.ordering import Verdict
from genrec_dist.studies.purity import Labels, behaviour_labels, content_labels, neighbour_purity, unit_rows
from genrec_dist.studies.run_data import RunData
from genrec_dist.studies.study_data import Pooled, StudyData
from genrec_dist.studies.study_page import StudyPage
from genrec_dist.studies.study_plots import LabelledMap, labelled_maps
from genrec_dist.studies.tsne import sample_items, tsne_maps

KINDS = ("content", "behaviour")
SAID = "CSJ-ID's codes cluster by content and by behaviour, semantic-only codes by content only"
Found = dict[str, dict[str, dict[int, dict]]]
"""Purity by table, kind of label and seed."""


def csj_maps(data: StudyData) -> StudyPage:
    """Section 4.4, which the paper leaves as a placeholder for its figure."""
    found: Found = {}
    panels: list[Block] = []
    for seed in data.seeds:
        source = data.of("csj_id").get(seed)
        labels = _labels(source, seed) if source else {}
        tables = _tables(data, seed) if labels else {}
        for name, (store, unit) in tables.items():
            table = unit_rows(store.read("zero")) if unit else store.read("zero")
            for kind, known in labels.items():
                found.setdefault(name, {}).setdefault(kind, {})[seed] = neighbour_purity(table, known.values, seed)
        if not panels and tables:
            stores = {name: store for name, (store, unit) in tables.items() if not unit}
            panels = _figures(data, seed, labels, stores, found)
    columns = []
    for kind in KINDS:
        columns += [Column(kind, f"same {'category' if kind == 'content' else 'cluster'}", percent)]
        columns += [Column(f"{kind} chance", "by chance", percent)]
    names = data.labels | {"text": "text embeddings", "lightgcn": "LightGCN embeddings"}
    rows = [Row(names[n], OURS if n in data.labels else REFERENCE, _row(kinds)) for n, kinds in found.items()]
    caption = (
        "Share of an item's 10 nearest items that bear its label. Codes: Euclidean distance of the quantised vectors; "
        "the embeddings that the codes were made from: cosine. Categories: the most frequent 8 of the catalog; "
        "clusters: 8 by k-means of the CSJ-ID run's LightGCN embeddings. Below a number: its 95% interval over items"
        + (f" (mean of {len(data.seeds)} seeds; their widest bounds)." if len(data.seeds) > 1 else ".")
    )
    grid = Grid("purity", "", columns, rows, caption)
    blocks: list[Block] = [*panels, grid.table()]
    if not panels:
        blocks.append(Text("Maps need the identifiers and the LightGCN embeddings of the CSJ-ID run.", note=True))
    return StudyPage(_verdict(found, data), [grid], [Section("maps", "Maps of the codes", blocks)])


def _labels(run: RunData, seed: int) -> dict[str, Labels]:
    catalog, lightgcn = run.folder("catalog"), run.folder("lightgcn")
    if catalog is None or lightgcn is None:
        return {}
    return {"content": content_labels(catalog), "behaviour": behaviour_labels(lightgcn, seed)}


def _tables(data: StudyData, seed: int) -> dict[str, tuple[EmbeddingStore, bool]]:
    """Quantised vectors of each variant, then the embeddings behind them; whether cosine is their similarity."""
    folders: dict[str, tuple[Path | None, bool]] = {
        v.name: (run.folder("identifiers"), False) for v in data.variants if (run := data.of(v.name).get(seed))
    }
    joint = data.of("csj_id")[seed]
    folders |= {"text": (joint.folder("semantic"), True), "lightgcn": (joint.folder("lightgcn"), True)}
    return {
        name: (EmbeddingStore(folder), unit)
        for name, (folder, unit) in folders.items()
        if folder is not None and (folder / ARRAY).exists()
    }


def _figures(
    data: StudyData, seed: int, labels: dict[str, Labels], stores: dict[str, EmbeddingStore], found: Found
) -> list[Block]:
    """A pair of maps a variant: the same points, coloured by content and by behaviour, with their purities."""
    num_items = data.config.report.tsne_items
    if num_items < 10 or not stores:
        return []
    keys = {name: data.of(name)[seed].key("identifiers") for name in stores}
    maps = tsne_maps(stores, keys, data.folder, num_items, seed, unit=False)
    sample = sample_items(next(iter(stores.values())).num_items, num_items, seed)
    blocks: list[Block] = []
    for drawn in maps:
        panels = []
        for kind, known in labels.items():
            title, number = f"{data.labels[drawn.title]}, by {kind}", found[drawn.title][kind][seed]
            note = f"{percent(number['purity'])} of near neighbours alike, {percent(number['chance'])} by chance"
            panels.append(LabelledMap(title, drawn.points, known.values[sample], known.names, note))
        caption = f"t-SNE of the quantised vectors of {len(sample):,} items of {data.labels[drawn.title]}, seed {seed}."
        blocks.append(Figure(labelled_maps(panels, f"map-{drawn.title.replace('_', '-')}"), caption))
    return blocks


def _pool(seeds: dict[int, dict], key: str) -> Pooled | None:
    values = {seed: one[key] for seed, one in seeds.items() if one[key] is not None}
    if not values:
        return None
    return Pooled(values, {s: tuple(seeds[s]["interval"]) for s in values} if key == "purity" else {})


def _row(kinds: dict[str, dict[int, dict]]) -> dict[str, Pooled | float | None]:
    values: dict[str, Pooled | float | None] = {}
    for kind, seeds in kinds.items():
        chance = _pool(seeds, "chance")
        values |= {kind: _pool(seeds, "purity"), f"{kind} chance": chance.mean if chance else None}
    return values


def _verdict(found: Found, data: StudyData) -> Verdict:
    """The claim holds when three of the four purities are above chance, and semantic-only by behaviour is not."""
    numbers = {(v.name, kind): _row(found.get(v.name, {})) for v in data.variants for kind in KINDS}
    records, text = [], {}
    for variant, kind in numbers:
        purity, chance = numbers[variant, kind].get(kind), numbers[variant, kind].get(f"{kind} chance")
        if not isinstance(purity, Pooled) or not isinstance(chance, float) or purity.spread is None:
            return Verdict(
                "unknown", f"Whether the paper's claim ({SAID}) holds cannot be said yet: no codes to look at."
            )
        above = bool(purity.spread[0] > chance)
        claimed = (variant, kind) != ("semantic_only", "behaviour")
        records.append(
            {
                "metric": f"{kind} purity",
                "above": variant if claimed else "chance",
                "below": "chance" if claimed else variant,
                "above_value": purity.mean if claimed else chance,
                "below_value": chance if claimed else purity.mean,
                "holds": above == claimed,
                "apart": above or bool(purity.spread[1] < chance),
            }
        )
        text[variant, kind] = f"{percent(purity.mean)} by {kind} (chance {percent(chance)})"
    held = [bool(record["holds"]) for record in records]
    holds = "yes" if all(held) else "in part" if any(held) else "no"
    words = {"yes": "holds here", "in part": "holds only in part", "no": "does not hold here"}[holds]
    parts = [f"{v.label} {' and '.join(text[v.name, kind] for kind in KINDS)}" for v in data.variants]
    tail = "" if held[-1] else _tail(numbers)
    sentence = f"The paper's claim ({SAID}) {words}; near neighbours of one label: {', '.join(parts)}{tail}."
    return Verdict(holds, sentence, records)


def _tail(numbers: dict[tuple[str, str], dict[str, Pooled | float | None]]) -> str:
    own, other = numbers["csj_id", "behaviour"]["behaviour"], numbers["semantic_only", "behaviour"]["behaviour"]
    assert isinstance(own, Pooled)
    assert isinstance(other, Pooled)
    less = "less" if other.mean < own.mean else "and no less"
    return f"; semantic-only codes follow behaviour too, {less} than CSJ-ID's"
