"""Checks of `genrec doctor --address`: are all nodes alike, do they reach each other, does a token guard them?"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from genrec_dist.config import RuntimeConfig
from genrec_dist.errors import GenrecError
from launcher.doctor import MIN_DISK_GIB, Check
from launcher.doctor_probe import REDUCE_SECONDS, Probe, scope
from launcher.streams import captured

ANSWER_SECONDS = 60.0
MAX_SKEW_SECONDS = 2.0
DASHBOARD_PORT = 8265
INTERFACE = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}
INTRUDER = """
import sys, ray
ray.init(address=sys.argv[1], logging_level="CRITICAL", log_to_driver=False)
print("accepted")
"""


def examine_cluster(address: str, places: dict[str, str]) -> list[Check]:
    """All checks of a cluster and of what its nodes share.

    Args:
        address: HOST:PORT of the head.
        places: folder or URL of store and runs, by option.
    """
    from launcher.doctor_storage import storage

    with tempfile.TemporaryDirectory(prefix="genrec-") as folder, captured(Path(folder) / "ray.log"):
        from genrec_dist.cluster import ensure_ray, leave_ray

        accepted = accepts_any_token(address)
        try:
            nodes = Nodes(ensure_ray(RuntimeConfig(ray_address=address)))
            checks = [*nodes.checks(), guarded("Ray sockets", accepted, nodes.sockets() or [as_reached(address)])]
            return checks + list(storage(places, list(nodes.seen), nodes.ask))
        except GenrecError as error:
            found = f"{error.what}: {error.got}"[:500]
            return [Check("cluster", "missing", found, str(error.expected or ""), error.fix or "")]
        finally:
            leave_ray()


def accepts_any_token(address: str) -> bool:
    """Whether a driver with a made-up token gets in."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH_TOKEN")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    try:
        command = [sys.executable, "-c", INTRUDER, address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 and "accepted" in done.stdout


def as_reached(address: str) -> dict:
    """The head's socket as the address tells it; probes do not run where one side asks for a token and one does not."""
    host, _, port = address.rpartition(":")
    try:
        ip = socket.gethostbyname(host)
    except OSError:
        ip = "0.0.0.0"
    where = "loopback" if scope(ip) == "loopback" else "all"
    return {"who": "GCS", "address": ip, "port": port, "scope": where, "mode": "unknown"}


def guarded(label: str, accepted: bool, sockets: list[dict]) -> Check:
    """One line on what listens, and whether a token guards it.

    Args:
        label: of the line.
        accepted: a driver without the token gets in.
        sockets: as of `ray_sockets`.
    """
    count = Counter((one["who"], one["scope"]) for one in sockets)
    found = ", ".join(f"{who} on {where}" + f" ({n})" * (n > 1) for (who, where), n in sorted(count.items()))
    wide = [one for one in sockets if one["scope"] in ("all", "public")]
    if accepted and wide:
        one = min(wide, key=lambda one: one["who"] == "agent or worker")  # the ways in that people know first
        return Check(
            label,
            "missing",
            f"no token is asked for, and {one['who']} listens on {one['address']}:{one['port']}",
            "a token wherever Ray can be reached from outside",
            "start Ray with RAY_AUTH_MODE=token and a token on every node: who reaches it now runs code there",
        )
    if accepted:
        fix = "start Ray with RAY_AUTH_MODE=token: everybody on this machine runs code there"
        return Check(label, "warning", f"no token is asked for; {found}", "a token", fix)
    api = [one for one in wide if one["who"] == "dashboard and Jobs" and one["port"] == DASHBOARD_PORT]
    if api:
        fix = "start the head with --dashboard-host=127.0.0.1 and forward the port through ssh: it is not encrypted"
        return Check(label, "warning", f"the dashboard listens on {api[0]['address']}; {found}", "loopback", fix)
    public = [one for one in wide if one["scope"] == "public"]
    if public:
        fix = "use addresses of a private network, or a firewall"
        return Check(label, "warning", f"{public[0]['address']} is public; {found}", "a private network", fix)
    return Check(label, "ok", found or "nothing", "a token, and a private network")


def listening_here(sockets: list[dict]) -> Check:
    """The same for Ray processes of this machine, by the mode that they were started with."""
    loose = [one for one in sockets if one["mode"] not in ("token", "unknown")]
    return guarded("Ray listening here", bool(loose), loose or sockets)


class Nodes:
    """A probe on every node of a cluster.

    Args:
        ray: the module, connected.

    Attributes:
        seen: what each node's probe says of it, by the node's name; after `checks`.
    """

    def __init__(self, ray: Any) -> None:
        self.ray = ray
        alive = {f"{n['NodeManagerHostname']} ({n['NodeManagerAddress']})": n for n in ray.nodes() if n["Alive"]}
        self.addresses = {name: node["NodeManagerAddress"] for name, node in alive.items()}
        self.gpus = {name: int(node["Resources"].get("GPU", 0)) for name, node in alive.items()}
        self._ids = {name: node["NodeID"] for name, node in alive.items()}
        self.probes = {name: self._probe(name) for name in alive}
        self.seen: dict[str, dict] = {}

    def _probe(self, name: str, gpus: int = 0) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        place = NodeAffinitySchedulingStrategy(self._ids[name], soft=False)
        return self.ray.remote(Probe).options(num_cpus=0, num_gpus=gpus, scheduling_strategy=place).remote()

    def ask(
        self,
        method: str,
        arguments: dict[str, tuple],
        probes: dict[str, Any] | None = None,
        seconds: float = ANSWER_SECONDS,
    ) -> dict[str, object]:
        """Answers by node; of one that does not answer in time, or raises, the exception."""
        probes = self.probes if probes is None else probes
        waiting = {name: getattr(probes[name], method).remote(*given) for name, given in arguments.items()}
        if waiting:
            self.ray.wait(list(waiting.values()), num_returns=len(waiting), timeout=seconds)
        answers: dict[str, object] = {}
        for name, one in waiting.items():
            try:
                answers[name] = self.ray.get(one, timeout=0.5)
            except Exception as error:
                answers[name] = error
        return answers

    def checks(self) -> Iterator[Check]:
        """Nodes, versions, GPUs, clocks, disks, collectives."""
        for name, answer in self.ask("look", dict.fromkeys(self.probes, ())).items():
            if isinstance(answer, dict):
                self.seen[name] = answer
            else:
                fix = "see the node's Ray logs, and start Ray there again"
                yield Check(f"node {name}", "missing", _short(answer), f"an answer in {ANSWER_SECONDS:g} s", fix)
        silent = len(self.probes) - len(self.seen)
        yield Check("nodes", "missing" if silent else "ok", ", ".join(self.seen) or "none answers")
        yield self._versions()
        yield Check("GPUs of nodes", "ok", "; ".join(f"{n}: {_list(s['gpus'])}" for n, s in self.seen.items()))
        yield self._clocks()
        for name, seen in self.seen.items():
            enough = seen["free_gib"] >= MIN_DISK_GIB
            found, fix = f"{seen['free_gib']:.1f} GiB free", "" if enough else "free space for Ray"
            yield Check(f"disk of {name}", "ok" if enough else "warning", found, f">={MIN_DISK_GIB:g} GiB free", fix)
        yield self._reduce("gloo", 0)
        if sum(count > 0 for count in self.gpus.values()) > 1:
            yield self._reduce("nccl", 1)

    def sockets(self) -> list[dict]:
        """What Ray listens on, on all nodes."""
        return [one for seen in self.seen.values() for one in seen["sockets"]]

    def _versions(self) -> Check:
        mine = Probe().look()["versions"]
        wrong = [
            f"{node}: {name} {found}, here {mine[name]}"
            for node, seen in self.seen.items()
            for name, found in seen["versions"].items()
            if found != mine[name]
        ]
        if wrong:
            fix = "install the same lock file on every node"
            return Check("versions", "missing", "; ".join(wrong), "equal on every node", fix)
        return Check("versions", "ok", ", ".join(f"{k} {v}" for k, v in mine.items()), "equal on every node")

    def _clocks(self) -> Check:
        """How far each node's clock is from this one's, less what the way of the question may explain."""
        skew = {}
        for name in self.seen:
            before = time.time()
            answer = self.ask("now", {name: ()})[name]
            after = time.time()
            if isinstance(answer, float):
                skew[name] = max(before - answer, answer - after, 0.0)
        worst = max(skew, key=lambda name: skew[name], default="")
        late = bool(worst) and skew[worst] > MAX_SKEW_SECONDS
        found = f"at least {skew[worst]:.1f} s apart: {worst}" if late else "no difference that matters"
        fix = "run a time service (chrony) on every node" if late else ""
        return Check("clocks", "warning" if late else "ok", found, f"within {MAX_SKEW_SECONDS:g} s", fix)

    def _reduce(self, backend: str, gpus: int) -> Check:
        """One all-reduce over all nodes; if it fails, one with each node, to say which cannot be reached."""
        names = [name for name in self.seen if self.gpus[name] >= gpus]
        label, needed = f"{backend} between nodes", f"an all-reduce within {REDUCE_SECONDS} s"
        if len(names) < 2:
            return Check(label, "ok", "one node", needed)
        problem = self._meet(backend, names, gpus)
        if not problem:
            return Check(label, "ok", f"{len(names)} nodes", needed)
        bad = [name for name in names[1:] if len(names) > 2 and self._meet(backend, [names[0], name], gpus)]
        found = f"{names[0]} does not reach {', '.join(bad) or 'the others'}: {problem}"
        fix = f"open all ports between the nodes, check host names in /etc/hosts or DNS, or set {INTERFACE[backend]}"
        return Check(label, "missing", found, needed, fix)

    def _meet(self, backend: str, names: list[str], gpus: int) -> str:
        """What went wrong, or nothing. Probes of their own: one that hangs must not be asked again."""
        probes = {name: self._probe(name, gpus) for name in names}
        try:
            first = self.addresses[names[0]]
            port = self.ask("free_port", {names[0]: (first,)}, probes)[names[0]]
            given = {name: (backend, rank, len(names), f"{first}:{port}") for rank, name in enumerate(names)}
            answers = self.ask("reduce", given, probes, seconds=ANSWER_SECONDS + REDUCE_SECONDS)
        finally:
            for probe in probes.values():
                self.ray.kill(probe)
        wrong = [f"{name}: {_short(answer)}" for name, answer in answers.items() if answer != float(len(names))]
        return "; ".join(wrong[:3])


def _list(gpus: list[str]) -> str:
    return ", ".join(gpus) or "none"


def _short(answer: object) -> str:
    lines = [line.strip() for line in str(answer).splitlines() if line.strip()]
    return f"{type(answer).__name__}: {lines[-1][:200]}" if lines else type(answer).__name__
