"""`genrec submit` and `genrec job` over a fake client: what is sent, what is refused before, what is printed."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from test_submit_follow import ADDRESS, BROKEN, LOST, UNKNOWN, FakeClient, job
from typer.testing import CliRunner

from genrec_dist.config import build_config, load_config
from genrec_dist.errors import ConfigError
from genrec_dist.runs import git_state, provenance
from launcher import submit_jobs, submit_package
from launcher.cli import app
from launcher.submit_package import CONFIG_FILE, for_cluster, make_package

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "0123456789abcdef" * 4


class FakeCluster(FakeClient):
    """Keeps what is submitted; the package is opened as the cluster would."""

    def __init__(self, *args, known: list | None = None, **options) -> None:
        super().__init__(*(args or ([job("SUCCEEDED", 0)], ["hello\n"])), **options)
        self.known, self.sent = known or [], []

    def list_jobs(self):
        return [*self.known, SimpleNamespace(submission_id=None, status="RUNNING", metadata=None)]

    def submit_job(self, **request):
        with zipfile.ZipFile(request["runtime_env"]["working_dir"]) as archive:
            self.files = {name: archive.read(name) for name in archive.namelist()}
        self.sent.append(request)


@pytest.fixture
def small(tmp_path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text("method: popularity\ncatalog: {source: synthetic}\nruntime: {grace_seconds: 10.5}\n")
    return file


def use(monkeypatch, cluster: FakeCluster) -> FakeCluster:
    monkeypatch.setattr(submit_jobs, "connect", lambda address: cluster)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    for name in ("GENREC_STORE", "GENREC_RUNS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return cluster


def call(*words: object):
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert TOKEN not in done.output
    return done


def submit(file: Path, *words: object):
    return call("submit", file, "--store", "/s/store", "--runs", "/s/my runs", "--address", ADDRESS, *words)


def test_what_is_sent(monkeypatch, small):
    cluster = use(monkeypatch, FakeCluster())
    done = submit(small, "--set", "seed=7", "--name", "mine")
    assert done.exit_code == 0, done.output
    (request,) = cluster.sent
    assert request["submission_id"] == "mine-1"
    assert request["entrypoint"] == (
        "exec python -m launcher.cli run genrec-config.yaml --name mine --store /s/store --runs '/s/my runs'"
    )
    assert request["metadata"] == {"genrec_run": "mine", "genrec_runs": "/s/my runs"}
    assert request["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "26"}
    config = build_config(yaml.safe_load(cluster.files[CONFIG_FILE]))
    assert (config.name, config.seed, config.runtime.ray_address) == ("mine", 7, "auto")
    assert config.generator == load_config(small).generator
    assert TOKEN not in json.dumps({**request, "runtime_env": request["runtime_env"]})
    assert not [name for name, data in cluster.files.items() if TOKEN.encode() in data]
    lines = done.output.splitlines()
    assert lines[0].startswith("package: ")
    assert lines[1] == "job: mine-1"
    for what, line in zip(("status", "logs", "stop"), lines[2:5]):
        assert f"genrec job {what} mine-1 --address {ADDRESS}" in line
    assert lines[5:] == ["hello", "job mine-1 succeeded"]


def test_the_size_is_named_before_the_package_is_sent(monkeypatch, small):
    cluster = use(monkeypatch, FakeCluster())

    def refuse(**request):
        raise RuntimeError("Request failed with status code 400: ValueError: Job with submission_id already exists.")

    cluster.submit_job = refuse
    done = submit(small)
    assert done.exit_code == 4
    assert done.output.index("package: ") < done.output.index("refuses the request")
    assert "already exists" in done.output


def test_no_wait_asks_for_nothing_more(monkeypatch, small):
    cluster = use(monkeypatch, FakeCluster([AssertionError("asked")]))
    assert submit(small, "--no-wait").exit_code == 0
    assert len(cluster.sent) == 1


def test_a_failed_run_ends_the_command_with_its_code(monkeypatch, small):
    use(monkeypatch, FakeCluster([job("FAILED", 6)]))
    done = submit(small)
    assert done.exit_code == 6
    assert "small-1 failed" in done.output


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["--set", "fusion.dims=3"], "fusion.dims"),
        (["--set", "seed=-1"], "seed"),
        (["--set", "runtime.backend=local"], "runtime.backend"),
        (["--set", "method=prorec", "--set", "runtime.num_workers=3"], "optim.batch_size"),
        (["--set", "runtime.min_workers=4"], "runtime.min_workers"),
        (["--name", "../up"], "name"),
        (["--store", "store"], "--store"),
        (["--store", "s3://key:secret@bucket"], "--store"),
        (["--runs", "runs"], "--runs"),
        (["--store", "gs://bucket/store"], "--store"),
        (["--runs", "s3://bucket"], "--runs"),
        (["--runs", "s3://bucket/../runs"], "--runs"),
        (["--runs", "s3://bucket/runs", "--render", "slurm"], "--runs"),
        (["--address", "head:8265"], "--address"),
        (["--image", "x", "--render", "slurm"], "--image"),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_sent(monkeypatch, small, words, where):
    cluster = use(monkeypatch, FakeCluster())
    done = submit(small, *words)
    assert done.exit_code == 2, done.output
    assert where in done.output
    assert "secret" not in done.output
    assert cluster.sent == []


def test_folders_and_address_are_asked_for(monkeypatch, small):
    use(monkeypatch, FakeCluster())
    assert "--store" in call("submit", small, "--address", ADDRESS).output
    assert "--address" in call("submit", small, "--store", "/s", "--runs", "/r").output
    monkeypatch.setenv("GENREC_STORE", "s3://bucket/store")
    monkeypatch.setenv("GENREC_RUNS", "s3://bucket/runs")
    assert call("submit", small, "--address", ADDRESS).exit_code == 0


def test_a_run_that_is_at_work_is_refused_with_its_job(monkeypatch, small):
    mine = {"genrec_run": "small", "genrec_runs": "/s/my runs"}
    known = [
        job("SUCCEEDED", 0, submission_id="small-1", metadata=mine),
        job("RUNNING", submission_id="small-4", metadata=mine),
        job("RUNNING", submission_id="other-9", metadata={"genrec_run": "other", "genrec_runs": "/s/my runs"}),
    ]
    cluster = use(monkeypatch, FakeCluster(known=known))
    done = submit(small)
    assert done.exit_code == 2
    assert "job small-4, RUNNING" in done.output
    assert cluster.sent == []
    known[1].status = "STOPPED"
    assert submit(small).exit_code == 0
    assert cluster.sent[0]["submission_id"] == "small-5"
    known[1].status, known[1].metadata = "PENDING", mine | {"genrec_runs": "/another/folder"}
    assert submit(small).exit_code == 0


@pytest.mark.parametrize("fault", [LOST, BROKEN])
def test_a_connection_that_breaks_while_submitting(monkeypatch, small, fault):
    cluster = use(monkeypatch, FakeCluster())
    cluster.submit_job = lambda **request: (_ for _ in ()).throw(fault)
    done = submit(small)
    assert done.exit_code == 4
    assert "submit again" in done.output


def test_a_relative_data_folder_is_named(monkeypatch, small):
    use(monkeypatch, FakeCluster())
    done = submit(small, "--set", "catalog.source=parquet", "--set", "catalog.path=beauty")
    assert "catalog.path 'beauty' is looked for in the nodes' $GENREC_DATA" in done.output


def test_status_of_a_job(monkeypatch):
    running = job("RUNNING", metadata={"genrec_run": "r", "genrec_runs": "/r"}, start_time=1_700_000_000_000)
    use(monkeypatch, FakeCluster([running]))
    found = json.loads(call("job", "status", "r-1", "--address", ADDRESS, "--json").output)
    assert (found["job"], found["status"], found["exit_code"], found["run"]) == ("r-1", "RUNNING", None, "r")
    assert found["started"] == "2023-11-14T22:13:20Z"
    assert "genrec job stop r-1" in call("job", "status", "r-1", "--address", ADDRESS).output
    use(monkeypatch, FakeCluster([job("FAILED", 3, message="first\nsecond")]))
    done = call("job", "status", "r-1", "--address", ADDRESS)
    assert done.exit_code == 0
    assert "r-1: FAILED, exit code 3" in done.output
    assert "second" not in done.output


def test_logs_of_a_job(monkeypatch):
    use(monkeypatch, FakeCluster([job("FAILED", 3)], ["[bold]text[/]\n"]))
    done = call("job", "logs", "r-1", "--address", ADDRESS)
    assert (done.exit_code, done.output) == (0, "[bold]text[/]\n")
    assert call("job", "logs", "r-1", "--address", ADDRESS, "--follow").exit_code == 3


def test_stopping_a_job(monkeypatch):
    cluster = use(monkeypatch, FakeCluster())
    assert "is asked to stop" in call("job", "stop", "r-1", "--address", ADDRESS).output
    assert cluster.stopped == ["r-1"]
    cluster.stop_job = lambda job: False
    assert "is over already" in call("job", "stop", "r-1", "--address", ADDRESS).output


@pytest.mark.parametrize("what", ["status", "logs"])
@pytest.mark.parametrize(("fault", "text"), [(UNKNOWN, "does not know the job"), (LOST, "cannot answer")])
def test_a_job_that_cannot_be_looked_at_is_4(monkeypatch, what, fault, text):
    use(monkeypatch, FakeCluster([fault], [fault]))
    done = call("job", what, "r-1", "--address", ADDRESS)
    assert done.exit_code == 4
    assert text in done.output


def test_the_package_has_the_sources_and_the_configuration_only(tmp_path):
    package = make_package(for_cluster(load_config(ROOT / "configs" / "quickstart.yaml")), tmp_path)
    with zipfile.ZipFile(package.path) as archive:
        names = archive.namelist()
    assert package.num_files == len(names) == len(set(names))
    assert package.num_bytes == package.path.stat().st_size
    assert {name.split("/")[0] for name in names} == {"genrec_dist", "launcher", CONFIG_FILE, "genrec-git.json"}
    assert {"launcher/cli.py", "genrec_dist/cluster.py", "genrec_dist/studies/templates/report.html"} <= set(names)
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc") or "/." in name]


@pytest.fixture
def sources(tmp_path) -> Path:
    root = tmp_path / "project"
    for name in ("genrec_dist/a.py", "genrec_dist/__pycache__/a.pyc", "genrec_dist/.hidden", "launcher/b.py",
                 ".git/config", "tests/t.py", "docs/d.md", "store/x", "runs/y", ".venv/z", "secret.txt"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "launcher" / "link").symlink_to(root / "secret.txt")
    return root


def test_nothing_else_of_the_folder_goes_in(tmp_path, sources):
    package = make_package(build_config({}), tmp_path, sources)
    with zipfile.ZipFile(package.path) as archive:
        assert archive.namelist() == ["genrec_dist/a.py", "launcher/b.py", CONFIG_FILE, "genrec-git.json"]


def test_equal_content_is_an_equal_package(tmp_path, sources):
    config = build_config({})
    first = make_package(config, tmp_path, sources).path.read_bytes()
    (sources / "launcher" / "b.py").touch()
    assert make_package(config, tmp_path, sources).path.read_bytes() == first
    assert make_package(build_config({"seed": 1}), tmp_path, sources).path.read_bytes() != first


def test_a_package_above_the_limit_is_refused(monkeypatch, tmp_path, sources, small):
    (sources / "genrec_dist" / "big.bin").write_bytes(bytes(range(256)) * 40)
    with pytest.raises(ConfigError, match=r"genrec_dist/big\.bin \(10,240\)"):
        make_package(build_config({}), tmp_path, sources, limit=600)
    cluster = use(monkeypatch, FakeCluster())
    monkeypatch.setattr("launcher.submit.make_package", lambda config, folder: submit_package.make_package(
        config, folder, limit=1000))  # fmt: skip
    assert submit(small).exit_code == 2
    assert cluster.sent == []


def test_a_submitted_run_knows_the_commit_it_was_sent_from(tmp_path, sources):
    assert git_state(sources) is None
    (sources / "genrec-git.json").write_text(json.dumps({"commit": "abc", "dirty": True}))
    assert git_state(sources) == {"commit": "abc", "dirty": True}
    assert provenance([], 0)["git"] == git_state(ROOT)
