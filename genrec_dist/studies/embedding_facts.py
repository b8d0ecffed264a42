"""What the semantic stage's report says, in words: for the terminal and the HTML report."""

from __future__ import annotations


def embedding_facts(report: dict) -> list[tuple[str, str]]:
    """Name and value, in the order a reader wants them.

    Args:
        report: report.json of a semantic artifact.
    """
    items = report["num_items"]
    facts = [
        ("model", f"{report['model']} ({report['engine']})"),
        ("items", f"{items:,}"),
        (
            "vectors",
            f"{items - report['num_failed']:,} of width {report['dim']}, {report.get('store_dtype', 'float32')}",
        ),
        (
            "without a vector",
            f"{report['num_failed']:,}, each in ledger.parquet with its cause" if report["num_failed"] else "none",
        ),
    ]
    if report["engine"] == "precomputed":
        return [*facts, ("unknown ids in the file", f"{report['num_unknown_items']:,}")]
    copied = report.get("num_copied", 0)
    if copied:
        facts.append(("copied", f"{copied:,} from {', '.join(report['copied_from'])}"))
    if items - copied:
        mean = report["num_tokens"] / max(1, items - copied)
        facts.append(("tokens", f"{report['num_tokens']:,}, {mean:.1f} an item"))
    cut = report["num_truncated"]
    facts.append(("cut off", f"{cut:,} texts at {report['max_tokens']} tokens ({cut / items:.2%})"))
    timing = report["timing"]
    if timing["items_per_second"]:
        facts.append(
            (
                "speed",
                f"{timing['items_per_second']:,.0f} items/s, {timing['tokens_per_second']:,.0f} tokens/s, "
                f"{timing['workers']} worker(s), {timing['seconds']:.1f} s after {timing['startup_seconds']:.1f} s "
                "of starting",
            )
        )
    return facts
