"""Talking to a cluster's Ray Jobs API: one client with time limits, typed errors and the token kept out of sight.

Ray's client takes the token from RAY_AUTH_TOKEN, the file of RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token and sends it as a
header; nothing here reads, prints or stores it. Knows nothing of packages or of how long one waits.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from genrec_dist.cluster import token_present
from genrec_dist.errors import ClusterError, ConfigError

REQUEST_SECONDS = 30.0
RUN_KEY, FOLDER_KEY = "genrec_run", "genrec_runs"
"""Metadata of a job: name of the run, and the folder of all runs it belongs to."""
OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Environment variables that Ray's client would take instead of the address that it is given."""


class Unreachable(Exception):
    """No usable answer; worth another try."""


class UnknownJob(Exception):
    """The cluster answers, and has no such job."""


class JobServer:
    """The Jobs API of one cluster.

    Args:
        address: http://HOST:PORT of the dashboard on the head node.

    Raises:
        ConfigError: not such an address.
        ClusterError: no answer, no token, or a wrong one.
    """

    def __init__(self, address: str) -> None:
        self.address = check_address(address)
        check_token()
        try:
            with self._typed():
                self._client = connect(self.address)
                self.session = self._client.session()
        except (Unreachable, UnknownJob) as error:
            raise ClusterError(
                "no Ray Jobs API answers",
                where="--address",
                got=str(error),
                expected=f"the dashboard of a head node at {self.address}",
                fix="check the address; start the head with its dashboard; from outside, forward its port "
                "(docs/cluster.md)",
            ) from error

    def session_now(self) -> str:
        """Name of the session that the head has now; another one than `session` is another head."""
        with self._typed():
            return self._client.session()

    def jobs(self) -> list[Any]:
        """Every submitted job that the cluster knows."""
        with self._typed():
            return [job for job in self._client.list_jobs() if job.submission_id]

    def info(self, job: str) -> Any:
        """State of a job: status, message, metadata, driver_exit_code."""
        with self._typed():
            return self._client.get_job_info(job)

    def logs(self, job: str) -> str:
        """Everything that the job has printed."""
        with self._typed():
            return self._client.get_job_logs(job)

    def stop(self, job: str) -> bool:
        """Ask a job to stop; False when it was over already."""
        with self._typed():
            return self._client.stop_job(job)

    def submit(self, *, job: str, entrypoint: str, package: Path, env: dict[str, str], metadata: dict) -> None:
        """Send the package, unless the cluster has it, and start the job."""
        with self._typed():
            self._client.submit_job(
                entrypoint=entrypoint,
                submission_id=job,
                runtime_env={"working_dir": str(package), "env_vars": env},
                metadata=metadata,
            )

    @contextmanager
    def _typed(self) -> Iterator[None]:
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise ClusterError(
                "the Ray cluster refuses the token",
                where=self.address,
                got=str(error).strip().splitlines()[0].split(". ")[0],
                expected="the token that the cluster was started with",
                fix="compare RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH and ~/.ray/auth_token (taken in this order) with it",
            ) from None
        except (requests.RequestException, OSError) as error:
            raise Unreachable(f"{type(error).__name__}: {error}") from error
        except RuntimeError as error:  # Ray's client has no other type for an answer that is an error
            code = re.search(r"status code (\d{3})", str(error))
            if code and code[1] == "404":
                raise UnknownJob(str(error)) from error
            if code and code[1].startswith("5"):
                raise Unreachable(_last_line(str(error))) from error
            raise ClusterError(
                "the Ray cluster refuses the request", where=self.address, got=_last_line(str(error))
            ) from error


def check_token() -> None:
    """See that Ray will find a token; whether it is the right one only the cluster knows.

    Raises:
        ClusterError: there is none, or its file is empty or cannot be read.
    """
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return
    file = os.environ.get("RAY_AUTH_TOKEN_PATH")
    got = "nothing" if not token_present() else None
    if file and not os.environ.get("RAY_AUTH_TOKEN"):
        try:
            got = None if Path(file).read_bytes().strip() else f"{file}: empty"
        except OSError as error:
            got = f"{file}: {error.strerror}"
    if got is not None:
        raise ClusterError(
            "no token for the Ray cluster",
            where="RAY_AUTH_TOKEN_PATH",
            got=got,
            expected="RAY_AUTH_TOKEN, a file named by RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token",
            fix="get the cluster's token as a file that only you can read, and name it in RAY_AUTH_TOKEN_PATH",
        )


def connect(address: str) -> Any:
    """Ray's own client, with a time limit on every request: its default is to wait for ever."""
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, *args: Any, **kwargs: Any) -> Any:
            return super()._do_request(*args, **({"timeout": REQUEST_SECONDS} | kwargs))

        def session(self) -> str:
            return self._do_request("GET", "/api/version").json().get("session_name", "")

    set_aside = {name: os.environ.pop(name) for name in OVERRIDES if name in os.environ}
    try:
        return Client(address)
    finally:
        os.environ.update(set_aside)


def check_address(address: str) -> str:
    """Return the address without a trailing slash.

    Raises:
        ConfigError: no http(s) URL of a host, or one with a password inside.
    """
    try:
        parts = urlsplit(address)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        good = good and not parts.query and not parts.fragment
    except ValueError:
        parts, good = urlsplit(""), False
    if parts.username or parts.password:
        raise ConfigError(
            "a password in an address ends up in logs",
            where="--address",
            expected="http://HOST:PORT",
            fix="leave it out",
        )
    if not good:
        raise ConfigError(
            "not the address of a Ray Jobs API",
            where="--address",
            got=address,
            expected="http://HOST:PORT of the head's dashboard, usually port 8265",
        )
    return address.rstrip("/")


def _last_line(text: str, limit: int = 300) -> str:
    """The end of an error text: Ray answers with whole tracebacks."""
    lines = [line.strip() for line in text.strip().strip(".").splitlines() if line.strip()]
    return (lines[-1] if lines else "")[-limit:]
