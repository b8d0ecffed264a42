"""The `genrec` command. Each command is a few lines; heavy modules are imported when a command needs them."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from genrec_dist import __version__
from launcher.console import guarded, out, print_json

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
job_app = typer.Typer(no_args_is_help=True, help="Look after a submitted job: status, logs, stop.")
app.add_typer(job_app, name="job")


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


class Manifests(StrEnum):
    """What a submission can be written as."""

    kuberay = "kuberay"
    slurm = "slurm"
    ray_up = "ray-up"


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
Parallel = Annotated[
    int,
    typer.Option("--parallel", metavar="N", min=1, help="Runs at once, as child processes; runtime.backend=local."),
]
Encoders = Annotated[
    list[str] | None,
    typer.Option(
        "--encoder", metavar="NAME=PATH", help="Study encoders: weights, or a file of finished embeddings. Repeatable."
    ),
]
SharedStore = Annotated[
    str | None,
    typer.Option("--store", envvar="GENREC_STORE", help="Artifact store that all nodes see: path or s3:// URL."),
]
SharedRuns = Annotated[
    str | None,
    typer.Option("--runs", envvar="GENREC_RUNS", help="Place of all runs that all nodes see: path or s3:// URL."),
]
ADDRESS_HELP = "Jobs API of the cluster, http://HOST:8265."
Address = Annotated[
    str, typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help=ADDRESS_HELP, show_default=False)
]
Job = Annotated[str, typer.Argument(metavar="JOB", help="Id that `genrec submit` printed.", show_default=False)]
Timeout = Annotated[
    float, typer.Option("--timeout", min=0, help="Seconds to keep trying when the cluster no longer answers.")
]
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
    parallel: Parallel = 1,
    encoders: Encoders = None,
    store: StorePath = STORE,
    runs: RunsPath = RUNS,
) -> None:
    """Run every variant of one of the papers' tables, and write it beside the printed one."""
    from genrec_dist.artifacts.places import folder_only

    kept = folder_only(store, "--store"), folder_only(runs, "--runs")
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
def submit(
    config: ConfigPath,
    settings: Overrides = None,
    address: Annotated[
        str | None, typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help=ADDRESS_HELP)
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run; default: the configuration's.")] = None,
    store: SharedStore = None,
    runs: SharedRuns = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Show the job's log until it is over, and end as it does.")
    ] = True,
    timeout: Timeout = 300.0,
    render: Annotated[
        Manifests | None, typer.Option("--render", help="Write files for a cluster manager; send nothing.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Folder of the written files; default: NAME-kuberay and so on.")
    ] = None,
    image: Annotated[str | None, typer.Option("--image", help="Container image, with --render kuberay.")] = None,
) -> None:
    """Send a run to a Ray cluster as a job. The same command again resumes it."""
    from genrec_dist.errors import ConfigError
    from launcher import submit as work

    resolved = work.resolve(config, settings, name)
    places = {"store": work.shared_place(store, "--store"), "runs": work.shared_place(runs, "--runs")}
    if render is not None:
        from launcher.submit_render import render_files

        render_files(render.value, resolved, folder=folder, image=image, console=out(), **places)
        return
    if address is None:
        raise ConfigError("which cluster?", where="--address", expected="http://HOST:8265", fix="or use --render")
    work.submit(resolved, **places, address=address, wait=wait, timeout=timeout, console=out())


@job_app.command("status")
@guarded
def job_status(job: Job, address: Address, json: AsJson = False) -> None:
    """State of a job, as the cluster tells it."""
    from launcher.submit import job_status

    job_status(address, job, json, out())


@job_app.command("logs")
@guarded
def job_logs(
    job: Job,
    address: Address,
    follow: Annotated[bool, typer.Option("--follow", help="Until the job is over, and end as it does.")] = False,
    timeout: Timeout = 300.0,
) -> None:
    """What a job has printed."""
    from launcher.submit import job_logs

    job_logs(address, job, follow, timeout, out())


@job_app.command("stop")
@guarded
def job_stop(job: Job, address: Address) -> None:
    """Stop a job: its run saves a checkpoint and leaves; submit it again to go on."""
    from launcher.submit import job_stop

    job_stop(address, job, out())


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
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Run nothing; write the page of the runs that exist.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the runs and what they build; start nothing.")
    ] = False,
    parallel: Parallel = 1,
    encoders: Encoders = None,
    store: StorePath = STORE,
    runs: RunsPath = RUNS,
) -> None:
    """Run or reuse what a paper's tables and figures need, and write one page of them beside ours."""
    from genrec_dist.artifacts.places import folder_only

    kept = folder_only(store, "--store"), folder_only(runs, "--runs")
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
    from genrec_dist.artifacts.places import folder_only

    kept = folder_only(store, "--store"), folder_only(runs, "--runs")
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
    """Write the HTML report of a run or a sweep again."""
    from genrec_dist.artifacts.places import is_url
    from genrec_dist.runs import RunFolder
    from genrec_dist.studies.scaling.sweep_folder import SweepFolder
    from launcher.results import make_report

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
