"""The `genrec` command. Each command is a few lines; heavy modules are imported when a command needs them."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from genrec_dist import __version__
from launcher import data_commands, job_commands, study_commands
from launcher.console import guarded, out, print_json
from launcher.options import RUNS, STORE, AsJson, ConfigPath, Device, Overrides, RunName, RunsPath, StorePath

app = typer.Typer(
    name="genrec",
    help="Raw product reviews in, a trained generative recommender and an honest study out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 bug, 2 usage or configuration, 3 bad data, 4 cluster or resources, 5 training "
    "failed, 6 finished with too many failed rows, 75 preempted (run it again), 130 interrupted.",
)
config_app = typer.Typer(no_args_is_help=True, help="Show or check a configuration.")
app.add_typer(config_app, name="config")
app.add_typer(data_commands.app, name="data")
app.add_typer(study_commands.app)
app.add_typer(job_commands.app)


class Resume(StrEnum):
    """What to do with work that an earlier call left."""

    auto = "auto"
    require = "require"
    never = "never"


class Split(StrEnum):
    """Held-out items."""

    test = "test"
    valid = "valid"


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"genrec {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
@guarded
def run(
    config: ConfigPath,
    settings: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print stages, sizes, costs and batches; start nothing.")
    ] = False,
    probe: Annotated[
        bool | None,
        typer.Option(
            "--probe/--no-probe",
            help="In a dry run, time a few layers of the text encoder here. Default: with method embed.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        Resume,
        typer.Option(
            help="auto: continue and reuse. require: fail unless there is work to continue. never: throw unfinished "
            "builds away (finished artifacts are reused all the same)."
        ),
    ] = Resume.auto,
    store: StorePath = STORE,
    runs: RunsPath = RUNS,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run; default: the configuration's.")] = None,
    until: Annotated[
        str | None,
        typer.Option("--until", metavar="STAGE", help="Build this stage and what it reads, and no more; no metrics."),
    ] = None,
) -> None:
    """Build what is missing, train, evaluate, report. The same command again continues where it stopped."""
    from genrec_dist import methods
    from genrec_dist.artifacts.places import local_folder
    from genrec_dist.config import load_config
    from launcher import torchrun
    from launcher.run import check_batches, last_stage, perform

    overrides = [*(settings or []), *([f"name={name!r}"] if name else [])]
    resolved = torchrun.shared(load_config(config, overrides))
    check_batches(resolved)
    stages = last_stage(methods.build_stages(resolved), until)
    if torchrun.follows():
        raise typer.Exit(0 if dry_run else torchrun.follow(local_folder(runs) / resolved.name))
    if dry_run:
        from launcher.dryrun import show_plan

        show_plan(resolved, stages, store, out(), probe)
        return
    from launcher.results import finish_run, finish_short, show_result

    with torchrun.leading():
        finished = perform(
            resolved,
            stages,
            store=store,
            runs=runs,
            command=sys.argv,
            resume=resume.value,
            finish=finish_short if until else lambda folder: finish_run(resolved, folder),
        )
    if until:
        for title, link in finished.links().items():
            typer.echo(f"{title}  {(finished.path / link['path']).resolve()}")
        return
    show_result(finished, out())


@app.command()
@guarded
def status(
    run: RunName,
    json: AsJson = False,
    watch: Annotated[
        bool | None,
        typer.Option(
            "--watch/--no-watch", help="Refresh while it runs. Default: sweeps on a terminal.", show_default=False
        ),
    ] = None,
    runs: RunsPath = RUNS,
) -> None:
    """State of a run or a sweep from its folder: running, finished, failed or interrupted, progress, metrics."""
    from genrec_dist.artifacts.places import is_url
    from genrec_dist.runs import RunFolder
    from genrec_dist.studies.scaling.sweep_folder import SweepFolder
    from launcher.status import gather, show_run, watch_run

    sweep = None if is_url(runs) or is_url(run) else SweepFolder.find(Path(runs), run)
    if sweep is not None:
        from launcher.sweep_status import SweepStatus, show_status

        if json:
            print_json(SweepStatus(sweep).gather())
        else:
            show_status(sweep, out(), watch)
        return
    folder = RunFolder.existing(runs, run)
    if json:
        print_json(gather(folder))
    elif watch:
        watch_run(folder, out())
    else:
        show_run(gather(folder), out())


@app.command()
@guarded
def report(run: RunName, runs: RunsPath = RUNS) -> None:
    """Write the HTML report of a run or a sweep again; of a sweep also from its report.json alone."""
    from genrec_dist.artifacts.places import is_url
    from genrec_dist.runs import RunFolder
    from genrec_dist.studies.scaling.sweep_folder import SweepFolder
    from launcher.results import make_report

    if Path(run).suffix == ".json":
        from genrec_dist.studies.scaling.report import rewrite_report

        typer.echo(str(rewrite_report(Path(run))))
        return
    sweep = None if is_url(runs) or is_url(run) else SweepFolder.find(Path(runs), run)
    if sweep is not None:
        from launcher.sweep_report import write_sweep_report

        typer.echo(str(write_sweep_report(sweep)))
        return
    typer.echo(str(make_report(RunFolder.existing(runs, run))))


@app.command()
@guarded
def recommend(
    run: RunName,
    history: Annotated[
        str, typer.Option("--history", metavar="ID,ID,...", help="Item ids, oldest first.", show_default=False)
    ],
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Number of items.")] = 10,
    device: Annotated[Device, typer.Option("--device", help="Where it is computed.")] = Device.auto,
    json: AsJson = False,
    runs: RunsPath = RUNS,
) -> None:
    """Recommend items to a user with this history."""
    from genrec_dist.runs import RunFolder
    from launcher.results import recommend_items, show_recommendations

    items = recommend_items(RunFolder.existing(runs, run), history, top_k, device.value)
    if json:
        print_json(items)
    else:
        show_recommendations(items, out())


@app.command()
@guarded
def diagnose(
    run: RunName,
    users: Annotated[int, typer.Option("--users", min=0, help="Drawn with the run's seed; 0: all.")] = 1000,
    split: Annotated[Split, typer.Option("--split", help="Held-out item that is looked for.")] = Split.test,
    device: Annotated[Device, typer.Option("--device", help="Where it is computed.")] = Device.auto,
    json: AsJson = False,
    runs: RunsPath = RUNS,
) -> None:
    """Where a generator loses its users' next items: Stage I, the code of each level, the beam."""
    from genrec_dist.runs import RunFolder
    from launcher.diagnose import examine, show_diagnosis

    found = examine(RunFolder.existing(runs, run), users, split.value, device.value, None if json else out())
    if json:
        print_json(found)
    else:
        show_diagnosis(found, out())


@app.command()
@guarded
def export(
    run: RunName,
    folder: Annotated[Path, typer.Option("--out", help="Folder of the exported model.", show_default=False)],
    runs: RunsPath = RUNS,
) -> None:
    """Write a run's trained generator to a folder that loads without the run, Ray or DeepSpeed."""
    from genrec_dist.runs import RunFolder
    from launcher.export import export_model

    export_model(RunFolder.existing(runs, run), folder, out())


@config_app.command("show")
@guarded
def config_show(config: ConfigPath, settings: Overrides = None) -> None:
    """Print every key with its resolved value, as YAML."""
    from genrec_dist.config import dump_config, load_config

    typer.echo(dump_config(load_config(config, settings)), nl=False)


@config_app.command("validate")
@guarded
def config_validate(config: ConfigPath, settings: Overrides = None) -> None:
    """Check a configuration and print what follows from it."""
    from genrec_dist import methods
    from genrec_dist.config import load_config
    from genrec_dist.pipeline import closure
    from launcher.run import check_batches

    resolved = load_config(config, settings)
    check_batches(resolved)
    stages = closure(methods.build_stages(resolved))
    typer.echo(f"ok: {resolved.name}, method {resolved.method}, {len(stages)} stages")
    for stage in stages:
        typer.echo(f"  {stage.title}  {stage.key}")


@app.command()
@guarded
def doctor(
    json: AsJson = False,
    ray: Annotated[bool, typer.Option("--ray", help="Start a private Ray and run one task in it.")] = False,
    address: Annotated[
        str | None, typer.Option("--address", metavar="HOST:PORT", help="Examine every node of this Ray cluster.")
    ] = None,
    store: Annotated[
        str | None, typer.Option("--store", metavar="PLACE", help="Write and read there, from every node.")
    ] = None,
    runs: Annotated[
        str | None, typer.Option("--runs", metavar="PLACE", help="Write and read there, from every node.")
    ] = None,
) -> None:
    """Check this machine, and a cluster with its storage. Exit 4 if something that is required is missing."""
    from genrec_dist.errors import EXIT_CLUSTER
    from launcher.doctor import examine, show_checks

    places = {option: place for option, place in (("--store", store), ("--runs", runs)) if place}
    checks = examine(start_ray=ray, address=address, places=places)
    if json:
        print_json([check.as_dict() for check in checks])
    else:
        show_checks(checks, out())
    if any(check.state == "missing" for check in checks):
        raise typer.Exit(EXIT_CLUSTER)


def main() -> None:
    """Console script."""
    app(prog_name="genrec")


if __name__ == "__main__":
    main()
