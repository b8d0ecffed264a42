"""`genrec diagnose`: where a finished run's generator loses its users' next items, as two tables."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from genrec_dist.runs import RunFolder
from launcher.console import metrics_table, show_whole
from launcher.streams import captured

NAMES = {
    "stage_one": "Stage I, all items",
    "token": "distillation token, all items",
    "exact": "codes, all items",
    "beam_of_codes": "codes, beam",
    "beam": "beam as evaluated",
}


def examine(run: RunFolder, users: int, split: str, device: str, console: Console | None) -> dict:
    """See `genrec_dist.studies.diagnosis.diagnose_run`; progress goes to `console`, what libraries print to a log."""
    from genrec_dist.studies.diagnosis import diagnose_run

    with captured(run.path / "logs" / "diagnose.log"):
        if console is None:
            return diagnose_run(run, users, split, device)
        with console.status("scoring every item") as status:
            return diagnose_run(
                run, users, split, device, lambda done, total: status.update(f"{done:,} of {total:,} users")
            )


def show_diagnosis(found: dict, console: Console) -> None:
    """Both tables."""
    title = f"{found['users']:,} users, {found['split']} items, beam {found['beam_width']}"
    rows = {label: found["rankings"][name] for name, label in NAMES.items() if name in found["rankings"]}
    show_whole(metrics_table(rows, title), console)
    table = Table(
        title="Codes, by their probabilities over all items", title_justify="left", header_style="bold", box=SIMPLE_HEAD
    )
    for name in ("level", "prefixes", "prefix in top 10", "code in top 10", "Recall@10 behind it", "NDCG@10 behind it"):
        table.add_column(name, justify="right")
    start = found["rankings"]["exact"]
    table.add_row("0", "1", "", "", f"{start['recall@10']:.4f}", f"{start['ndcg@10']:.4f}")
    for level in found["levels"]:
        prefix, code, items = (level[kind] for kind in ("prefix", "code", "items"))
        shown = (prefix["recall@10"], code["recall@10"], items["recall@10"], items["ndcg@10"])
        table.add_row(str(level["level"]), f"{level['nodes']:,}", *(f"{value:.4f}" for value in shown))
    show_whole(table, console)
