"""The `genrec` command. Each command is a few lines; heavy modules are imported when a command needs them."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from genrec_dist import __version__
from launcher.console import guarded, metrics_table, out, print_json

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
data_app = typer.Typer(
    no_args_is_help=True, help="Make and describe catalogs, verify artifacts, move embeddings, extend codes."
)
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")


class Resume(StrEnum):
    """What to do with work that an earlier call left."""

    auto = "auto"
    require = "require"
    never = "never"


class Dtype(StrEnum):
    """How embeddings are stored."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class DataSet(StrEnum):
    """Data sets with configurations of their own."""

    beauty = "beauty"
    sports = "sports"
    toys = "toys"


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
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name, folder or URL of a run.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
STORE, RUNS = "store", "runs"


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
) -> None:
    """Build what is missing, train, evaluate, report. The same command again continues where it stopped."""
    from genrec_dist import methods
    from genrec_dist.artifacts.places import local_folder
    from genrec_dist.config import load_config
    from launcher import torchrun
    from launcher.run import check_batches, perform

    overrides = [*(settings or []), *([f"name={name!r}"] if name else [])]
    resolved = torchrun.shared(load_config(config, overrides))
    check_batches(resolved)
    stages = methods.build_stages(resolved)
    if torchrun.follows():
        raise typer.Exit(0 if dry_run else torchrun.follow(local_folder(runs) / resolved.name))
    if dry_run:
        from launcher.dryrun import show_plan

        show_plan(resolved, stages, store, out(), probe)
        return
    from launcher.results import finish_run, show_result

    with torchrun.leading():
        finished = perform(
            resolved,
            stages,
            store=store,
            runs=runs,
            command=sys.argv,
            resume=resume.value,
            finish=lambda folder: finish_run(resolved, folder),
        )
    show_result(finished, out())


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
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Run nothing; write the page of the runs that exist.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the runs and what they build; start nothing.")
    ] = False,
    store: StorePath = STORE,
    runs: RunsPath = RUNS,
) -> None:
    """Run every variant of one of the papers' tables, and write it beside the printed one."""
    from genrec_dist.studies.catalogue import find_study

    find_study(name)
    from launcher import study as work
    from launcher import torchrun

    torchrun.refuse("study")

    plan = work.make_plan(name, config, data.value if data else None, settings or [], seeds, identifiers_only)
    if dry_run:
        work.show_plan(plan, store, out())
        return
    if not report_only:
        work.carry_out(plan, store=store, runs=runs, command=sys.argv, console=out())
    work.show_study(*work.write_page(plan, runs), out())


@app.command()
@guarded
def status(run: RunName, json: AsJson = False, runs: RunsPath = RUNS) -> None:
    """State of a run from its folder: running, finished, failed or interrupted, stages, progress, metrics."""
    from genrec_dist.runs import RunFolder
    from launcher.results import result_rows
    from launcher.status import gather, show

    found = gather(RunFolder.existing(runs, run))
    if json:
        print_json(found)
        return
    show(found, out())
    if (found["metrics"] or {}).get("main"):
        out().print(metrics_table(result_rows(found["metrics"])))


@app.command()
@guarded
def report(run: RunName, runs: RunsPath = RUNS) -> None:
    """Write the HTML report of a run again."""
    from genrec_dist.runs import RunFolder
    from launcher.results import make_report

    typer.echo(str(make_report(RunFolder.existing(runs, run))))


@app.command()
@guarded
def recommend(
    run: RunName,
    history: Annotated[
        str, typer.Option("--history", metavar="ID,ID,...", help="Item ids, oldest first.", show_default=False)
    ],
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Number of items.")] = 10,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    json: AsJson = False,
    runs: RunsPath = RUNS,
) -> None:
    """Recommend items to a user with this history."""
    from genrec_dist.runs import RunFolder
    from launcher.results import recommend_items, show_recommendations

    items = recommend_items(RunFolder.existing(runs, run), history, top_k, device)
    if json:
        print_json(items)
    else:
        show_recommendations(items, out())


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


@data_app.command("synth")
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


@data_app.command("describe")
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


@data_app.command("verify")
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


@data_app.command("export")
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


@data_app.command("import")
@guarded
def data_import(
    file: Annotated[Path, typer.Argument(metavar="FILE", help=".npy, .parquet or .safetensors.", show_default=False)],
    folder: Annotated[Path, typer.Option("--out", help="Folder of the new artifact.", show_default=False)],
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Of the stored values.")] = Dtype.float32,
) -> None:
    """Make an embedding artifact of a file. (A run takes the file itself: semantic.engine=precomputed.)"""
    from launcher.embeddings import import_file

    import_file(file, folder, dtype.value, out())


@data_app.command("extend")
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


@app.command()
@guarded
def doctor(
    json: AsJson = False,
    ray: Annotated[bool, typer.Option("--ray", help="Start a private Ray and run one task in it.")] = False,
) -> None:
    """Check this machine: packages, compiler, cores, memory, disk, GPU, Ray, DGL. Exit 4 if something is missing."""
    from genrec_dist.errors import EXIT_CLUSTER
    from launcher.doctor import examine, show_checks

    checks = examine(start_ray=ray)
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
