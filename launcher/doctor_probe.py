"""What `genrec doctor` does on a node: look, write, read, reduce. An actor of Ray runs it, the driver its own half."""

from __future__ import annotations

import importlib.metadata
import ipaddress
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import psutil

COMPARED = ("ray", "torch", "deepspeed", "numpy", "pyarrow")
REDUCE_SECONDS = 30


def scope(address: str) -> str:
    """Who can reach what is bound to an address: 'loopback', 'private', 'all' (interfaces) or 'public'."""
    found = ipaddress.ip_address(address)
    found = getattr(found, "ipv4_mapped", None) or found
    if found.is_unspecified:
        return "all"
    if found.is_loopback:
        return "loopback"
    return "private" if found.is_private or found.is_link_local else "public"


def ray_sockets() -> list[dict]:
    """Listening TCP sockets of this machine's Ray processes: who, address, port, scope, mode of authentication.

    Only the C++ processes tell the mode that they were started with; Python's write their titles over it. Processes of
    other users are not seen.
    """
    found = []
    for process in psutil.process_iter():
        try:
            who = _ray_part(process)
            if who is None:
                continue
            listening = [c.laddr for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
            mode = process.environ().get("RAY_AUTH_MODE", "") if who in ("GCS", "raylet") else "unknown"
        except psutil.Error:  # gone, or another user's
            continue
        for one in listening:
            found.append({"who": who, "address": one.ip, "port": one.port, "scope": scope(one.ip), "mode": mode})
    return found


def _ray_part(process: psutil.Process) -> str | None:
    """Which part of Ray a process is, None if it is none."""
    name, words = process.name(), process.cmdline()
    text = " ".join(words)
    if "ray.util.client.server" in text:
        return "Ray client server"
    if name in ("gcs_server", "raylet"):
        return "GCS" if name == "gcs_server" else name
    if "/ray/autoscaler/" in text:
        return "autoscaler"
    if "/ray/dashboard/dashboard.py" in text or text.startswith("ray-dashboard"):
        return "dashboard and Jobs"
    if "/ray/_private/" in text or "/ray/dashboard/" in text or text.startswith("ray::"):
        return "agent or worker"
    return None


class Probe:
    """One node's half of the checks."""

    def look(self) -> dict:
        """Versions, GPUs, disk and sockets of this node."""
        from genrec_dist import __version__

        versions = {"python": platform.python_version(), "genrec_dist": __version__}
        for name in COMPARED:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = "absent"
        return {
            "versions": versions,
            "gpus": _gpus(),
            "free_gib": shutil.disk_usage(tempfile.gettempdir()).free / 2**30,
            "sockets": ray_sockets(),
        }

    def now(self) -> float:
        """Seconds of this node's clock."""
        return time.time()

    def write(self, file: str, text: str) -> str:
        """Write a file; what went wrong, or nothing."""
        try:
            Path(file).write_text(text)
            return ""
        except OSError as error:
            return f"{type(error).__name__}: {error.strerror}"

    def read(self, file: str, seconds: float = 10) -> str:
        """A file's text, or what went wrong; waits for the file, since file systems of a network show new ones late."""
        deadline = time.monotonic() + seconds
        while not Path(file).exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        try:
            return Path(file).read_text()
        except OSError as error:
            return f"{type(error).__name__}: {error.strerror}"

    def free_port(self, address: str) -> int:
        """A port that was free just now."""
        with socket.socket() as found:
            found.bind((address, 0))
            return found.getsockname()[1]

    def reduce(self, backend: str, rank: int, world_size: int, meeting: str) -> float:
        """Add up ones over all nodes, through the collectives that a training uses.

        Raises:
            RuntimeError: of torch; the others cannot be reached.
        """
        import torch
        import torch.distributed as dist

        limit = timedelta(seconds=REDUCE_SECONDS)
        dist.init_process_group(backend, f"tcp://{meeting}", rank=rank, world_size=world_size, timeout=limit)
        try:
            ones = torch.ones(1, device="cuda" if backend == "nccl" else "cpu")
            dist.all_reduce(ones)
            return ones.item()
        finally:
            dist.destroy_process_group()


def _gpus() -> list[str]:
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []
