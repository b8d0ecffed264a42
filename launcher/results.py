"""What a run leaves for the reader: metrics.json, report, result table, recommendations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from genrec_dist.artifacts.files import read_json, write_json
from genrec_dist.config import Config
from genrec_dist.errors import ConfigError
from genrec_dist.runs import RunFolder
from genrec_dist.studies.embedding_facts import embedding_facts
from launcher.console import metrics_table
from launcher.streams import captured


def finish_run(config: Config, run: RunFolder) -> None:
    """Collect the metrics of the artifacts into metrics.json and write the report."""
    from genrec_dist import methods
    from genrec_dist.studies.report import write_report

    write_json(run.path / "metrics.json", methods.collect_metrics(config, run))
    write_report(run)


def finish_short(run: RunFolder) -> None:
    """Report of a run that ends early; metrics of an earlier one with other settings are not its own."""
    from genrec_dist.studies.report import write_report

    (run.path / "metrics.json").unlink(missing_ok=True)
    write_report(run)


def make_report(run: RunFolder) -> Path:
    """Write the report of a run again; what libraries print goes to its log.

    Raises:
        ConfigError: the run has no finished stage to report on.
    """
    if not run.links():
        raise ConfigError("nothing to report on yet", where=run.path, fix="run it first")
    with captured(run.path / "logs" / "report.log"):
        from genrec_dist.studies.report import write_report

        written = write_report(run)
    if run.mirror is not None:
        run.mirror.push()
    return written


def result_rows(metrics: dict) -> dict[str, dict[str, float]]:
    """Rows of the result table: the method under its own name first, then the references.

    Args:
        metrics: {'method': name, 'main': evaluation, 'references': {name: evaluation}}.
    """
    rows = {metrics.get("method", "method"): metrics.get("main") or {}} | metrics.get("references", {})
    return {name: find_metrics(value) for name, value in rows.items()}


def find_metrics(value: Any) -> dict[str, float]:
    """The outermost mapping in an evaluation that holds 'recall@k' numbers."""
    if not isinstance(value, dict):
        return {}
    if any(str(key).startswith("recall@") for key in value):
        return value
    return next(filter(None, map(find_metrics, value.values())), {})


def show_result(run: RunFolder, console: Console) -> None:
    """Short result table, and where the rest is. A synthetic catalog knows its best possible recommender."""
    metrics = read_json(run.path / "metrics.json")
    if "embeddings" in metrics:
        _show_embeddings(metrics["embeddings"], run, console)
        return
    rows = result_rows(metrics)
    oracle = run.artifact("catalog") / "oracle.json"
    if oracle.exists():
        rows["oracle"] = find_metrics(read_json(oracle))
    console.print(metrics_table(rows, title="Test users, full ranking"))
    console.print(f"report: {escape(str(run.path / 'report.html'))}", soft_wrap=True)


def _show_embeddings(found: dict, run: RunFolder, console: Console) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in embedding_facts(found):
        table.add_row("  " + name, escape(value))
    console.print(table)
    console.print(f"embeddings: {escape(str(run.artifact('semantic')))}", soft_wrap=True)
    console.print(f"report: {escape(str(run.path / 'report.html'))}", soft_wrap=True)


def recommend_items(run: RunFolder, history: str, top_k: int, device: str) -> list[dict]:
    """Recommendations of a finished run.

    Args:
        history: item ids separated by commas, oldest first.

    Raises:
        ConfigError: empty history.
    """
    ids = [part.strip() for part in history.split(",") if part.strip()]
    if not ids:
        raise ConfigError("empty history", where="--history", got=repr(history), expected="item ids: ID,ID,...")
    with captured(run.path / "logs" / "recommend.log"):
        from genrec_dist.generator.recommend import recommend

        return recommend(run, ids, top_k, device)


def show_recommendations(items: list[dict], console: Console) -> None:
    """Rank, item id, score and title, one item a line."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, justify in (("rank", "right"), ("item", "left"), ("score", "right"), ("title", "left")):
        table.add_column(name, justify=justify, no_wrap=name != "title")  # type: ignore[arg-type]
    for rank, item in enumerate(items, start=1):
        table.add_row(str(rank), escape(item["item_id"]), f"{item['score']:.4f}", escape(item["title"] or ""))
    console.print(table)
