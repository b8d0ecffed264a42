"""`genrec run` and `genrec status` with --store and --runs in an S3 bucket: empty caches, kills, no credentials."""

from __future__ import annotations

import json
import os
import signal

import pytest

from genrec_dist.artifacts.bucket import Bucket
from genrec_dist.artifacts.places import parse_url


@pytest.fixture
def bucket(cli, s3) -> Bucket:
    """The bucket, which the environment of the command line names as the place of everything."""
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    cli.environment |= aws | {"GENREC_STORE": f"{s3}/team/store", "GENREC_RUNS": f"{s3}/team/runs"}
    on_machine(cli, "a")
    return Bucket(parse_url(f"{s3}/team"))


def on_machine(cli, name: str) -> None:
    cli.environment["GENREC_CACHE"] = str(cli.folder / f"cache-{name}")


def events(bucket: Bucket, name: str) -> list[dict]:
    found = bucket.read(f"runs/{name}/events.jsonl")
    return [json.loads(line) for line in found[0].splitlines()] if found else []


def snapshot(bucket: Bucket) -> dict:
    """Files of the snapshot of the stage `model`."""
    names = [name for name in bucket.names("store/model/") if name.endswith("SNAPSHOT.json")]
    return json.loads(bucket.read(names[0])[0])["files"] if names else {}


def test_another_machine_reuses_reports_and_sees_the_run(cli, bucket, s3):
    done = cli("run", "a.yaml", "--name", "plain")
    assert done.returncode == 0, done.stderr
    assert [e["event"] for e in events(bucket, "plain")][-1] == "run_finished"
    on_machine(cli, "b")
    status = cli("status", f"{s3}/team/runs/plain", "--json")
    assert status.returncode == 0, status.stderr
    found = json.loads(status.stdout)
    assert (found["state"], found["metrics"]["main"]["users"]) == ("finished", 3)
    assert "[2/3] model: reused" in cli("run", "a.yaml", "--name", "plain").stdout
    kinds = [e["event"] for e in events(bucket, "plain")]
    assert kinds.count("run_started") == 2
    assert kinds.count("stage_built") == 3
    unknown = cli("status", "nothing")
    assert unknown.returncode == 2
    assert "plain" in unknown.stderr


def test_a_run_killed_on_one_machine_goes_on_on_another(cli, bucket, wait_for):
    process = cli.start("run", "a.yaml", "--name", "slow", "--set", "runtime.mirror_seconds=0.2")
    wait_for(lambda: "scratch/checkpoint" in snapshot(bucket))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not [name for name in bucket.names("store/model/") if name.endswith("MANIFEST.json")]
    on_machine(cli, "b")
    done = cli("run", "a.yaml", "--name", "slow", "--resume", "require")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [n for n in bucket.names("store/model/") if n.endswith("/continued.json")]
    assert snapshot(bucket) == {}


def test_sigterm_leaves_the_last_state_in_the_bucket(cli, bucket, wait_for):
    process = cli.start("run", "a.yaml", "--name", "slow")  # no copy by the clock within its minute
    # a walk of the whole cache would meet folders that are renamed meanwhile
    progress = "cache-a/s3/*/team/store/model/*.building/scratch/progress.json"
    wait_for(lambda: list(cli.folder.glob(progress)))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert "scratch/checkpoint" in snapshot(bucket)
    assert events(bucket, "slow")[-1]["event"] == "preempted"


def test_no_credential_is_in_anything_that_is_written(cli, bucket, tmp_path):
    for name in ("plain", "bug"):
        cli("run", "a.yaml", "--name", name)
    names = list(bucket.names())
    written = [bucket.read(name)[0] for name in names]
    written += [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert len(names) > 10
    for value in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert not any(os.environ[value].encode() in data for data in written)


def test_a_bucket_that_is_not_there_ends_with_code_4(cli, bucket):
    done = cli("run", "a.yaml", "--name", "plain", "--store", "s3://no-such-bucket/store")
    assert done.returncode == 4, done.stderr
    assert "s3://no-such-bucket/store" in done.stderr
    refused = cli("run", "a.yaml", "--name", "plain", "--store", "s3://user:secret@bucket/store")
    assert refused.returncode == 2
    assert "secret" not in refused.stderr
