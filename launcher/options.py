"""Options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Device(StrEnum):
    """Where a command computes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, see configs/.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, e.g. fusion.dim=64. Repeatable."),
]
StorePath = Annotated[
    str,
    typer.Option(
        "--store", metavar="PLACE", help="Artifact store: a folder or s3://BUCKET/PREFIX.", envvar="GENREC_STORE"
    ),
]
RunsPath = Annotated[
    str, typer.Option("--runs", metavar="PLACE", help="All runs: a folder or s3://BUCKET/PREFIX.", envvar="GENREC_RUNS")
]
STORE, RUNS = "store", "runs"
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name, folder or URL of a run.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
