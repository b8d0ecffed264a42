"""`genrec submit` and `genrec job` against a real Ray head with token authentication, its dashboard on loopback."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from genrec_dist.artifacts.files import read_json, read_jsonl
from genrec_dist.runs import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
TINY = """
method: popularity
catalog: {source: synthetic, synthetic: {num_items: 60, num_users: 80}}
references: []
evaluation: {bootstrap_samples: 0}
report: {tsne_items: 0}
runtime: {progress_seconds: 0.5}
"""
LONG = """
method: sasrec
catalog: {source: synthetic, synthetic: {num_items: 60, num_users: 80}}
references: []
sasrec: {dim: 8, optim: {epochs: 1000000, patience: 1000000, batch_size: 32}}
report: {tsne_items: 0}
runtime: {engine: torch, num_threads: 1, progress_seconds: 0.5}
"""


S3_SECRET = secrets.token_hex(20)


class Head:
    """A Ray head in processes of its own, and the command line of somebody outside."""

    def __init__(self, folder: Path, temp: str, s3_server: str) -> None:
        self.folder, self.temp, self.token = folder, temp, secrets.token_hex(32)
        self.token_file = folder / "token"
        self.token_file.write_text(self.token)
        self.token_file.chmod(0o600)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "GENREC_"))}
        self.environment = clean | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(folder),
            "OMP_NUM_THREADS": "1",
            "AWS_ENDPOINT_URL_S3": s3_server,
            "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
            "AWS_SECRET_ACCESS_KEY": S3_SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "GENREC_CACHE": str(folder / "cache"),
        }
        self.environment.pop("PYTHONPATH", None)
        self.start()

    def start(self) -> None:
        command = [
            str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--port=0", "--num-cpus=2",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={self.address.rsplit(':', 1)[1]}",
            "--object-store-memory=100000000", f"--temp-dir={self.temp}", "--dashboard-agent-listen-port=0",
        ]  # fmt: skip
        self.log = open(self.folder / "head.log", "a")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, env=self.environment, cwd=self.folder, stdout=self.log, stderr=self.log, start_new_session=True
        )
        deadline = time.monotonic() + 90
        while self.genrec("job", "status", "nothing").returncode == 4 and "no such job" not in self.last.stderr:
            if "does not know the job" in self.last.stderr:
                return
            assert self.process.poll() is None, (self.folder / "head.log").read_text()
            assert time.monotonic() < deadline, self.last.stderr
            time.sleep(1)

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
        self.log.close()

    def genrec(self, *words: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
        """The command with this head's address, from a folder that is not the source tree."""
        env = self.environment | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | environment
        self.last = subprocess.run(
            [sys.executable, "-m", "launcher.cli", *words, "--address", self.address],
            env={k: v for k, v in env.items() if v is not None},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return self.last

    def submit(self, config: str, name: str, *words: str, root: str | None = None, **environment: str | None):
        file = self.folder / f"{name}.yaml"
        file.write_text(config)
        places = [word for kind in ("store", "runs") for word in (f"--{kind}", f"{root or self.folder}/{kind}")]
        return self.genrec("submit", str(file), *places, *words, **environment)

    def status(self, job: str) -> dict:
        return json.loads(self.genrec("job", "status", job, "--json").stdout)


@pytest.fixture(scope="module")
def head(tmp_path_factory, s3_server) -> Iterator[Head]:
    temp = tempfile.mkdtemp(prefix="gr-", dir="/tmp")  # short: Ray's sockets lie below it
    made = Head(tmp_path_factory.mktemp("head"), temp, s3_server)
    yield made
    made.stop()
    shutil.rmtree(temp, ignore_errors=True)


def test_submitted_run_succeeds_and_a_second_one_reuses(head):
    done = head.submit(TINY, "tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"package: \d+ files, [\d,]+ KiB\njob: tiny-1\n", done.stdout)
    assert "Recall@10" in done.stdout
    run = head.folder / "runs" / "tiny"
    assert read_json(run / "metrics.json")["main"]
    assert read_json(run / "provenance.json")["git"]["commit"]
    again = head.submit(TINY, "tiny")
    assert again.returncode == 0, again.stderr
    assert "job: tiny-2\n" in again.stdout
    events = [e["event"] for e in read_jsonl(run / "events.jsonl")]
    assert events.count("run_finished") == 2
    assert events.count("stage_built") == events.count("stage_reused") == 2
    assert head.status("tiny-2")["exit_code"] == 0


def test_a_run_in_a_bucket_goes_on_where_the_cache_is_empty(head, s3):
    done = head.submit(TINY, "far", root=s3)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(head.folder / "cache")
    again = head.submit(TINY, "far", root=s3)
    assert again.returncode == 0, again.stdout + again.stderr
    run = RunFolder.existing(f"{s3}/runs", "far")  # into the cache of this test
    assert read_json(run.path / "metrics.json")["main"]
    events = [event["event"] for event in run.events()]
    assert events.count("run_finished") == 2
    assert events.count("stage_built") == events.count("stage_reused") == 2


def test_the_exit_code_of_a_failed_run_comes_through(head):
    done = head.submit(TINY, "broken", "--set", "catalog.source=parquet", "--set", "catalog.path=/nowhere")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "broken-1 failed with exit code 3" in done.stderr
    assert "Traceback" not in done.stderr
    assert head.genrec("job", "logs", "broken-1", "--follow").returncode == 3


def test_a_running_job_is_refused_again_and_a_stopped_one_resumes(head):
    sent = head.submit(LONG, "long", "--no-wait")
    assert sent.returncode == 0, sent.stdout + sent.stderr
    run = head.folder / "runs" / "long"
    deadline = time.monotonic() + 120
    while not list(head.folder.glob("store/sasrec/*.building/curves.jsonl")):
        assert time.monotonic() < deadline, head.genrec("job", "logs", "long-1").stdout
        time.sleep(1)
    refused = head.submit(LONG, "long", "--no-wait")
    assert refused.returncode == 2
    assert "job long-1, RUNNING" in refused.stderr
    assert head.genrec("job", "stop", "long-1").returncode == 0
    waited = head.genrec("job", "logs", "long-1", "--follow")
    assert waited.returncode == 130, waited.stderr
    assert "was stopped" in waited.stderr
    events = read_jsonl(run / "events.jsonl")
    assert events[-1]["event"] == "preempted", events[-1]  # it was given the time to save its state
    assert head.genrec("job", "stop", "long-1").stdout.strip() == "long-1 is over already"
    more = head.submit(LONG, "long", "--no-wait")
    assert "job: long-2" in more.stdout
    while "training_resumed" not in [e["event"] for e in read_jsonl(run / "events.jsonl")]:
        assert time.monotonic() < deadline + 120, head.genrec("job", "logs", "long-2").stdout
        time.sleep(1)
    head.genrec("job", "stop", "long-2")
    assert head.genrec("job", "logs", "long-2", "--follow").returncode == 130


@pytest.mark.parametrize("token", [None, "0" * 64], ids=["missing", "wrong"])
def test_no_token_or_a_wrong_one_is_refused(head, token):
    done = head.submit(TINY, "stranger", RAY_AUTH_TOKEN_PATH=None, RAY_AUTH_TOKEN=token)
    assert done.returncode == 4
    assert ("no token" if token is None else "refuses the token") in done.stderr
    assert "Traceback" not in done.stderr


def test_the_token_is_in_nothing_that_is_kept(head):
    from launcher.submit_jobs import JobServer

    assert head.submit(TINY, "kept").returncode == 0
    places = [head.folder / "runs", head.folder / "store", Path(head.temp)]
    found = [
        path
        for place in places
        for path in place.rglob("*")
        if path.is_file() and not path.is_symlink() and head.token.encode() in path.read_bytes()
    ]
    assert (head.folder / "runs" / "kept" / "provenance.json").is_file()
    assert found == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", head.token)
        described = json.dumps([job.model_dump(mode="json") for job in JobServer(head.address).jobs()])
    assert "kept-1" in described
    assert head.token not in described


def test_a_restarted_head_does_not_know_the_job(head):
    waiting = subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", "job", "logs", "long-3", "--follow", "--timeout", "120", "--address",
         head.address],
        env=head.environment | {"PYTHONPATH": str(ROOT)}, cwd=head.folder, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    ) if head.submit(LONG, "long", "--no-wait").returncode == 0 else pytest.fail(head.last.stderr)  # fmt: skip
    time.sleep(15)
    assert waiting.poll() is None
    head.stop()
    head.start()
    out, err = waiting.communicate(timeout=150)
    assert waiting.returncode == 4, out + err
    assert "connection lost" in err
    assert "submit again" in err
