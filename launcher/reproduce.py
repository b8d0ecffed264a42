"""`genrec reproduce`: the studies of a paper's tables and figures over data sets and orders, and one page of them all.

Every run belongs to a study and bears its name, so one that is there already is reused. PRORec starts from the frozen
recipes, CSJ-ID from its configurations. Writes `runs/reproduce-PAPER/`; what is compared is the studies' business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from genrec_dist.config import load_config, parse_override
from genrec_dist.errors import ConfigError
from genrec_dist.pipeline import closure
from genrec_dist.studies.catalogue import PAPERS, find_study
from genrec_dist.studies.paper import DATA_SETS
from genrec_dist.studies.recipes import ORDERS, find_recipe, read_recipe
from genrec_dist.studies.reproduction import Part, write_reproduction
from launcher import study, study_plan
from launcher.failures import Stopped
from launcher.streams import captured

ON_ALL_DATA = {"performance"}
"""Studies that their paper prints for every data set; the others it prints for Beauty."""


@dataclass(frozen=True)
class Item:
    """One table or figure on one data set in one order."""

    title: str
    data_set: str
    order: str
    plan: study_plan.Plan


@dataclass(frozen=True)
class Reproduction:
    """Everything that is asked for, resolved before anything starts."""

    paper: str
    items: list[Item]

    @property
    def runs(self) -> list[study_plan.Planned]:
        """What is run, each once."""
        return list({run.config.name: run for item in self.items for run in item.plan.runs}.values())

    @property
    def folder_name(self) -> str:
        return f"reproduce-{self.paper}"


def make_plan(
    paper: str,
    asked: Sequence[str],
    data: str | None,
    order: str,
    settings: Sequence[str],
    seeds: str,
    encoders: Mapping[str, str],
) -> Reproduction:
    """Resolve and check every run; starts nothing.

    Args:
        paper: 'prorec' or 'csj_id'.
        asked: 'Table 5', 'Figure 8'; none: all.
        data: a data set, 'all', or None for those that the paper prints.
        order: 'time', 'file' or 'both'.
        settings: overrides of every configuration.
        seeds: numbers separated by commas.
        encoders: weights or embeddings by name, for the study of text encoders.

    Raises:
        ConfigError: no such table or figure, a setting that is not the user's here, or a bad configuration.
    """
    known = PAPERS[paper]
    for title in asked:
        if title not in known:
            number = title.rpartition(" ")[2]
            raise ConfigError(
                "the paper's studies do not have it" if paper == "prorec" else "this paper numbers neither",
                where=f"--{title.split()[0].lower()} {number}",
                got=paper,
                expected=", ".join(known),
                fix=None if paper == "prorec" else "leave it out: all its studies are run",
            )
    for text in settings:
        if parse_override(text)[0] in ("catalog.order", "catalog.path", "name"):
            raise ConfigError("a reproduction sets this itself", where=f"--set {text}", fix="use --order and --data")
    names = {title: name for title, name in known.items() if not asked or title in asked}
    if encoders and "encoders" not in names.values():
        raise ConfigError("only Figure 7 takes encoders", where="--encoder", fix="add --figure 7, or leave it out")
    items = []
    for title, name in names.items():
        sets: Sequence[str] = (
            DATA_SETS if data == "all" or (data is None and name in ON_ALL_DATA) else (data or "beauty",)
        )
        for data_set in sets:
            for one in ORDERS if order == "both" else (order,):
                path, added = _base(name, data_set, one)
                plan = study_plan.make_plan(
                    name, path, None, [*added, *settings], seeds, False, encoders if name == "encoders" else None
                )
                items.append(Item(title, data_set, one, plan))
    return Reproduction(paper, share_runs(items))


def share_runs(items: Sequence[Item]) -> list[Item]:
    """The items with one run in place of all that would read the very same artifacts.

    Several tables have PRORec itself in a row; a run that ends early is a part of a whole one.
    """
    whole: dict[frozenset, study_plan.Planned] = {}
    for run in (run for item in items for run in item.plan.runs if run.until is None):
        whole.setdefault(_artifacts(run), run)

    def shared(run: study_plan.Planned) -> study_plan.Planned:
        mine = _artifacts(run)
        found = whole.get(mine) or next((other for keys, other in whole.items() if mine <= keys), run)
        return run if found is run else replace(found, variant=run.variant, obstacle=run.obstacle)

    return [replace(item, plan=replace(item.plan, runs=[shared(run) for run in item.plan.runs])) for item in items]


def _artifacts(run: study_plan.Planned) -> frozenset[tuple[str, str]]:
    return frozenset((stage.name, stage.key) for stage in closure(run.stages))


def _base(name: str, data_set: str, order: str) -> tuple[Path, list[str]]:
    """Configuration of a study, and what makes it one of an order; maps are left out of the runs' reports."""
    added = ["report.tsne_items=0"] if name != "csj-tsne" else []
    one = find_study(name)
    if one.family == "prorec":
        recipe = find_recipe(data_set, order)
        if recipe.is_file():
            read_recipe(recipe)  # the page quotes its header: better refused now than after the runs
        return recipe, added
    path = study_plan.default_config(one, data_set)
    if load_config(path).catalog.order != order:
        added += [f"catalog.order={order}", f"name={path.stem}_{order}"]
    return path, added


def show_plan(plan: Reproduction, store: Path, console: Console) -> None:
    """Print every run and what it would build, and the page."""
    titles = dict.fromkeys(f"{item.title}" for item in plan.items)
    study_plan.show_plan(plan.runs, f"{plan.paper}: {', '.join(titles)}", store, console)


def reproduce(
    plan: Reproduction,
    *,
    store: Path,
    runs: Path,
    command: list[str],
    console: Console,
    parallel: int,
    report_only: bool,
) -> None:
    """Run or reuse everything, then write and show the page.

    Raises:
        Stopped: a run failed or was interrupted; with several at once only after the others, and with the page.
        ConfigError: a run was made with other settings, or with `report_only` there is none.
    """
    failure = None
    folder = runs.resolve() / plan.folder_name
    if not report_only:
        failure = study.carry_out(
            plan.runs,
            store=store,
            folder=folder,
            runs_folder=runs,
            command=command,
            console=console,
            parallel=parallel,
        )
    found = [(item, study.find_runs(item.plan, runs)) for item in plan.items]
    if not any(data.runs for _, data in found):
        study.refuse_empty(runs, plan.runs[0].config.name)
    with captured(folder / "logs" / "reproduce.log"):
        parts = [
            Part(item.title, item.data_set, item.order, data, item.plan.study.page(data), Path(item.plan.source))
            for item, data in found
        ]
        path = write_reproduction(folder, plan.paper, parts, command)
    for part in parts:
        console.print(f"\n[bold]{escape(part.heading)}[/]", soft_wrap=True)
        study.show_grids(part.page, console)
        console.print(escape(part.page.verdict.sentence), soft_wrap=True)
    console.print(f"page: {escape(str(path))}", soft_wrap=True)
    if failure is not None:
        raise Stopped(failure)
