"""The commands of `genrec data`: catalogs, embeddings and codes outside a run."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from launcher.console import guarded, out, print_json
from launcher.options import RUNS, STORE, AsJson, Overrides, RunsPath, StorePath

app = typer.Typer(
    no_args_is_help=True, help="Make and describe catalogs, verify artifacts, move embeddings, extend codes."
)


class Dtype(StrEnum):
    """How embeddings are stored."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@app.command("synth")
@guarded
def data_synth(
    items: Annotated[int, typer.Option("--items", min=1, help="Number of items.", show_default=False)],
    users: Annotated[int, typer.Option("--users", min=1, help="Number of users.", show_default=False)],
    folder: Annotated[Path, typer.Option("--out", help="Folder to write into.", show_default=False)],
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same files.")] = 0,
) -> None:
    """Write a synthetic catalog with a planted structure, as raw Amazon-2014 files."""
    from launcher.data import synthesize

    synthesize(folder, items, users, seed, out())


@app.command("describe")
@guarded
def data_describe(
    source: Annotated[
        Path, typer.Argument(metavar="CONFIG_OR_FOLDER", help="YAML file, or a catalog artifact.", show_default=False)
    ],
    settings: Overrides = None,
    json: AsJson = False,
    store: StorePath = STORE,
    runs: RunsPath = RUNS,
) -> None:
    """Statistics, ledger and examples of a catalog; a configuration's catalog is built or reused."""
    from launcher.data import catalog_folder, show_description

    folder = catalog_folder(source, settings, store, runs, sys.argv)
    from genrec_dist.catalog.describe import describe

    description = describe(folder)
    if json:
        print_json(description)
    else:
        show_description(description, folder, out())


@app.command("verify")
@guarded
def data_verify(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="An artifact's folder, a store, or a run.", show_default=False)
    ],
    runs: RunsPath = RUNS,
) -> None:
    """Check artifacts: every checksum, and of embeddings that each row is a vector or a recorded failure."""
    from launcher.embeddings import verify

    verify(target, runs, out())


@app.command("export")
@guarded
def data_export(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A run, or a folder with embeddings.", show_default=False)
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help=".npy, .parquet or .safetensors.", show_default=False)],
    stage: Annotated[str, typer.Option("--stage", help="Stage of the run.")] = "semantic",
    runs: RunsPath = RUNS,
) -> None:
    """Write embeddings to one file; row = item index. An item without an embedding is NaN (null in Parquet)."""
    from launcher.embeddings import export

    export(source, file, stage, runs, out())


@app.command("import")
@guarded
def data_import(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=".npy, .parquet or .safetensors.", show_default=False)],
    folder: Annotated[Path, typer.Option("--out", help="Folder of the new artifact.", show_default=False)],
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Of the stored values.")] = Dtype.float32,
) -> None:
    """Make an embedding artifact of a file. (A run takes the file itself: semantic.engine=precomputed.)"""
    from launcher.embeddings import import_file

    import_file(file, folder, dtype.value, out())


@app.command("extend")
@guarded
def data_extend(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A run, or a folder with codes (identifiers).", show_default=False)
    ],
    embeddings: Annotated[
        str,
        typer.Argument(metavar="EMBEDDINGS", help="A run, or a folder with the new items' rows.", show_default=False),
    ],
    folder: Annotated[Path, typer.Option("--out", help="Folder of the extended codes.", show_default=False)],
    skip: Annotated[int, typer.Option("--skip", min=0, help="First rows, of items that have codes already.")] = 0,
    stage: Annotated[str, typer.Option("--stage", help="Stage of the run that has the embeddings.")] = "semantic",
    runs: RunsPath = RUNS,
) -> None:
    """Give new items codes in a tree of hierarchical k-means. No old code changes; nothing is trained."""
    from launcher.codes import extend

    extend(source, embeddings, folder, skip, stage, runs, out())
