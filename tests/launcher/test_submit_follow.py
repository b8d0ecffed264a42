"""Waiting for a job over a fake client: every exit code, lost connections, another head, Ctrl-C."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import requests
from ray.exceptions import AuthenticationError

from genrec_dist.errors import ClusterError, ConfigError
from launcher import submit_follow, submit_jobs
from launcher.failures import Stopped
from launcher.submit_jobs import JobServer, check_address

ADDRESS = "http://127.0.0.1:8265"
LOST = requests.ConnectionError("refused")
UNKNOWN = RuntimeError("Request failed with status code 404: Job x does not exist.")
BROKEN = RuntimeError("Request failed with status code 500: Traceback\n  ...\nValueError: agent is gone.")


def job(status: str, code: int | None = None, **fields) -> SimpleNamespace:
    about = {"message": "", "error_type": None, "metadata": {}, "submission_id": "x-1", "start_time": 0, "end_time": 0}
    return SimpleNamespace(status=status, driver_exit_code=code, **(about | fields))


class FakeClient:
    """Answers of a cluster, one a poll; an exception among them is raised. The last one stays."""

    def __init__(self, answers: list, logs: list | None = None, sessions: list[str] | None = None) -> None:
        self.answers, self.log_texts = list(answers), list(logs or [""])
        self.sessions = list(sessions or ["first"])
        self.stopped: list[str] = []

    @staticmethod
    def _next(queue: list):
        answer = queue.pop(0) if len(queue) > 1 else queue[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def session(self):
        return self._next(self.sessions)

    def get_job_info(self, job):
        return self._next(self.answers)

    def get_job_logs(self, job):
        return self._next(self.log_texts)

    def stop_job(self, job):
        self.stopped.append(job)
        return True


class Waiting:
    """`follow` with a clock that only sleeping moves."""

    def __init__(self, monkeypatch, client: FakeClient, timeout: float = 300) -> None:
        monkeypatch.setattr(submit_jobs, "connect", lambda address: client)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "t")
        self.shown, self.notes, self.sleeps, self.timeout = "", [], [], timeout
        self.server = JobServer(ADDRESS)

    def __call__(self) -> None:
        submit_follow.follow(
            self.server,
            "x-1",
            timeout=self.timeout,
            show=self._show,
            note=self.notes.append,
            sleep=self.sleeps.append,
            clock=lambda: sum(self.sleeps),
        )

    def _show(self, text: str) -> None:
        self.shown += text


def test_success_and_the_log_is_shown_once(monkeypatch):
    client = FakeClient([job("PENDING"), job("RUNNING"), job("SUCCEEDED", 0)], ["", "one\ntw", "one\ntwo\n"])
    waiting = Waiting(monkeypatch, client)
    waiting()
    assert waiting.shown == "one\ntwo\n"
    assert waiting.notes == []


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 6, 75, 130])
def test_the_code_of_the_run_comes_through(monkeypatch, code):
    with pytest.raises(Stopped) as stopped:
        Waiting(monkeypatch, FakeClient([job("FAILED", code)]))()
    assert stopped.value.failure.exit_code == code
    assert f"exit code {code}" in stopped.value.failure.text


@pytest.mark.parametrize(
    ("code", "message", "shown"),
    [
        (None, "Failed to set up runtime environment.\nTraceback", "SETUP: Failed to set up runtime environment."),
        (-9, "", "exit code -9"),
        (127, "", "exit code 127"),
        (0, "", "exit code 0"),  # of a job that Ray calls failed
    ],
)
def test_a_failure_without_a_code_of_the_run_is_5(monkeypatch, code, message, shown):
    info = job("FAILED", code, message=message, error_type="SETUP" if message else None)
    with pytest.raises(Stopped) as stopped:
        Waiting(monkeypatch, FakeClient([info]))()
    assert stopped.value.failure.exit_code == 5
    assert shown in stopped.value.failure.text


@pytest.mark.parametrize("code", [None, 75])
def test_a_stopped_job_is_130(monkeypatch, code):
    with pytest.raises(Stopped) as stopped:
        Waiting(monkeypatch, FakeClient([job("STOPPED", code)]))()
    assert stopped.value.failure.exit_code == 130


@pytest.mark.parametrize("log", ["SUCCEEDED\nrun finished, exit code 0\n", "error: training failed\nFAILED\n"])
def test_the_log_decides_nothing(monkeypatch, log):
    Waiting(monkeypatch, FakeClient([job("SUCCEEDED", 0)], [log]))()
    with pytest.raises(Stopped) as stopped:
        Waiting(monkeypatch, FakeClient([job("FAILED", 3)], [log]))()
    assert stopped.value.failure.exit_code == 3


@pytest.mark.parametrize("fault", [LOST, requests.ReadTimeout("slow"), BROKEN, ConnectionError("reset")])
def test_a_connection_comes_back(monkeypatch, fault):
    client = FakeClient([job("RUNNING"), fault, fault, fault, fault, job("SUCCEEDED", 0)], ["a\n", "a\nb\n"])
    waiting = Waiting(monkeypatch, client)
    waiting()
    assert waiting.shown == "a\nb\n"
    assert waiting.sleeps == [2, 1, 2, 4, 8]
    assert [note.split(" (")[0] for note in waiting.notes] == ["connection lost", "connected again"]


def test_a_second_loss_has_the_whole_time_again(monkeypatch):
    client = FakeClient([LOST, LOST, LOST, job("RUNNING"), LOST, LOST, LOST, job("SUCCEEDED", 0)])
    waiting = Waiting(monkeypatch, client, timeout=8)
    waiting()
    assert waiting.sleeps == [1, 2, 4, 2, 1, 2, 4]


def test_a_connection_that_stays_away_is_4_after_the_timeout(monkeypatch):
    waiting = Waiting(monkeypatch, FakeClient([job("RUNNING"), LOST]), timeout=100)
    with pytest.raises(ClusterError, match="connection to the cluster is lost") as error:
        waiting()
    assert error.value.exit_code == 4
    assert f"genrec job logs x-1 --address {ADDRESS} --follow" in error.value.fix
    assert waiting.sleeps == [2, 1, 2, 4, 8, 16, 30, 30, 9]


def test_no_time_to_wait_means_one_try(monkeypatch):
    waiting = Waiting(monkeypatch, FakeClient([LOST]), timeout=0)
    with pytest.raises(ClusterError):
        waiting()
    assert waiting.sleeps == []


@pytest.mark.parametrize(
    ("answers", "sessions"),
    [
        ([job("RUNNING"), UNKNOWN], ["first"]),
        ([job("RUNNING"), LOST, UNKNOWN], ["first"]),
        ([job("RUNNING"), LOST, job("SUCCEEDED", 0)], ["first", "second"]),  # another cluster's job of that id
    ],
)
def test_another_head_is_4_and_says_that_submitting_resumes(monkeypatch, answers, sessions):
    with pytest.raises(ClusterError, match="does not know the job") as error:
        Waiting(monkeypatch, FakeClient(answers, sessions=sessions))()
    assert error.value.exit_code == 4
    assert "submit again" in error.value.fix
    assert "resumes" in error.value.fix


@pytest.mark.parametrize("fault", [BROKEN, UNKNOWN, LOST])
def test_a_log_that_cannot_be_read_hides_no_end(monkeypatch, fault):
    waiting = Waiting(monkeypatch, FakeClient([job("RUNNING"), job("SUCCEEDED", 0)], ["a\n", fault]))
    waiting()
    assert waiting.shown == "a\n"
    assert waiting.notes == ["the end of the job's log cannot be read"]


def test_a_long_log_is_asked_for_less_often(monkeypatch):
    waiting = Waiting(monkeypatch, FakeClient([job("RUNNING"), job("SUCCEEDED", 0)], ["x" * 2_000_000]))
    waiting()
    assert waiting.sleeps == [10.0]
    assert len(waiting.shown) == 2_000_000


def test_a_log_that_begins_anew_is_shown(monkeypatch):
    waiting = Waiting(monkeypatch, FakeClient([job("RUNNING"), job("SUCCEEDED", 0)], ["abc\n", "new\n"]))
    waiting()
    assert waiting.shown == "abc\nnew\n"


def test_ctrl_c_leaves_the_job_and_says_how_to_stop_it(monkeypatch):
    client = FakeClient([job("RUNNING"), KeyboardInterrupt()])
    with pytest.raises(Stopped) as stopped:
        Waiting(monkeypatch, client)()
    assert stopped.value.failure.exit_code == 130
    assert f"genrec job stop x-1 --address {ADDRESS}" in stopped.value.failure.text
    assert client.stopped == []


def test_a_token_that_is_refused_ends_the_waiting_at_once(monkeypatch):
    waiting = Waiting(monkeypatch, FakeClient([job("RUNNING"), AuthenticationError("Authentication failed: no")]))
    with pytest.raises(ClusterError, match="refuses the token"):
        waiting()
    assert waiting.sleeps == [2]


@pytest.mark.parametrize(("file", "got"), [(None, "nothing"), ("absent", "No such file"), ("empty", "empty")])
def test_no_token_is_found_before_anything_is_asked(monkeypatch, tmp_path, file, got):
    asked = []
    monkeypatch.setattr(submit_jobs, "connect", asked.append)
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    (tmp_path / "empty").write_text("\n")
    if file is not None:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / file))
    with pytest.raises(ClusterError, match="no token") as error:
        JobServer(ADDRESS)
    assert got in error.value.got
    assert asked == []


@pytest.mark.parametrize("fault", [LOST, ConnectionError("nobody there"), UNKNOWN, requests.HTTPError("502")])
def test_nobody_at_the_address(monkeypatch, fault):
    with pytest.raises(ClusterError, match="no Ray Jobs API answers"):
        Waiting(monkeypatch, FakeClient([job("RUNNING")], sessions=[fault]))


@pytest.mark.parametrize("address", ["10.0.0.1:8265", "ray://h:10001", "auto", "http://", "http://h:x", "ftp://h", ""])
def test_addresses_that_are_none(address):
    with pytest.raises(ConfigError, match="not the address"):
        check_address(address)


def test_good_addresses_and_no_passwords():
    assert check_address("http://head:8265/") == "http://head:8265"
    assert check_address("https://ray.example.org/cluster") == "https://ray.example.org/cluster"
    with pytest.raises(ConfigError, match="password") as error:
        check_address("https://me:secret@head")
    assert "secret" not in str(error.value)


def test_rays_own_variables_do_not_redirect_a_submission(monkeypatch):
    """Ray's client would take them instead of the address it is given."""
    asked = []

    def answer(method, url, **options):
        asked.append((url, options["timeout"]))
        response = requests.Response()
        response.status_code = 200
        response._content = b'{"ray_version": "2.60.0", "session_name": "s"}'
        return response

    monkeypatch.setattr(requests, "request", answer)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:8265")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://elsewhere:8265")
    assert JobServer(ADDRESS).session == "s"
    assert {url for url, _ in asked} == {f"{ADDRESS}/api/version"}
    assert {timeout for _, timeout in asked} == {submit_jobs.REQUEST_SECONDS}
    assert submit_jobs.os.environ["RAY_ADDRESS"] == "http://elsewhere:8265"
