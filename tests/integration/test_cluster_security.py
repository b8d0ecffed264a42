"""A cluster of separate hosts: what it lets in without its token, what listens, and what the doctor says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from host_cluster import ROOT, until

from genrec_dist.testing.hosts import RAY_PORT, Host

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
HEAD = f"10.77.0.1:{RAY_PORT}"
DASHBOARD = "http://127.0.0.1:8265"
DOCUMENTED = {
    ("GCS", "all"), ("raylet", "all"), ("agent or worker", "all"), ("agent or worker", "private"),
    ("agent or worker", "loopback"), ("dashboard and Jobs", "loopback"), ("dashboard and Jobs", "all"),
    ("Ray client server", "loopback"), ("Ray client server", "private"), ("autoscaler", "all"),
}  # fmt: skip
"""Who listens where, as docs/security.md says; of the dashboard, 'all' is its metrics."""
DRIVER = f"import ray; ray.init(address='{HEAD}', logging_level='CRITICAL'); print(ray.get(ray.put('inside')))"
CLIENT = "import ray; ray.init('ray://10.77.0.1:10001'); print(ray.get(ray.put('inside')))"
JOB = (
    f"from ray.job_submission import JobSubmissionClient as C; c = C('{DASHBOARD}'); "
    "print('inside', c.submit_job(entrypoint='true'))"
)
API = f"""
import urllib.request, urllib.error
for path in ("/api/jobs/", "/api/cluster_status", "/nodes?view=summary", "/api/v0/actors", "/logs"):
    try:
        print(path, urllib.request.urlopen("{DASHBOARD}" + path, timeout=10).status)
    except urllib.error.HTTPError as error:
        print(path, error.code)
"""
SOCKETS = """
import json, psutil
from launcher.doctor_probe import ray_sockets
here = {c.laddr.port: c.pid for c in psutil.net_connections("tcp") if c.status == "LISTEN"}
print(json.dumps({"ray": ray_sockets(), "all": sorted(here)}))
"""
NO_TOKEN = {"RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": "", "HOME": "/nonexistent"}
WRONG = {"RAY_AUTH_TOKEN": "f" * 64}
OFF = NO_TOKEN | {"RAY_AUTH_MODE": "disabled"}


def python(host: Host, code: str, env: dict[str, str] | None = None):
    return host.run([sys.executable, "-c", code], env=env, timeout=100)


def doctor(host: Host, *options: str) -> tuple[int, dict[str, dict]]:
    command = [sys.executable, "-m", "launcher.cli", "doctor", "--json", *options]
    done = host.run(command, timeout=400)
    assert done.stdout, done.stderr
    return done.returncode, {check["name"]: check for check in json.loads(done.stdout)}


@pytest.mark.parametrize("code", [DRIVER, CLIENT, JOB], ids=["driver", "client", "job"])
def test_only_the_token_gets_in(cluster, code):
    allowed = python(cluster[0], code)
    assert "inside" in allowed.stdout, allowed.stderr[-3000:]
    for environment in (NO_TOKEN, WRONG, OFF):
        refused = python(cluster[0], code, environment)
        assert refused.returncode != 0
        assert "inside" not in refused.stdout


def test_the_dashboard_tells_nothing_without_the_token(cluster):
    lines = python(cluster[0], API).stdout.splitlines()
    assert len(lines) == 5
    assert all(line.endswith((" 401", " 403")) for line in lines), lines


def test_nothing_listens_beyond_what_is_documented(cluster):
    python(cluster[0], JOB)  # starts what jobs need
    for host in cluster:
        found = json.loads(python(host, SOCKETS).stdout)
        assert {(one["who"], one["scope"]) for one in found["ray"]} <= DOCUMENTED
        assert found["all"] == sorted({one["port"] for one in found["ray"]})  # nobody else listens
        assert {one["mode"] for one in found["ray"]} <= {"token", "unknown"}
        api = [one["scope"] for one in found["ray"] if one["port"] == 8265]
        assert api == (["loopback"] if host is cluster[0] else [])


def test_a_driver_without_the_token_ends_with_code_4(tmp_path, cluster):
    (tmp_path / "a.yaml").write_text(f"catalog: {{source: synthetic}}\nruntime: {{ray_address: '{HEAD}'}}\n")
    command = [sys.executable, "-m", "launcher.cli", "run", str(tmp_path / "a.yaml")]
    done = cluster[0].run([*command, "--store", str(tmp_path / "s"), "--runs", str(tmp_path / "r")], env=WRONG)
    assert done.returncode == 4, done.stdout + done.stderr


def test_the_doctor_of_a_sound_cluster(tmp_path, cluster):
    code, checks = doctor(
        cluster[0], "--address", HEAD, "--store", str(tmp_path / "store"), "--runs", str(tmp_path / "runs")
    )
    wanted = ["nodes", "versions", "clocks", "gloo between nodes", "Ray sockets", "--store", "--runs"]
    assert {name: checks[name]["state"] for name in wanted} == dict.fromkeys(wanted, "ok"), checks
    assert checks["gloo between nodes"]["found"] == "3 nodes"
    assert "3 nodes" in checks["--store"]["found"]
    assert not list(tmp_path.rglob(".genrec-doctor-*"))
    assert code == (4 if any(check["state"] == "missing" for check in checks.values()) else 0)


def test_the_doctor_finds_a_folder_that_is_not_shared(cluster):
    code, checks = doctor(cluster[0], "--address", HEAD, "--store", "/tmp/ray/store")  # each host has its own
    assert code == 4
    assert checks["--store"]["state"] == "missing"
    assert "host-2" in checks["--store"]["found"]
    assert "host-3" in checks["--store"]["found"]


def test_the_doctor_refuses_a_cluster_without_a_token(tmp_path, cluster):
    host, port = cluster[2], 7001
    ray = str(Path(sys.executable).with_name("ray"))
    options = [f"--port={port}", "--num-cpus=1", f"--object-store-memory={100 << 20}", "--include-dashboard=false"]
    ports = ["--min-worker-port=21000", "--max-worker-port=21100", "--ray-client-server-port=21200"]
    with open(tmp_path / "open.log", "w") as log:
        loose = host.popen(
            [ray, "start", "--head", "--block", f"--node-ip-address={host.address}", *options, *ports],
            env=OFF | {"PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
        )
    try:
        until(lambda: "Ray runtime started" in (tmp_path / "open.log").read_text(), 60, loose)
        code, checks = doctor(host)
        assert code == 4
        assert checks["Ray listening here"]["state"] == "missing"
        assert "no token is asked for" in checks["Ray listening here"]["found"]
        code, checks = doctor(host, "--address", f"{host.address}:{port}")
        assert code == 4
        assert checks["Ray sockets"]["state"] == "missing", checks
        assert "RAY_AUTH_MODE=token" in checks["Ray sockets"]["fix"]
    finally:
        loose.terminate()
        loose.wait(60)
