"""Sections of the report that speak of results: headline, metrics, ranks, beam check. Reads through RunData only."""

from __future__ import annotations

from genrec_dist.config import WITHOUT_EVALUATION
from genrec_dist.studies import paper, plots
from genrec_dist.studies.blocks import (
    Block,
    Cell,
    Figure,
    Section,
    Table,
    Text,
    Tile,
    interval,
    number,
    percent,
    seconds,
)
from genrec_dist.studies.run_data import RunData

CSJ_METHODS = {"csj_id": "csj_id", "semantic_id": "semantic_only"}
"""Methods of the CSJ-ID paper, by their name in its table."""
HEADLINE = ("recall@10", "recall@20", "ndcg@10", "ndcg@20")
ORDER_NOTES = {
    "time": (
        "Order: time. Interactions are sorted by timestamp, then item id, as in most published work. PRORec's paper "
        "does not state its order; it takes its baselines from EAGER, whose public code zeroes the Amazon timestamps, "
        "which leaves the order of the file. The two orders give different numbers for the same model, so the "
        "paper's rows are context, not a like-for-like target."
    ),
    "file": (
        "Order: file. Interactions are sorted by item id alone, which is what follows when timestamps are zeroed, as "
        "the public EAGER code does for Amazon. It is the easier order: do not compare these numbers with results "
        "in order of time. PRORec's paper does not state which order its Table 3 used."
    ),
}


def metric_label(name: str) -> str:
    """'recall@10' as it is printed."""
    return name.replace("recall", "Recall").replace("ndcg", "NDCG")


def cutoffs(metrics: dict) -> list[int]:
    """Values of k for which there is a recall."""
    return sorted(int(name.split("@")[1]) for name in metrics if name.startswith("recall@"))


def headline_tiles(data: RunData) -> list[Tile]:
    """The few numbers at the top of the page."""
    if not data.main:
        return []
    test, bounds = data.main["test"], data.main.get("intervals") or {}
    tiles = []
    for name in ("recall@10", "ndcg@10"):
        if name in test:
            span = interval(bounds.get(name))
            tiles.append(Tile(metric_label(name), number(test[name]), f"95% interval {span}" if span else ""))
    if data.oracle.get("recall@10") and "recall@10" in test:
        oracle = data.oracle["recall@10"]
        tiles.append(
            Tile("of the oracle's Recall@10", percent(test["recall@10"] / oracle), f"the oracle reaches {oracle:.4f}")
        )
    ties = data.main.get("without_ties") or {}
    if "recall@10" in ties:
        tiles.append(
            Tile("Recall@10 without ties", number(ties["recall@10"]), f"{ties['users']:,} users, no same-day targets")
        )
    return tiles


def protocol(data: RunData) -> str:
    """How the headline was measured, in one line."""
    if data.config.method in WITHOUT_EVALUATION:
        return f"method {data.config.method} · embeddings of a catalog's items, no model is trained or evaluated"
    main = data.main or {}
    parts = [f"method {data.config.method}", f"order {main.get('order') or data.config.catalog.order}"]
    if main.get("users"):
        parts.append(f"{main['users']:,} users")
    if main.get("beam_width"):
        parts.append(f"beam width {main['beam_width']}")
        parts.append(f"mix weight {main.get('mix_weight', 0):g}")
    parts += [f"seed {data.config.seed}", "leave-one-out, all items ranked, seen items kept"]
    return " · ".join(parts)


def comparison(data: RunData) -> Section | None:
    """The result beside the references, the paper's row and the oracle."""
    if not data.main:
        return None
    entries = [_entry(f"this run ({data.config.method})", data.main, "run")]
    entries += [_entry(name.replace("_", " "), metrics, "reference") for name, metrics in data.references.items()]
    printed = paper.PERFORMANCE.get(data.data_set or "", {})
    for method in ("SASRec", "TIGER", "EAGER", "PRORec"):
        if method in printed:
            label = f"{method}, paper Table 3"
            entries.append({"label": label, "values": printed[method], "intervals": {}, "kind": "paper"})
    own = _own_paper(data)
    if own:
        entries.append({"label": own[0], "values": own[1], "intervals": {}, "kind": "paper"})
    names = [n for n in HEADLINE if n in data.main["test"]] or list(data.main["test"])[:4]
    rows = [
        [e["label"]] + [Cell(number(e["values"].get(n)), interval(e["intervals"].get(n))) for n in names]
        for e in entries
    ]
    if data.oracle:
        rows.append(["oracle (planted structure)"] + [number(data.oracle.get(n)) for n in names])
    faint = {i for i, entry in enumerate(entries) if entry["kind"] == "paper"}
    table = Table(["", *map(metric_label, names)], rows, "Below a number: 95% bootstrap interval.")
    table.strong_rows, table.faint_rows = {0}, faint
    shown = [n for n in ("recall@10", "ndcg@10") if n in names] or names[:2]
    blocks: list[Block] = [Figure(plots.headline(entries, shown, data.oracle)), table]
    note = " ".join(_sentences(data, printed))
    if note:
        blocks.insert(0, Text(note))
    if printed:
        order = data.main.get("order") or data.config.catalog.order
        note = f" Its own paper: {paper.CSJ_PROTOCOL}" if own else ""
        blocks.append(Text(ORDER_NOTES[order] + note + _decoding_note(data.main), note=True))
    return Section("result", "Result", blocks)


def _entry(label: str, metrics: dict, kind: str) -> dict:
    return {"label": label, "values": metrics["test"], "intervals": metrics.get("intervals") or {}, "kind": kind}


def _own_paper(data: RunData) -> tuple[str, dict[str, float]] | None:
    """What the CSJ-ID paper prints of a method of its own; it knows Beauty only."""
    method = CSJ_METHODS.get(data.config.method)
    if method is None or data.data_set != "beauty":
        return None
    label = "CSJ-ID" if method == "csj_id" else "Semantic-only"
    return f"{label}, its own paper (4.2)", paper.CSJ_MAIN[method]


def _sentences(data: RunData, printed: dict) -> list[str]:
    name = "recall@10"
    value = (data.main or {"test": {}})["test"].get(name)
    if value is None:
        return []
    said = []
    for reference, metrics in data.references.items():
        other = metrics["test"].get(name)
        if other:
            said.append(f"{value / other:.2f} × {reference.replace('_', ' ')} ({other:.4f})")
    own = _own_paper(data)
    if own:
        said.append(f"{value / own[1][name]:.2f} × its own paper's ({own[1][name]:.4f}; see the note below)")
    elif "PRORec" in printed:
        other = printed["PRORec"][name]
        said.append(f"{value / other:.2f} × the paper's PRORec ({other:.4f}; see the note on order below)")
    if data.oracle.get(name):
        said.append(f"{percent(value / data.oracle[name])} of the oracle ({data.oracle[name]:.4f})")
    return [f"Recall@10 is {value:.4f}: {', '.join(said)}."] if said else []


def _decoding_note(main: dict) -> str:
    if not main.get("beam_width"):
        return ""
    mix = main.get("mix_weight") or 0
    mixed = f"mixed with the distillation token's dense score at weight {mix:g}" if mix else "without dense score"
    return f" This run decodes with beam width {main['beam_width']}, {mixed}."


def metrics_section(data: RunData) -> Section | None:
    """Every metric on every subset of users and variant of the protocol."""
    main = data.main
    if not main:
        return None
    variants = [("test", main["test"], main.get("users"), main.get("intervals") or {})]
    for key, label in (
        ("without_ties", "test, users without same-day ties"),
        ("masked_seen", "test, seen items masked"),
        ("without_mix", "test, beam alone (no dense score)"),
        ("valid", "validation"),
    ):
        found = main.get(key)
        if found and cutoffs(found):
            variants.append((label, found, found.get("users", main.get("users")), {}))
    names = [f"{kind}@{k}" for kind in ("recall", "ndcg") for k in cutoffs(main["test"])]
    rows = [
        [label, f"{users:,}" if users else ""]
        + [Cell(number(values.get(n)), interval(bounds.get(n), 3)) for n in names]
        for label, values, users, bounds in variants
    ]
    table = Table(["", "users", *map(metric_label, names)], rows, strong_rows={0})
    blocks: list[Block] = [table]
    blocks.append(
        Text(
            "A held-out item counts only when the list holds that very item. Ties: users whose validation and test "
            "item bear the same timestamp, so that their order is not knowable. Masked: items of the history are "
            "removed from the list, which in data without repeats is free lift, so it never is the headline.",
            note=True,
        )
    )
    if main.get("seconds") is not None:
        blocks.append(Text(f"Evaluation took {seconds(main['seconds'])}."))
    return Section("metrics", "Metrics", blocks)


def beam_section(data: RunData) -> Section | None:
    """The beam against scoring the whole catalog, on a sample of users."""
    exact = (data.main or {}).get("exact")
    if not exact:
        return None
    names = [f"{kind}@{k}" for kind in ("recall", "ndcg") for k in cutoffs(exact["exact"])]
    rows = [
        [label] + [number(exact[key].get(n)) for n in names] for key, label in (("beam", "beam"), ("exact", "exact"))
    ]
    beam, full = exact["beam"], exact["exact"]
    rows.append(["difference"] + [f"{beam[n] - full[n]:+.4f}" if n in beam and n in full else "" for n in names])
    text = f"{exact['users']:,} users, every item of the catalog scored. "
    if exact.get("top10_agreement") is not None:
        text += f"On average {percent(exact['top10_agreement'])} of the beam's top 10 are in the exact top 10."
    return Section(
        "beam", "Beam search against exact scoring", [Text(text), Table(["", *map(metric_label, names)], rows)]
    )


def ranks_section(data: RunData) -> Section | None:
    """Recall over k, and where the held-out items stand."""
    ranks = {method.replace("_", " "): values for method, values in data.ranks.items() if len(values)}
    if not ranks:
        return None
    caption = "Left: Recall@k as the list grows. Right: rank of the held-out item; the rest is not in the list."
    return Section("ranks", "Ranks", [Figure(plots.ranks(ranks), caption)])
