"""A worker function under Ray Train, started again as the budgets allow.

Ray Train's own retries are off: it tells the loss of a node from a crash only if the node was drained first, and does
not say why it started again. Here a node that is gone, or was drained, is a preemption; a worker that died on a node
that lives is a failure.

`fit` blocks the driver's main thread in `ray.get`, where Python's signal handlers do run. The one for SIGTERM writes
the stop file and nothing else, so `fit` returns when the workers have saved and left.
"""

from __future__ import annotations

import time
from typing import Any

from genrec_dist.cluster import ensure_ray, gpus_per_worker, worker_threads
from genrec_dist.config import RuntimeConfig
from genrec_dist.errors import ClusterError, Preempted, error_chain
from genrec_dist.pipeline import StageContext
from genrec_dist.training import attempts
from genrec_dist.training.attempts import Cause, Retries, last_line
from genrec_dist.training.entry import WorkerFunction, exhausted, run_reporting
from genrec_dist.training.stopping import OnSigterm, ask_to_stop, stopped_file
from genrec_dist.training.worker import Worker, setup_torch

RESIZE_SECONDS = 60.0  # between looks whether an elastic group can grow
COUNT_SECONDS = 21.0  # until Ray counts the nodes again; before, a group would wait a minute for the lost one
NODE_SECONDS = 20.0  # until Ray's head notices that a node is gone


class _AskWorkers(OnSigterm):
    """SIGTERM of the driver becomes the stop file."""

    def __init__(self, context: StageContext) -> None:
        super().__init__(context.runtime.grace_seconds)
        self.context = context

    def react(self) -> None:
        ask_to_stop(self.context)

    def pause(self, seconds: float) -> None:
        """Wait, but not for a process that has been told to stop."""
        deadline = time.monotonic() + seconds
        while not self.received and time.monotonic() < deadline:
            time.sleep(0.2)


def launch_ray(function: WorkerFunction, context: StageContext, settings: dict) -> None:
    """Run the function in Ray Train's workers and wait.

    Raises:
        GenrecError: of a worker.
        TrainingError: a budget is spent.
        Preempted: SIGTERM came, and the workers had their grace.
    """
    ray = ensure_ray(context.runtime)
    from ray.train import TrainingFailedError

    retries = Retries(context)
    attempts.prepare(context)
    with _AskWorkers(context) as asked:
        while True:
            try:
                _trainer(ray, function, context, settings, retries.attempt).fit()
            except TrainingFailedError as error:
                if asked.received:
                    raise Preempted from error
                typed = attempts.typed_failure(context)
                if typed is not None:
                    raise typed from error
                cause = _explain(ray, context, error)
                if not retries.spend(cause):
                    raise exhausted(context, cause) from error
                if cause.name == "node_lost" and context.runtime.min_workers:
                    asked.pause(COUNT_SECONDS)
            else:
                if asked.received or stopped_file(context).exists():
                    raise Preempted
                return
            attempts.prepare(context)
            if asked.received:  # it came while the attempt was cleared away
                raise Preempted


def _trainer(ray: Any, function: WorkerFunction, context: StageContext, settings: dict, attempt: int) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    runtime = context.runtime
    use_gpu = bool(gpus_per_worker(runtime, ray))
    return TorchTrainer(
        _ray_entry,
        train_loop_config={
            "function": function,
            "context": context,
            "settings": settings,
            "threads": worker_threads(runtime),
        },
        scaling_config=ScalingConfig(
            use_gpu=use_gpu, resources_per_worker=_resources(use_gpu), **_group_size(ScalingConfig, runtime)
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RunConfig(
            name=f"{context.key}-{attempt}",
            storage_path=str(context.scratch / "ray_train"),
            failure_config=_no_retries(FailureConfig),
        ),
    )


def _group_size(kind: Any, runtime: RuntimeConfig) -> dict[str, Any]:
    """Ray Train's settings for a group of fixed size, or of one that follows the cluster."""
    if not runtime.min_workers:
        return {"num_workers": runtime.num_workers}
    if "elastic_resize_monitor_interval_s" not in kind.__dataclass_fields__:
        raise ClusterError(
            "this Ray Train cannot change the number of workers",
            where="runtime.min_workers",
            got=runtime.min_workers,
            expected="0",
            fix="install a newer Ray (2.60 can), or leave it out",
        )
    return {
        "num_workers": (runtime.min_workers, runtime.num_workers),
        "elastic_resize_monitor_interval_s": RESIZE_SECONDS,
    }


def _no_retries(kind: Any) -> Any:
    """Ray Train's budgets at zero; a Ray that tells preemptions apart has two."""
    names = {"max_failures", "max_preemption_failures"} & set(kind.__dataclass_fields__)
    return kind(**dict.fromkeys(names, 0))


def _resources(use_gpu: bool) -> dict[str, float]:
    return {"CPU": 1.0, "GPU": 1.0} if use_gpu else {"CPU": 1.0}


def _ray_entry(config: dict[str, Any]) -> None:
    import ray
    import ray.train
    import ray.train.torch

    ray_context = ray.train.get_context()
    worker = Worker(ray_context.get_world_rank(), ray_context.get_world_size(), ray.train.torch.get_device())
    setup_torch(worker, config["threads"])
    node = ray.get_runtime_context().get_node_id()
    try:
        run_reporting(config["function"], worker, config["context"], config["settings"], node)
    except Preempted:  # the driver reads the file that says so; for Ray all went well
        return


def _explain(ray: Any, context: StageContext, error: BaseException) -> Cause:
    """What a failed `fit` means."""
    if type(error).__name__ == "PreemptionError":
        return Cause("node_lost", last_line(error))
    failed = getattr(error, "worker_failures", {})
    dead = {rank: found for rank, one in failed.items() if (found := _death(one)) is not None}
    if any(found.preempted for found in dead.values()):
        rank, found = next((r, f) for r, f in dead.items() if f.preempted)
        return Cause("node_lost", last_line(found), {"rank": rank})
    lost = _lost_nodes(ray, context, wait=bool(dead))
    if lost:
        return Cause("node_lost", f"lost with ranks {sorted(lost)}", {"rank": min(lost), "node": lost[min(lost)]})
    hung = attempts.hung(context)
    if hung is not None:
        return hung
    if dead:
        rank, found = next(iter(dead.items()))
        return Cause("worker_died", last_line(found), {"rank": rank})
    said = attempts.failures(context)
    if said:
        rank = min(said)
        return Cause("error", said[rank], {"rank": rank})
    return Cause("error", f"{type(error).__name__}: {last_line(error)}")


def _death(error: BaseException) -> Any:
    """The RayActorError inside the error of a worker, if its process is gone."""
    from ray.exceptions import RayActorError

    inner = getattr(error, "health_check_failure", None)
    chain = [*error_chain(error), *(error_chain(inner) if isinstance(inner, BaseException) else ())]
    return next((one for one in chain if isinstance(one, RayActorError)), None)


def _lost_nodes(ray: Any, context: StageContext, wait: bool) -> dict[int, str]:
    """Nodes of this attempt's workers that are gone, by rank.

    Args:
        ray: the module.
        context: of the stage.
        wait: a worker's process is gone, and its node may be found to be gone too a little later.
    """
    nodes = {record["rank"]: record["node"] for record in attempts.workers(context)}
    deadline = time.monotonic() + (NODE_SECONDS if wait and len(set(nodes.values())) > 1 else 0)
    while True:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        lost = {rank: node for rank, node in nodes.items() if node not in alive}
        if lost or time.monotonic() >= deadline:
            return lost
        time.sleep(0.5)
