"""Run a worker function under Ray Train, under torchrun's launcher or in the plain process.

A worker function takes (worker, context, settings) and leaves its results as files in `context.out`. Typed
errors raised in a Ray worker come back as they were and are not retried; node loss and crashes are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from genrec_dist import errors
from genrec_dist.artifacts.files import read_json, write_json
from genrec_dist.cluster import ensure_ray, gpus_per_worker, worker_threads
from genrec_dist.config import RuntimeConfig
from genrec_dist.errors import GenrecError, TrainingError
from genrec_dist.pipeline import StageContext
from genrec_dist.training.worker import Worker, plain_worker, setup_torch

ERROR_FILE = "worker_error.json"
WorkerFunction = Callable[[Worker, StageContext, dict], None]


def launch(function: WorkerFunction, context: StageContext, settings: dict) -> None:
    """Run `function` on every worker and wait.

    Args:
        function: importable top-level function.
        context: stage context, also given to the workers.
        settings: JSON-ready settings of the stage.

    Raises:
        GenrecError: as raised by the function.
        TrainingError: a worker died more often than the retry budget allows.
    """
    error_file = context.scratch / ERROR_FILE
    error_file.unlink(missing_ok=True)
    try:
        if context.runtime.backend == "ray":
            _launch_ray(function, context, settings)
        elif context.runtime.num_workers > 1:
            _launch_processes(function, context, settings)
        else:
            _run_here(function, context, settings)
    except GenrecError:
        raise
    except Exception as error:
        if context.runtime.backend == "local" and context.runtime.num_workers == 1:
            raise
        if error_file.exists():
            raise rebuild_error(read_json(error_file)) from error
        raise TrainingError(
            "training failed on the workers, retries exhausted",
            where=context.title,
            got=f"{type(error).__name__}: {last_line(error)}",
            fix="see the run's logs; the same command continues from the last checkpoint",
        ) from error
    if error_file.exists():
        raise rebuild_error(read_json(error_file))


def _run_here(function: WorkerFunction, context: StageContext, settings: dict) -> None:
    worker = plain_worker(context.runtime)
    setup_torch(worker, worker_threads(context.runtime))
    function(worker, context, settings)


def _launch_processes(function: WorkerFunction, context: StageContext, settings: dict) -> None:
    """torchrun's launcher: `num_workers` processes on this host, rendezvous on loopback, restarts as budgeted."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    launcher = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=context.runtime.num_workers,
        run_id=context.key or "genrec",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=context.runtime.max_failures,
        monitor_interval=0.5,
    )
    elastic_launch(launcher, _process_entry)(function, context, settings)


def _process_entry(function: WorkerFunction, context: StageContext, settings: dict) -> None:
    worker = plain_worker(context.runtime)
    setup_torch(worker, worker_threads(context.runtime))
    _run_reporting(function, worker, context, settings)


def _run_reporting(function: WorkerFunction, worker: Worker, context: StageContext, settings: dict) -> None:
    """Run on one worker of several; a typed error is left in a file for the process that launched."""
    error_file = context.scratch / ERROR_FILE
    if error_file.exists():  # started again after a typed error, which would only come again
        return
    try:
        function(worker, context, settings)
    except GenrecError as error:
        write_json(error_file, describe_error(error))
        raise  # a worker that merely returned would leave the others waiting in their next collective


def _launch_ray(function: WorkerFunction, context: StageContext, settings: dict) -> None:
    runtime = context.runtime
    ray = ensure_ray(runtime)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    use_gpu = bool(gpus_per_worker(runtime, ray))
    threads = worker_threads(runtime)
    trainer = TorchTrainer(
        _ray_entry,
        train_loop_config={
            "function": function,
            "context": context,
            "settings": settings,
            "threads": threads,
        },
        scaling_config=ScalingConfig(
            num_workers=runtime.num_workers, use_gpu=use_gpu, resources_per_worker=_resources(use_gpu)
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RunConfig(
            name=context.key,
            storage_path=str(context.scratch / "ray_train"),
            failure_config=_retries(FailureConfig, runtime),
        ),
    )
    trainer.fit()


def _retries(kind: Any, runtime: RuntimeConfig) -> Any:
    """Both retry budgets; a Ray too old to tell preemptions apart counts them as failures."""
    budgets = {"max_failures": runtime.max_failures, "max_preemption_failures": runtime.max_preemptions}
    known = inspect.signature(kind).parameters
    return kind(**{name: value for name, value in budgets.items() if name in known})


def _resources(use_gpu: bool) -> dict[str, float]:
    return {"CPU": 1.0, "GPU": 1.0} if use_gpu else {"CPU": 1.0}


def _ray_entry(config: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch

    ray_context = ray.train.get_context()
    context: StageContext = config["context"]
    worker = Worker(ray_context.get_world_rank(), ray_context.get_world_size(), ray.train.torch.get_device())
    setup_torch(worker, config["threads"])
    _run_reporting(config["function"], worker, context, config["settings"])


def last_line(error: BaseException) -> str:
    """Last non-empty line of an error's text: what is left of a remote traceback that matters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""


def describe_error(error: GenrecError) -> dict:
    """A typed error as JSON."""
    return {"type": type(error).__name__, "what": error.what} | {
        name: None if getattr(error, name) is None else str(getattr(error, name))
        for name in ("where", "got", "expected", "fix")
    }


def rebuild_error(record: dict) -> GenrecError:
    """The typed error that `describe_error` described."""
    kind = getattr(errors, record["type"], GenrecError)
    what = record["what"]
    return kind(what, **{k: record[k] for k in ("where", "got", "expected", "fix")})
