"""Starting and leaving Ray: private on this machine, or by address. Token authentication is always on.

Ray's own processes listen on loopback only when Ray is private (PyTorch's rendezvous store of a training picks its
own interface), and a private Ray uses a token made for this process. Ray reads RAY_AUTH_MODE when it is
imported, so the package's own `__init__` sets it.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from genrec_dist.config import RuntimeConfig
from genrec_dist.errors import ClusterError

_started_here = False
NODE_WAIT_SECONDS, NODE_POLL_SECONDS = 60.0, 1.0
"""How long a stage that starts without enough nodes waits for one that was lost, and how often it looks."""


def worker_threads(runtime: RuntimeConfig) -> int:
    """CPU threads of one training or evaluation worker."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", runtime.num_workers))  # torchrun's workers may be on several hosts
    return runtime.num_threads or max(1, (os.cpu_count() or 1) // here)


def ensure_ray(runtime: RuntimeConfig) -> Any:
    """Return the `ray` module with a live session, starting or joining one if needed.

    Raises:
        ClusterError: Ray cannot be started or the address does not answer.
    """
    global _started_here
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if runtime.ray_address is None and not token_present():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray

    if ray.is_initialized():
        return ray
    options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": True}
    if runtime.ray_address is None:
        options |= {
            "address": "local",
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
            "num_cpus": max(os.cpu_count() or 1, runtime.num_workers, runtime.num_embed_workers),
            "object_store_memory": _object_store_bytes(),
        }
    else:
        options["address"] = runtime.ray_address
    root = str(Path(__file__).resolve().parents[1])
    python_path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
    options["runtime_env"] = {"env_vars": {"PYTHONPATH": python_path}}
    try:
        with loopback_only(_is_here(runtime.ray_address)):
            ray.init(**options)
    except Exception as error:
        raise ClusterError(
            "Ray could not be started" if runtime.ray_address is None else "Ray cluster does not answer",
            where="runtime.ray_address",
            got=f"{type(error).__name__}: {error}",
            expected=runtime.ray_address or "a private Ray on this machine",
            fix="check memory and ports, `genrec doctor`, or set runtime.backend=local",
        ) from error
    _started_here = True
    return ray


@contextmanager
def loopback_only(private: bool = True) -> Iterator[None]:
    """Let a private Ray, or the nodes of a cluster on this machine, bind to 127.0.0.1.

    `ray.init` replaces a loopback node address by the machine's reachable one, and then listens on every
    interface. Its processes bind to loopback when they are given 127.0.0.1, so the replacement is held off.
    """
    from ray._private import services

    original = services.resolve_ip_for_localhost
    if private:
        services.resolve_ip_for_localhost = lambda host: host
    try:
        yield
    finally:
        services.resolve_ip_for_localhost = original


def _is_here(address: str | None) -> bool:
    """True for a private Ray, and for one that was started on the loopback address."""
    return address is None or address.startswith(("127.0.0.1:", "localhost:"))


def token_present() -> bool:
    """True when Ray will find a token: in the environment, or in a file."""
    return bool(
        os.environ.get("RAY_AUTH_TOKEN")
        or os.environ.get("RAY_AUTH_TOKEN_PATH")
        or (Path.home() / ".ray" / "auth_token").exists()
    )


def _object_store_bytes() -> int:
    import psutil

    return int(min(2 << 30, psutil.virtual_memory().available // 4))


def await_nodes(ray: Any, enough: Callable[[], bool]) -> None:
    """Where the cluster has less than is asked for and has lost a node, wait a while: it may be on its way back."""
    deadline = time.monotonic() + NODE_WAIT_SECONDS
    while not enough() and time.monotonic() < deadline and not all(node["Alive"] for node in ray.nodes()):
        time.sleep(NODE_POLL_SECONDS)


def gpus_per_worker(runtime: RuntimeConfig, ray: Any) -> int:
    """1 when every worker can have a GPU of its own, else 0.

    Raises:
        ClusterError: `runtime.device` asks for GPUs that the cluster does not have.
    """
    if runtime.device == "cpu":
        return 0
    wanted = runtime.min_workers or runtime.num_workers
    gpus = lambda: ray.cluster_resources().get("GPU", 0)  # noqa: E731
    if gpus() or runtime.device == "cuda":
        await_nodes(ray, lambda: gpus() >= wanted)
    available = gpus()
    if available >= wanted:
        return 1
    if runtime.device == "cuda":
        raise ClusterError(
            "not enough GPUs in the Ray cluster",
            where="runtime.device",
            got=f"{available:.0f} GPUs for {runtime.num_workers} workers",
            expected="one GPU a worker",
            fix="lower runtime.num_workers, add nodes, or set runtime.device=auto to allow the CPU",
        )
    return 0


def quiet_ray_data() -> None:
    """Keep Ray Data's bars and notices off the terminal; errors of workers still come through, with their type."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it warns that its progress bars are off


def leave_ray() -> None:
    """Shut down the session that this process started, if any."""
    global _started_here
    if _started_here:
        import ray

        ray.shutdown()
        _started_here = False
