"""The commands `genrec submit` and `genrec job`: runs as jobs of a Ray cluster."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from launcher.console import guarded, out
from launcher.options import AsJson, ConfigPath, Overrides

app = typer.Typer()
job_app = typer.Typer(no_args_is_help=True, help="Look after a submitted job: status, logs, stop.")
app.add_typer(job_app, name="job")


class Manifests(StrEnum):
    """What a submission can be written as."""

    kuberay = "kuberay"
    slurm = "slurm"
    ray_up = "ray-up"


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
