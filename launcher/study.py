"""Carrying out studies: their variants as ordinary runs, one after the other or several at once, then a page.

Every run goes through `launcher.run.perform`, or is a child `genrec run`: artifacts are shared, a second call reuses
them, an interrupted one goes on. Knows nothing of what a study compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from genrec_dist.config import Config
from genrec_dist.errors import ConfigError
from genrec_dist.pipeline import Stage
from genrec_dist.runs import RunFolder
from genrec_dist.studies.blocks import flatten
from genrec_dist.studies.run_data import RunData
from genrec_dist.studies.study_data import StudyData
from genrec_dist.studies.study_page import StudyPage, write_study
from launcher.failures import Failure
from launcher.parallel import make_job, refuse_cluster, run_jobs
from launcher.results import finish_run, finish_short
from launcher.run import perform
from launcher.streams import captured
from launcher.study_plan import Plan, Planned
from launcher.sweep_machine import this_machine

WITHOUT_RESULT = {"name", "runtime", "report", "tracking", "references"}
"""Sections that change no number of a method."""


def carry_out(
    runs: Sequence[Planned],
    *,
    store: Path,
    folder: Path,
    runs_folder: Path,
    command: list[str],
    console: Console,
    parallel: int = 1,
) -> Failure | None:
    """Build or reuse every run.

    Args:
        runs: of one study or several.
        store: artifacts.
        folder: gets the output of runs that are child processes.
        runs_folder: of all runs.
        command: for the provenance of runs in this process.
        console: for the user.
        parallel: runs at once, as child processes; 1: in this process.

    Returns:
        What went wrong in child processes; the others went on.

    Raises:
        Stopped: a run in this process failed, or was interrupted; the same call goes on from there.
        ConfigError: several runs at once and a cluster.
    """
    if parallel > 1:
        refuse_cluster(runs)
    jobs = []
    for place, planned in enumerate(runs, start=1):
        text = f"run {place} of {len(runs)}: {planned.config.name}"
        said = ""
        if reason := planned.blocked(store):
            said = f", not made here: {reason}"
        elif planned.until and _holds(RunFolder(runs_folder, planned.config.name), planned.stages):
            said = ", complete with its generator, left as it is"
        if said or parallel == 1:
            console.print(f"[bold]{escape(text)}[/]{escape(said)}", soft_wrap=True)
        if said:
            continue
        if parallel > 1:
            jobs.append(make_job(planned, store, runs_folder, folder, parallel))
            continue
        perform(
            planned.config,
            planned.stages,
            store=store,
            runs=runs_folder,
            command=command,
            finish=finish_short if planned.until else partial(finish_run, planned.config),
        )
    if not jobs:
        return None
    return run_jobs(jobs, parallel, store, console, this_machine("auto").gpu_names)


def _holds(run: RunFolder, stages: list[Stage]) -> bool:
    """True when the folder is of a whole run over these very stages: ending it earlier would only take away."""
    links = {(link["stage"], link["key"]) for link in run.links().values()}
    return (run.path / "metrics.json").is_file() and all((s.name, s.key) in links for s in stages)


def find_runs(plan: Plan, runs: Path) -> StudyData:
    """What the study's page reads: the runs that exist.

    Raises:
        ConfigError: one was made with other settings.
    """
    found: dict[tuple[str, int], RunData] = {}
    for planned in plan.runs:
        run = RunFolder(runs, planned.config.name)
        if (run.path / "config.yaml").is_file():
            _refuse_other(run, planned.config)
            found[planned.variant.name, planned.seed] = RunData(run)
    return StudyData(
        plan.name,
        plan.study.title,
        plan.base,
        plan.study.variants,
        plan.seeds,
        found,
        runs.resolve() / plan.folder_name,
        plan.identifiers_only,
        plan.absent,
    )


def write_page(plan: Plan, runs: Path) -> tuple[Path, StudyPage]:
    """Write the study's page, JSON and CSV from the runs that exist.

    Raises:
        ConfigError: none exists, or one was made with other settings.
    """
    data = find_runs(plan, runs)
    if not data.runs:
        refuse_empty(runs, plan.runs[0].config.name)
    with captured(data.folder / "logs" / "study.log"):
        page = plan.study.page(data)
        return write_study(data, page, plan.source), page


def refuse_empty(runs: Path, expected: str) -> NoReturn:
    """There is nothing to make a page of.

    Raises:
        ConfigError: always.
    """
    raise ConfigError("the study has no run yet", where=runs, expected=expected, fix="run it without --report-only")


def _refuse_other(run: RunFolder, wanted: Config) -> None:
    """A page must not mix runs of different settings."""
    made, asked = (
        dict(flatten(config.model_dump(mode="json", exclude=WITHOUT_RESULT))) for config in (run.config(), wanted)
    )
    differing = [key for key in asked if made.get(key) != asked[key]]
    if differing:
        key = differing[0]
        raise ConfigError(
            "run was made with other settings than asked for",
            where=run.path,
            got=f"{key.replace(' › ', '.').replace(' ', '_')} = {made.get(key)}",
            expected=asked[key],
            fix="give the same --set as then, or run the study again without --report-only",
        )


def show_grids(page: StudyPage, console: Console) -> None:
    """Tables of a study's page."""
    for grid in page.grids:
        block = grid.table()
        rows = [[cell if isinstance(cell, str) else cell.text for cell in row] for row in block.rows]
        table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for place, name in enumerate(block.head):
            short = name.replace("Recall@", "R@").replace("NDCG@", "N@")
            widest = max((len(row[place]) for row in rows), default=0)  # a number is never cut, its heading may fold
            table.add_column(escape(short), justify="right" if place else "left", min_width=widest, overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        needed = Measurement.get(console, console.options.update(width=1000), table).minimum
        console.print(table, width=max(console.width, needed), crop=False)


def show_study(path: Path, page: StudyPage, console: Console) -> None:
    """Tables, verdict and path of a finished study."""
    show_grids(page, console)
    console.print(escape(page.verdict.sentence), soft_wrap=True)
    console.print(f"study: {escape(str(path))}", soft_wrap=True)
