"""What every command shares: printing failures and results, tables of metrics."""

from __future__ import annotations

import functools
import json
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from genrec_dist.errors import EXIT_BUG
from launcher.failures import Failure, Stopped, explain

CUTOFFS = (5, 10, 20)


def out() -> Console:
    """Console on stdout."""
    return Console(highlight=False)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def show_failure(failure: Failure) -> None:
    """Print a failure on stderr, without a traceback."""
    console = Console(stderr=True, highlight=False)
    first, _, rest = failure.text.partition("\n")
    console.print(f"[bold red]error:[/] {escape(first)}", soft_wrap=True)
    if rest:
        console.print(escape(rest), soft_wrap=True)
    if failure.log is not None:
        console.print(f"  log: {escape(str(failure.log))}", soft_wrap=True)


def guarded(command: Callable) -> Callable:
    """Decorator of commands: any error becomes a short message and its exit code."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, BrokenPipeError):
            raise
        except Stopped as stopped:
            failure = stopped.failure
        except (Exception, KeyboardInterrupt) as error:
            failure = explain(error)
            if failure.exit_code == EXIT_BUG:
                failure.log = _write_traceback()
        show_failure(failure)
        raise typer.Exit(failure.exit_code)

    return wrapper


def _write_traceback() -> Path:
    with tempfile.NamedTemporaryFile("w", prefix="genrec-", suffix=".log", delete=False) as file:
        traceback.print_exc(file=file)
    return Path(file.name)


def show_whole(table: Table, console: Console) -> None:
    """Print a table without cutting a cell, on however narrow a terminal."""
    here = console.width
    needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    console.width = max(here, needed)
    console.print(table, crop=False, soft_wrap=False)
    console.width = here


def metrics_table(rows: dict[str, dict[str, float]], title: str = "") -> Table:
    """Recall and NDCG at 5, 10 and 20, one row a method; a missing number stays empty.

    Args:
        rows: method -> {'recall@5': ..., 'ndcg@5': ...}.
    """
    names = [f"{metric}@{k}" for metric in ("recall", "ndcg") for k in CUTOFFS]
    table = Table(title=title or None, title_justify="left", header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for name in names:
        table.add_column(name.replace("recall", "Recall").replace("ndcg", "NDCG"), justify="right")
    for method, values in rows.items():
        table.add_row(method, *(f"{values[n]:.4f}" if values.get(n) is not None else "" for n in names))
    return table
