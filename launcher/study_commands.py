"""The commands `genrec study`, `genrec reproduce` and `genrec sweep`: many runs, one page."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from launcher.console import guarded, out
from launcher.options import RUNS, STORE, Overrides, RunsPath, StorePath

app = typer.Typer()


class Paper(StrEnum):
    """Papers whose tables and figures are studies."""

    prorec = "prorec"
    csj_id = "csj_id"


class DataSets(StrEnum):
    """Data sets of a reproduction."""

    beauty = "beauty"
    sports = "sports"
    toys = "toys"
    all = "all"


class Order(StrEnum):
    """Orders of interactions."""

    time = "time"
    file = "file"
    both = "both"


class DataSet(StrEnum):
    """Data sets with configurations of their own."""

    beauty = "beauty"
    sports = "sports"
    toys = "toys"


Parallel = Annotated[
    int,
    typer.Option("--parallel", metavar="N", min=1, help="Runs at once, as child processes; runtime.backend=local."),
]
ReportOnly = Annotated[bool, typer.Option("--report-only", help="Run nothing; write the page of the runs that exist.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the runs and what they build; start nothing.")]
Encoders = Annotated[
    list[str] | None,
    typer.Option(
        "--encoder", metavar="NAME=PATH", help="Study encoders: weights, or a file of finished embeddings. Repeatable."
    ),
]


def _folders(store: str, runs: str) -> tuple[Path, Path]:
    """Both places as folders, which is all that these commands can use."""
    from genrec_dist.artifacts.places import folder_only

    return folder_only(store, "--store"), folder_only(runs, "--runs")


@app.command()
@guarded
def study(
    name: Annotated[
        str, typer.Argument(metavar="STUDY", help="Name of a study, see docs/studies.md.", show_default=False)
    ],
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="YAML file; default: the study's own.", show_default=False)
    ] = None,
    settings: Overrides = None,
    data: Annotated[DataSet | None, typer.Option("--data", help="The study's own configuration of a data set.")] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", metavar="0,1,2", help="Default: the configuration's seed.")
    ] = None,
    identifiers_only: Annotated[
        bool,
        typer.Option(
            "--identifiers-only", help="csj-lambda: stop every run after its identifiers; minutes, no Recall."
        ),
    ] = False,
    report_only: ReportOnly = False,
    dry_run: DryRun = False,
    parallel: Parallel = 1,
    encoders: Encoders = None,
    store: StorePath = STORE,
    runs: RunsPath = RUNS,
) -> None:
    """Run every variant of one of the papers' tables, and write it beside the printed one."""
    kept = _folders(store, runs)
    from genrec_dist.studies.catalogue import find_study

    find_study(name)
    from launcher import study as work
    from launcher import torchrun
    from launcher.failures import Stopped
    from launcher.study_plan import make_plan, parse_encoders, show_plan

    torchrun.refuse("study")

    places = parse_encoders(encoders or [])
    plan = make_plan(name, config, data.value if data else None, settings or [], seeds, identifiers_only, places)
    if dry_run:
        show_plan(plan.runs, plan.study.title, kept[0], out())
        return
    failure = None
    if not report_only:
        failure = work.carry_out(
            plan.runs,
            store=kept[0],
            folder=kept[1] / plan.folder_name,
            runs_folder=kept[1],
            command=sys.argv,
            console=out(),
            parallel=parallel,
        )
    work.show_study(*work.write_page(plan, kept[1]), out())
    if failure is not None:
        raise Stopped(failure)


@app.command()
@guarded
def reproduce(
    paper: Annotated[Paper, typer.Argument(metavar="PAPER", help="prorec or csj_id.", show_default=False)],
    tables: Annotated[
        list[int] | None, typer.Option("--table", metavar="N", help="prorec: 3, 4, 5, 6. Repeatable; none: all.")
    ] = None,
    figures: Annotated[
        list[int] | None, typer.Option("--figure", metavar="N", help="prorec: 7, 8, 9. Repeatable; none: all.")
    ] = None,
    data: Annotated[
        DataSets | None, typer.Option("--data", help="Default: those that the paper prints.", show_default=False)
    ] = None,
    order: Annotated[Order, typer.Option("--order", help="Order of interactions.")] = Order.both,
    seeds: Annotated[str, typer.Option("--seeds", metavar="0,1,2", help="Every run once for each.")] = "0,1,2",
    settings: Overrides = None,
    report_only: ReportOnly = False,
    dry_run: DryRun = False,
    parallel: Parallel = 1,
    encoders: Encoders = None,
    store: StorePath = STORE,
    runs: RunsPath = RUNS,
) -> None:
    """Run or reuse what a paper's tables and figures need, and write one page of them beside ours."""
    kept = _folders(store, runs)
    from launcher import reproduce as work
    from launcher import torchrun
    from launcher.study_plan import parse_encoders

    torchrun.refuse("reproduce")
    asked = [f"Table {n}" for n in tables or []] + [f"Figure {n}" for n in figures or []]
    places = parse_encoders(encoders or [])
    plan = work.make_plan(paper.value, asked, data and data.value, order.value, settings or [], seeds, places)
    if dry_run:
        work.show_plan(plan, kept[0], out())
        return
    work.reproduce(
        plan,
        store=kept[0],
        runs=kept[1],
        command=sys.argv,
        console=out(),
        parallel=parallel,
        report_only=report_only,
    )


@app.command()
@guarded
def sweep(
    config: Annotated[
        Path, typer.Argument(metavar="SWEEP", help="YAML file, see configs/sweeps/.", show_default=False)
    ],
    settings: Overrides = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the sweep; default: the file's.")] = None,
    parallel: Annotated[
        int, typer.Option("--parallel", "--max-parallel", min=0, help="Trials at once; 0: as many as fit.")
    ] = 0,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try failed trials again.")] = False,
    extend: Annotated[
        list[str] | None,
        typer.Option(
            "--extend",
            metavar="depth=48|seed=3,4|file",
            help="Add depths or seeds, or take in what the sweep file has come to have. Repeatable.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every trial with size, cost and time; start nothing.")
    ] = False,
    probe: Annotated[bool, typer.Option("--probe/--no-probe", help="In a dry run, time real steps here.")] = True,
    store: StorePath = STORE,
    runs: RunsPath = RUNS,
) -> None:
    """Train a ladder of depths, or any grid, for several arms and seeds. The same command again goes on."""
    kept = _folders(store, runs)
    from launcher import sweep as work
    from launcher import torchrun

    torchrun.refuse("sweep")
    planned = work.prepare(config, name, settings or [], extend or [], kept[1])
    if dry_run:
        from launcher.sweep_dryrun import show_sweep

        show_sweep(planned, kept[0], work.machines_for_plan(planned), parallel, probe, out())
        return
    outcome = work.carry_out(
        planned, store=kept[0], parallel=parallel, retry_failed=retry_failed, command=sys.argv, console=out()
    )
    work.conclude(outcome, planned, out())
