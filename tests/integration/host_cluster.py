"""A Ray cluster of three separate hosts, with a token, for the tests that ask for it."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from genrec_dist.testing.hosts import FAST_HEALTH, RAY_PORT, Host, separate_hosts

ROOT = Path(__file__).resolve().parents[2]
NODES = """
import sys, time, ray
ray.init(address=sys.argv[1], logging_level="ERROR")
deadline = time.monotonic() + 60
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]):
    assert time.monotonic() < deadline, ray.nodes()
    time.sleep(0.2)
"""


@contextmanager
def host_cluster(folder: Path) -> Iterator[list[Host]]:
    """A head without workers' cores, and two hosts with one each."""
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        **FAST_HEALTH,
    }
    with separate_hosts(3, folder, environment) as hosts:
        memory = f"--object-store-memory={150 << 20}"
        hosts[0].start_ray(
            "--head",
            f"--port={RAY_PORT}",
            "--num-cpus=0",
            memory,
            "--dashboard-host=127.0.0.1",
            "--include-dashboard=1",
        )
        until(lambda: "Ray runtime started" in (hosts[0].folder / "ray.log").read_text(), 60)
        for host in hosts[1:]:
            host.start_ray(f"--address={hosts[0].address}:{RAY_PORT}", "--num-cpus=1", memory)
        wait_for_nodes(hosts, 3)
        yield hosts


def until(condition: Callable[[], bool], seconds: float, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        assert process is None or process.poll() is None, "the run ended before"
        time.sleep(0.05)


def wait_for_nodes(hosts: list[Host], count: int) -> None:
    done = hosts[0].run([sys.executable, "-c", NODES, f"{hosts[0].address}:{RAY_PORT}", str(count)])
    assert done.returncode == 0, done.stderr
