"""Separate hosts on one machine: network namespaces joined by a bridge, each with its address, name and Ray folder.

For tests of what only shows between hosts: addresses, cut cables, what listens where. Needs Linux, `ip` (iproute2) and
the right to make namespaces (root). The file system is shared, as over NFS, except `/tmp/ray` and `/etc/hosts`. Nothing
of the machine's own network is changed but for a bridge without an address; all of it goes when the block is left.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NETWORK = "10.77.0"
RAY_PORT = 6379
WITHIN = """
set -e
echo "$1" > /proc/sys/kernel/hostname
mount --bind "$2/ray" /tmp/ray
mount --bind "$3" /etc/hosts
shift 3
exec "$@"
"""
"""What a process of a host does first; `ip netns exec` has given it mounts of its own."""
FAST_HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}
"""Ray finds a host gone after some 10 seconds instead of half a minute."""
_numbers = itertools.count()


def hosts_refused() -> str | None:
    """Why namespaces cannot be made here, or None."""
    if shutil.which("ip") is None:
        return "needs `ip` (iproute2) for network namespaces"
    trial = f"genrec-trial-{os.getpid()}"
    made = _ip("netns", "add", trial, check=False)
    if made.returncode:
        return f"needs the right to make network namespaces (root): {made.stderr.strip()}"
    try:
        command = ["ip", "netns", "exec", trial, "unshare", "--uts", "mount", "--bind", "/tmp", "/tmp"]
        tried = subprocess.run(command, capture_output=True, text=True)
        return f"needs the right to mount: {tried.stderr.strip()}" if tried.returncode else None
    finally:
        _ip("netns", "del", trial)


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if check and done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done


@dataclass
class Host:
    """One host.

    Args:
        name: host name.
        address: in the common network.
        namespace: network namespace.
        link: the bridge's end of its cable.
        folder: its Ray folder and logs.
        hosts_file: addresses by name, the same on all.
        environment: variables of every process that is started on it.
    """

    name: str
    address: str
    namespace: str
    link: str
    folder: Path
    hosts_file: Path
    environment: dict[str, str]
    ray: subprocess.Popen | None = None
    ray_options: list[str] = field(default_factory=list)

    def command(self, command: Sequence[str]) -> list[str]:
        """The command line that runs a command on this host."""
        inside = ["sh", "-c", WITHIN, "sh", self.name, str(self.folder), str(self.hosts_file), *command]
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", *inside]

    def popen(self, command: Sequence[str], *, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen:
        """Start a command on this host."""
        environment = {**os.environ, **self.environment, **(env or {})}
        return subprocess.Popen(self.command(command), env=environment, **options)

    def run(self, command: Sequence[str], *, env: dict[str, str] | None = None, timeout: float = 120) -> Any:
        """Run a command on this host and wait: the finished process, output as text."""
        environment = {**os.environ, **self.environment, **(env or {})}
        return subprocess.run(self.command(command), env=environment, capture_output=True, text=True, timeout=timeout)

    def start_ray(self, *options: str) -> None:
        """Start this host's part of a Ray cluster; its output goes to ray.log."""
        self.ray_options = list(options)
        ray = str(Path(sys.executable).with_name("ray"))
        with open(self.folder / "ray.log", "ab") as log:
            self.ray = self.popen(
                [ray, "start", "--block", f"--node-ip-address={self.address}", *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    def cut(self) -> None:
        """Pull the cable: packets are lost in silence, nothing is closed."""
        _ip("link", "set", self.link, "down")

    def mend(self) -> None:
        """Plug the cable in again."""
        _ip("link", "set", self.link, "up")

    def revive_ray(self, timeout: float = 60) -> bool:
        """Start Ray again if it left, as a supervisor would: a node that was found dead ends itself when it hears so.

        Returns:
            Whether it had left within the time.
        """
        assert self.ray is not None
        try:
            self.ray.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        self.start_ray(*self.ray_options)
        return True

    def pids(self) -> list[int]:
        """Every process of this host."""
        found = _ip("netns", "pids", self.namespace, check=False).stdout.split()
        return [int(pid) for pid in found]

    def close(self) -> None:
        """End the host's processes, then its network."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            deadline = time.monotonic() + (10 if number == signal.SIGTERM else 5)
            while self.pids() and time.monotonic() < deadline:
                if self.ray is not None:
                    self.ray.poll()
                time.sleep(0.1)
        if self.ray is not None:
            self.ray.wait(10)
        _ip("link", "del", self.link, check=False)
        _ip("netns", "del", self.namespace, check=False)


@contextlib.contextmanager
def separate_hosts(count: int, folder: Path, environment: dict[str, str] | None = None) -> Iterator[list[Host]]:
    """Hosts `host-1` ... with the addresses 10.77.0.1 ..., each on a cable to one bridge.

    Args:
        count: number of hosts.
        folder: for their Ray folders and logs.
        environment: variables of every process of every host.
    """
    Path("/tmp/ray").mkdir(exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    tag = f"{os.getpid()}{chr(ord('a') + next(_numbers) % 26)}"
    bridge, hosts_file = f"gb{tag}", folder / "hosts"
    names = {f"host-{n}": f"{NETWORK}.{n}" for n in range(1, count + 1)}
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in names.items())]
    hosts_file.write_text("\n".join(lines) + "\n")
    hosts: list[Host] = []
    _ip("link", "add", bridge, "type", "bridge")
    try:
        _ip("link", "set", bridge, "up")
        for number, (name, address) in enumerate(names.items(), 1):
            host = Host(
                name,
                address,
                f"genrec-{tag}-{number}",
                f"gv{tag}{number}",
                folder / name,
                hosts_file,
                environment or {},
            )
            (host.folder / "ray").mkdir(parents=True)
            _ip("netns", "add", host.namespace)
            hosts.append(host)
            _ip("link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _ip("link", "set", host.link, "master", bridge, "up")
            _ip("-n", host.namespace, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", host.namespace, "link", "set", device, "up")
        yield hosts
    finally:
        for host in reversed(hosts):
            host.close()
        _ip("link", "del", bridge, check=False)
