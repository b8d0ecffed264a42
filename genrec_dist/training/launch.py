"""Run a worker function under Ray Train, under torchrun (its launcher, or several hosts), or in the plain process.

A worker function takes (worker, context, settings) and leaves its results as files in `context.out`. Typed errors come
back as they were and are not retried; lost nodes, crashes and hangs are, each with its budget.
"""

from __future__ import annotations

from genrec_dist.cluster import worker_threads
from genrec_dist.pipeline import StageContext
from genrec_dist.training import company
from genrec_dist.training.attempts import prepare, register
from genrec_dist.training.entry import WorkerFunction
from genrec_dist.training.worker import plain_worker, setup_torch


def launch(function: WorkerFunction, context: StageContext, settings: dict) -> None:
    """Run `function` on every worker and wait.

    Args:
        function: importable top-level function.
        context: stage context, also given to the workers.
        settings: JSON-ready settings of the stage.

    Raises:
        GenrecError: as raised by the function.
        TrainingError: the workers failed more often than a retry budget allows.
        Preempted: SIGTERM came; the workers had `runtime.grace_seconds` to save a checkpoint.
    """
    if context.runtime.backend == "ray":
        from genrec_dist.training.launch_ray import launch_ray

        launch_ray(function, context, settings)
    elif company.world_size() > 1:
        company.company().lead(function, context, settings)
    elif context.runtime.num_workers > 1:
        from genrec_dist.training.launch_processes import launch_processes

        launch_processes(function, context, settings)
    else:
        prepare(context)
        worker = plain_worker(context.runtime)
        setup_torch(worker, worker_threads(context.runtime))
        register(worker, context)
        function(worker, context, settings)
