"""Fixtures shared by all tests: one Ray session, and the folder of the real data sets."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from genrec_dist.cluster import ensure_ray, leave_ray
from genrec_dist.config import RuntimeConfig

DATA_SETS = ("beauty", "sports", "toys")
ALONE = {"integration", "test_watchdog.py", "test_engines.py"}
"""Files and folders besides those that start Ray: vLLM ends the process group that DeepSpeed remembers."""
RAY_SIGNS = ("ray_session", "ensure_ray", "cluster_utils", "import ray")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark files that start Ray as `alone`: a session of Ray counts on the cores that it was told of."""
    starts_ray = {path: any(sign in path.read_text() for sign in RAY_SIGNS) for path in {item.path for item in items}}
    for item in items:
        if starts_ray[item.path] or item.path.name in ALONE or item.path.parent.name in ALONE:
            item.add_marker(pytest.mark.alone)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Any]:
    """The `ray` module with one private session, shared by every test that asks for it."""
    yield ensure_ray(RuntimeConfig())
    leave_ray()


_buckets = itertools.count()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Endpoint of an S3 server on loopback."""
    pytest.importorskip("moto", reason="the S3 server of the tests is moto: pip install 'moto[s3]' flask flask-cors")
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """`s3://` and the name of an empty bucket; credentials, endpoint and an empty cache are in the environment."""
    import boto3

    bucket = f"test-{next(_buckets)}"
    for name, value in {
        "AWS_ENDPOINT_URL_S3": s3_server,
        "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
        "AWS_SECRET_ACCESS_KEY": "very-secret-very-secret-very-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "GENREC_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with beauty/, sports/ and toys/; the test is skipped where it is absent."""
    root = Path(__file__).resolve().parents[1]
    named = os.environ.get("GENREC_DATA")
    folders = [Path(named)] if named else [root.parent / "shared" / "data"]
    for folder in folders:
        if all((folder / name / "interactions.parquet").is_file() for name in DATA_SETS):
            return folder
    pytest.skip(f"real data sets {', '.join(DATA_SETS)} not found in {folders[0]}; set $GENREC_DATA")
