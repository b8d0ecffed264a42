"""Carrying out a study: its variants as ordinary runs, one after the other, then its page.

Every run goes through `launcher.run.perform` as `genrec run` does: artifacts are shared, a second call reuses them, an
interrupted one goes on. Knows nothing of what a study compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from genrec_dist import methods
from genrec_dist.artifacts.places import is_url, local_folder
from genrec_dist.config import Config, check_name, load_config, parse_override
from genrec_dist.errors import ConfigError
from genrec_dist.pipeline import Stage, closure
from genrec_dist.run_mirror import RunMirror
from genrec_dist.runs import RunFolder
from genrec_dist.studies.blocks import flatten
from genrec_dist.studies.catalogue import STUDIES, Study, find_study
from genrec_dist.studies.run_data import RunData
from genrec_dist.studies.study_data import StudyData, Variant
from genrec_dist.studies.study_page import StudyPage, write_study
from launcher.results import finish_run
from launcher.run import check_batches, is_finished, perform
from launcher.streams import captured

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
WITHOUT_RESULT = {"name", "runtime", "report", "references"}
"""Sections that change no number of a method."""


@dataclass(frozen=True)
class Planned:
    """One run of a study: its variant, seed, resolved configuration and what it executes."""

    variant: Variant
    seed: int
    config: Config
    stages: list[Stage]


@dataclass(frozen=True)
class Plan:
    """A study with everything resolved before anything starts."""

    name: str
    study: Study
    source: str
    base: Config
    seeds: tuple[int, ...]
    runs: list[Planned]
    identifiers_only: bool

    @property
    def folder_name(self) -> str:
        return f"{self.name}-{self.base.name}"


def make_plan(
    name: str, config: Path | None, data_set: str | None, settings: Sequence[str], seeds: str | None, short: bool
) -> Plan:
    """Resolve and check every run of a study; starts nothing.

    Args:
        name: of the study.
        config: base configuration; None: the study's own.
        data_set: picks the study's own configuration of another data set.
        settings: overrides of the base configuration.
        seeds: numbers separated by commas; None: the configuration's.
        short: stop after the identifiers.

    Raises:
        ConfigError: no such study, a setting that the study itself varies, bad seeds, a bad configuration.
    """
    study = find_study(name)
    if config is not None and data_set is not None:
        raise ConfigError(
            "two configurations", where="--data", got=f"{config} and --data {data_set}", fix="give one of them"
        )
    path = config or default_config(study, data_set or "beauty")
    _refuse_varied(study, settings, seeds)
    base = load_config(path, list(settings))
    numbers = parse_seeds(seeds) if seeds is not None else (base.seed,)
    if short and study.stops == "never":
        raise ConfigError(
            "every number of this study needs the generator",
            where="--identifiers-only",
            got=name,
            expected=f"one of {', '.join(known for known, one in STUDIES.items() if one.stops != 'never')}",
        )
    short = short or study.stops == "always"
    runs = []
    for seed in numbers:
        for variant in study.variants:
            run_name = check_name(f"{name}-{base.name}-{variant.name}-s{seed}")
            overrides = [*settings, *variant.overrides, f"seed={seed}", f"name={run_name!r}"]
            resolved = load_config(path, overrides)
            check_batches(resolved)
            stages = methods.build_stages(resolved)
            if short:
                stages = [stage for stage in stages if stage.name == "identifiers"]
            runs.append(Planned(variant, seed, resolved, stages))
    check_name(f"{name}-{base.name}")
    return Plan(name, study, str(path), base, numbers, runs, short)


def default_config(study: Study, data_set: str) -> Path:
    """The study's configuration of a data set, here or beside the program."""
    file = f"{study.family}_{data_set}.yaml"
    here = Path("configs") / file
    return here if here.is_file() else CONFIGS / file


def parse_seeds(text: str) -> tuple[int, ...]:
    """'0,1,2' as numbers.

    Raises:
        ConfigError: not numbers, or one twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise ConfigError("not seeds", where="--seeds", got=text, expected="different numbers: 0,1,2")
    return tuple(map(int, parts))


def _refuse_varied(study: Study, settings: Sequence[str], seeds: str | None) -> None:
    varied = {parse_override(text)[0] for variant in study.variants for text in variant.overrides}
    for key, _ in map(parse_override, settings):
        if key in varied or (key == "seed" and seeds is not None):
            raise ConfigError(
                "the study sets this itself", where=f"--set {key}", fix="leave it out, or use `genrec run`"
            )


def carry_out(plan: Plan, *, store: str | Path, runs: str | Path, command: list[str], console: Console) -> None:
    """Build or reuse every run of the study.

    Raises:
        Stopped: a run failed or was interrupted; the same call goes on from there.
    """
    for place, planned in enumerate(plan.runs, start=1):
        text = f"run {place} of {len(plan.runs)}: {planned.config.name}"
        if plan.identifiers_only and _holds(RunFolder(runs, planned.config.name), planned.stages):
            console.print(f"[bold]{escape(text)}[/], complete with its generator, left as it is", soft_wrap=True)
            continue
        console.print(f"[bold]{escape(text)}[/]", soft_wrap=True)
        perform(
            planned.config,
            planned.stages,
            store=store,
            runs=runs,
            command=command,
            finish=_finish_short if plan.identifiers_only else partial(finish_run, planned.config),
        )


def _holds(run: RunFolder, stages: list[Stage]) -> bool:
    """True when the folder is of a whole run over these very stages: ending it earlier would only take away."""
    links = {(link["stage"], link["key"]) for link in run.links().values()}
    return (run.path / "metrics.json").is_file() and all((s.name, s.key) in links for s in stages)


def _finish_short(run: RunFolder) -> None:
    """Report of a run that ends with its identifiers; metrics of an earlier one with other settings are not its own."""
    from genrec_dist.studies.report import write_report

    (run.path / "metrics.json").unlink(missing_ok=True)
    write_report(run)


def show_plan(plan: Plan, store: str | Path, console: Console) -> None:
    """Print the runs of a study and what each would build; a stage that several need is counted once."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("run", "build", "reuse", "stages to build"):
        table.add_column(name, justify="right" if name in ("build", "reuse") else "left")
    seen: set[tuple[str, str]] = set()
    for planned in plan.runs:
        stages = closure(planned.stages, lambda stage: is_finished(stage, store))
        build = [s for s in stages if not is_finished(s, store) and (s.name, s.key) not in seen]
        seen |= {(stage.name, stage.key) for stage in build}
        titles = ", ".join(stage.title for stage in build)
        table.add_row(planned.config.name, str(len(build)), str(len(stages) - len(build)), titles)
    console.print(f"[bold]{escape(plan.study.title)}[/]: nothing is started; store {escape(str(store))}")
    console.print(table)


def write_page(plan: Plan, runs: str | Path) -> tuple[Path, StudyPage]:
    """Write the study's page, JSON and CSV from the runs that exist.

    Raises:
        ConfigError: none exists, or one was made with other settings.
    """
    found: dict[tuple[str, int], RunData] = {}
    for planned in plan.runs:
        run = RunFolder(runs, planned.config.name)
        if run.mirror is not None:
            run.mirror.pull()
        if (run.path / "config.yaml").is_file():
            _refuse_other(run, planned.config)
            found[planned.variant.name, planned.seed] = RunData(run)
    if not found:
        raise ConfigError(
            "the study has no run yet",
            where=runs,
            expected=plan.runs[0].config.name,
            fix="run it without --report-only",
        )
    folder = local_folder(runs).resolve() / plan.folder_name
    data = StudyData(
        plan.name, plan.study.title, plan.base, plan.study.variants, plan.seeds, found, folder, plan.identifiers_only
    )
    with captured(folder / "logs" / "study.log"):
        page = plan.study.page(data)
        written = write_study(data, page, plan.source)
    if is_url(runs):
        RunMirror(f"{str(runs).rstrip('/')}/{plan.folder_name}", folder).push()
    return written, page


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


def show_study(path: Path, page: StudyPage, console: Console) -> None:
    """Tables, verdict and path of a finished study."""
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
    console.print(escape(page.verdict.sentence), soft_wrap=True)
    console.print(f"study: {escape(str(path))}", soft_wrap=True)
