"""Embedding over a Ray cluster: an engine in each actor of a Ray Data pool, shard numbers handed to them.

Ray restarts an actor whose process or node is lost and runs its task again; shards that are recorded are not computed
twice. When Ray gives up itself (every node gone, say), the rest is submitted anew: `runtime.max_failures` times without
progress.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import time
from collections.abc import Collection
from typing import Any

from genrec_dist.artifacts.embeddings import pending_shards
from genrec_dist.cluster import await_nodes, ensure_ray, quiet_ray_data
from genrec_dist.config import RuntimeConfig
from genrec_dist.errors import ClusterError, find_typed
from genrec_dist.pipeline import StageContext
from genrec_dist.semantic.worker import EmbedJob, ShardEmbedder

SHARDS_PER_TASK = 8
RETRY_SECONDS = 5.0
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "1073741824", "MALLOC_MMAP_THRESHOLD_": "1073741824"}
"""For engines on a CPU. Ray Data runs actors in a thread, whose glibc arena gives the memory of every large activation
back to the system and faults it in again: a fifth of the time was spent in that."""


def embed_with_ray(ctx: StageContext, job: EmbedJob, pending: list[int]) -> tuple[int, list[dict]]:
    """Embed shards, whatever happens to workers and nodes.

    Args:
        ctx: runtime settings and events.
        job: what to embed; threads of a worker are chosen here unless `runtime.num_threads` says them.
        pending: shard numbers.

    Returns:
        Number of workers, and one row a shard as `ShardEmbedder.embed_shards` gives them.

    Raises:
        ClusterError: too few cores or GPUs, or the retries are used up.
        GenrecError: what a worker raised.
    """
    runtime = ctx.runtime
    ray = ensure_ray(runtime)
    workers = max(1, min(runtime.num_embed_workers, len(pending)))
    gpus = gpus_of_worker(ray, runtime, workers)
    cores = cores_per_worker(ray, workers)
    threads = runtime.num_threads or (min(cores, os.cpu_count() or 1) if runtime.ray_address is None else cores)
    job = dataclasses.replace(job, num_threads=threads, expendable=True)
    run = _run_pool
    if runtime.embed_executor == "ray_data_llm":
        from genrec_dist.semantic.ray_llm import run_ray_llm

        run = run_ray_llm
    done: list[dict] = []
    failures, others = 0, set(pool_actors())
    while pending:
        try:
            try:
                done += run(job, pending, workers, min(threads, cores), gpus)
            finally:
                end_actors(ray, others)
        except Exception as error:
            cause = find_typed(error)
            logging.getLogger(__name__).error("a run of the embedding workers failed", exc_info=error)
            left = pending_shards(job.out, job.num_items, job.rows_per_shard)
            failures = 0 if len(left) < len(pending) else failures + 1
            if cause is not None or failures > runtime.max_failures:
                raise cause or lost_workers(error) from error
            ctx.event("embedding_restarted", pending=len(left), cause=f"{type(error).__name__}: {str(error)[:300]}")
            time.sleep(RETRY_SECONDS)
        pending = pending_shards(job.out, job.num_items, job.rows_per_shard)
    return workers, done


def pool_actors() -> dict[str, Any]:
    """Handles of Ray Data's pool workers that this process still has, by what they are called."""
    from ray.actor import ActorHandle

    handles = {repr(one): one for one in gc.get_objects() if type(one) is ActorHandle}
    return {name: handle for name, handle in handles.items() if name.startswith("Actor(MapWorker(")}


def end_actors(ray: Any, but: Collection[str]) -> None:
    """Kill pool workers that a run left, except those that were there before it.

    Ray Data ends its actors by forgetting them. As long as a frame of a traceback, a cycle that nobody has collected
    yet, or one of Ray Data's own threads refers to them, they keep their cores, and the next run waits for ever.

    Args:
        ray: the module.
        but: names of workers that stay. Names, because a handle that is kept would keep its actor.
    """
    for name, handle in pool_actors().items():
        if name not in but:
            ray.kill(handle)


def _run_pool(job: EmbedJob, pending: list[int], workers: int, cores: int, gpus: float) -> list[dict]:
    """One run of the actor pool over the pending shards."""
    from ray.data import ActorPoolStrategy, from_items

    quiet_ray_data()
    per_task = max(1, min(SHARDS_PER_TASK, len(pending) // (4 * workers)))
    num_tasks = -(-len(pending) // per_task)
    dataset = from_items([{"shard": shard} for shard in pending], override_num_blocks=num_tasks).map_batches(
        ShardEmbedder,
        fn_constructor_args=(job,),
        batch_size=None,  # a block: the shards of one task
        compute=ActorPoolStrategy(size=workers),  # a pool that shrinks at the end has no worker ready when one is lost
        # The shard numbers are handed over without tasks, so workers may reserve every core. More threads than
        # cores, if the user says so, must not leave a worker waiting for ever.
        num_cpus=cores,
        num_gpus=gpus,
        runtime_env={"env_vars": {} if gpus else MALLOC},
    )
    return dataset.take_all()


def cores_per_worker(ray: Any, workers: int) -> int:
    """Most cores that every worker can reserve at once; no worker spans two nodes.

    Raises:
        ClusterError: more workers than cores.
    """
    await_nodes(ray, lambda: _share(_cores(ray), workers) > 0)
    nodes = _cores(ray)
    share = _share(nodes, workers)
    if not share:
        raise ClusterError(
            "more embedding workers than cores in the Ray cluster",
            where="runtime.num_embed_workers",
            got=workers,
            expected=f"at most {sum(nodes)}",
            fix="lower it",
        )
    return share


def _cores(ray: Any) -> list[int]:
    """Of each node that is alive."""
    return [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]


def _share(nodes: list[int], workers: int) -> int:
    """Most cores that each of so many workers can have, 0 if they do not fit."""
    share = max(nodes, default=0)
    while share and sum(cores // share for cores in nodes) < workers:
        share -= 1
    return share


def gpus_of_worker(ray: Any, runtime: RuntimeConfig, workers: int) -> float:
    """`runtime.vllm.tensor_parallel_size` GPUs for each worker, or an equal part of one where there are fewer.

    Raises:
        ClusterError: a GPU is asked for and there is none, or too few for the tensor-parallel groups.
    """
    available = int(ray.cluster_resources().get("GPU", 0))
    group = runtime.vllm.tensor_parallel_size
    if runtime.device == "cuda" and not available:
        raise ClusterError(
            "no GPU in the Ray cluster",
            where="runtime.device",
            got=runtime.device,
            expected="at least one GPU",
            fix="set it to cpu or auto",
        )
    if runtime.device == "cpu" or not available:
        return 0.0
    if group > 1:
        if group * workers > available:
            raise ClusterError(
                "not enough GPUs for the tensor-parallel groups",
                where="runtime.vllm.tensor_parallel_size",
                got=f"{workers} workers of {group} GPUs, {available} in the cluster",
                expected=f"at most {available // group} workers",
                fix="lower runtime.num_embed_workers or the group's size",
            )
        return float(group)
    return 1 / -(-workers // available)


def lost_workers(error: BaseException) -> ClusterError:
    """What the user reads when Ray failed and the retries are used up."""
    return ClusterError(
        "embedding workers failed",
        where="semantic",
        got=f"{type(error).__name__}: {str(error)[-500:]}",
        fix="run the same command again to continue; runtime.backend=local shows the error undistributed",
    )
