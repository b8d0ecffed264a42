"""Catalogs from the command line: writing a synthetic one, finding and describing any."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from genrec_dist.config import load_config
from genrec_dist.errors import ConfigError


def synthesize(folder: Path, items: int, users: int, seed: int, console: Console) -> None:
    """Write a synthetic catalog and say what is in it.

    Raises:
        ConfigError: the folder is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError("output is not an empty folder", where="--out", got=folder, fix="name a new folder")
    from genrec_dist.catalog.synth import write_synthetic

    summary = write_synthetic(folder, items, users, seed)
    console.print(f"wrote {escape(str(folder))}", soft_wrap=True)
    console.print(_table({k: v for k, v in summary.items() if not isinstance(v, list)}))


def catalog_folder(
    source: Path, settings: list[str] | None, store: str | Path, runs: str | Path, command: list[str]
) -> Path:
    """Folder of a catalog artifact: `source` itself, or the one its configuration describes, built if needed.

    The build is a run of its own, `<name>.catalog`.
    """
    if source.is_dir():
        if not (source / "sequences.parquet").is_file():
            raise ConfigError(
                "not a catalog artifact",
                where=source,
                expected="items.parquet, sequences.parquet, stats.json",
                fix="raw data need a configuration: genrec data describe CONFIG",
            )
        return source
    config = load_config(source, settings)
    config.name = f"{config.name[:90]}.catalog"
    from genrec_dist.catalog.stage import catalog_stage
    from launcher.run import perform

    run = perform(config, [catalog_stage(config)], store=store, runs=runs, command=command, to_stderr=True)
    return run.artifact("catalog")


def show_description(description: dict, folder: Path, console: Console) -> None:
    """Print what `describe` found."""
    console.print(f"[bold]{escape(str(folder))}[/]", soft_wrap=True)
    console.print(_table(description["stats"]))
    if "oracle" in description:
        console.print("[bold]oracle[/] (best possible recommender of the planted structure)")
        console.print(_table(description["oracle"]))
    counts = description["ledger"]["counts"]
    console.print("[bold]ledger[/]" + ("" if counts else ": empty"))
    if counts:
        console.print(_table({r: ", ".join(f"{n:,} {action}" for action, n in c.items()) for r, c in counts.items()}))
    console.print("[bold]examples[/]")
    for item in description["items"]:
        console.print("  " + escape(f"{item['item_id']}  {item['title'] or '(no title)'}"), soft_wrap=True)
    for user in description["sequences"]:
        console.print(
            "  " + escape(f"{user['user_id']}: " + " ".join(i["item_id"] for i in user["items"])), soft_wrap=True
        )


def _table(values: dict) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in _flat(values):
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else None
        text = text or (f"{value:.4g}" if isinstance(value, float) else str(value))
        table.add_row("  " + escape(name), escape(text))
    return table


def _flat(values: dict, prefix: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for key, value in values.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return rows
