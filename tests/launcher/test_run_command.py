"""`genrec run`: screen and log kept apart, events, exit codes, resume, signals."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys

import pytest
from cli_process import FAKE

from genrec_dist.artifacts.files import read_json


def test_a_run_leaves_metrics_report_and_events(cli) -> None:
    done = cli("run", "a.yaml", "--name", "plain")
    assert done.returncode == 0, done.stderr
    folder = cli.run_folder("plain")
    assert read_json(folder / "metrics.json")["main"]["test"]["recall@10"] == 0.1
    assert (folder / "report.html").exists()
    kinds = [event["event"] for event in cli.events("plain")]
    assert kinds[0] == "run_started"
    assert kinds[-1] == "run_finished"
    assert kinds.count("stage_built") == 3
    lines = done.stdout.splitlines()
    assert lines[0] == "[1/3] catalog: building"
    assert any(line.startswith("[2/3] model: built in") for line in lines)
    assert "Recall@10" in done.stdout
    assert "0.1000" in done.stdout
    assert "popularity" in done.stdout
    assert str(folder / "report.html") in done.stdout
    assert done.stderr == ""


def test_the_same_command_again_builds_nothing(cli) -> None:
    cli("run", "a.yaml", "--name", "plain")
    again = cli("run", "a.yaml", "--name", "plain")
    assert again.returncode == 0
    assert [line for line in again.stdout.splitlines() if line.startswith("[")] == [
        "[1/3] catalog: reused",
        "[2/3] model: reused",
        "[3/3] evaluation: reused",
    ]


def test_until_ends_with_a_stage_and_a_whole_run_goes_on_from_there(cli) -> None:
    done = cli("run", "a.yaml", "--name", "plain", "--until", "model")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("[")] == ["[1/2] catalog", "[1/2] catalog"] + [
        "[2/2] model"
    ] * 2
    assert [line.split()[0] for line in lines[-2:]] == ["catalog", "model"]
    assert not (cli.run_folder("plain") / "metrics.json").exists()
    whole = cli("run", "a.yaml", "--name", "plain")
    assert "[2/3] model: reused" in whole.stdout
    unknown = cli("run", "a.yaml", "--name", "plain", "--until", "identifiers")
    assert unknown.returncode == 2
    assert "expected: one of catalog, model, evaluation" in unknown.stderr


def test_noise_of_any_origin_goes_to_the_log_only(cli) -> None:
    done = cli("run", "a.yaml", "--name", "noisy")
    assert done.returncode == 0, done.stderr
    assert "NOISE" not in done.stdout + done.stderr
    log = cli.log("noisy")
    origins = "print", "stderr", "descriptor 1", "descriptor 2", "child", "child stderr", "logging", "warning", "report"
    for origin in origins:
        assert f"NOISE {origin}\n" in log
    assert "WARNING fake: NOISE logging" in log


def test_terminal_shows_stages_and_no_noise(cli) -> None:
    screen, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *FAKE, "run", "a.yaml", "--name", "noisy"],
        cwd=cli.folder,
        env=cli.environment | {"TERM": "xterm", "LANG": "C.UTF-8"},
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    seen = b""
    while True:
        try:
            piece = os.read(screen, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        seen += piece
    os.close(screen)
    assert process.wait() == 0
    assert "✓" in seen.decode()
    assert b"built in" in seen
    assert b"NOISE" not in seen


def test_typed_error_is_shown_without_a_traceback(cli) -> None:
    done = cli("run", "a.yaml", "--name", "data_error")
    assert done.returncode == 3
    assert done.stderr.splitlines()[:3] == [
        "error: too many broken lines",
        "  where: reviews.json.gz",
        "  got: 7%",
    ]
    assert "Traceback" not in done.stdout + done.stderr
    assert str(cli.run_folder("data_error") / "logs" / "driver.log") in done.stderr
    assert "Traceback" in cli.log("data_error")
    assert "[2/3] model: stopped after" in done.stdout
    last = cli.events("data_error")[-1]
    assert (last["event"], last["exit_code"], last["type"]) == ("run_failed", 3, "DataError")
    assert "look at the ledger" in last["error"]


def test_unexpected_error_is_exit_1_with_the_log(cli) -> None:
    done = cli("run", "a.yaml", "--name", "bug")
    assert done.returncode == 1
    assert "ZeroDivisionError: division by zero" in done.stderr
    assert "Traceback" not in done.stderr
    assert "driver.log" in done.stderr
    assert "Traceback" in cli.log("bug")


@pytest.mark.parametrize("name", ["slow", "takes_over_signals"])
@pytest.mark.parametrize(
    ("number", "code", "event"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 75, "preempted")]
)
def test_signals_end_a_run_with_their_own_code(cli, wait_for, name, number, code, event) -> None:
    process = cli.start("run", "a.yaml", "--name", name)
    wait_for(cli.in_work)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    last = cli.events(name)[-1]
    assert (last["event"], last["exit_code"]) == (event, code)
    assert event in error
    status = json.loads(cli("status", name, "--json").stdout)
    assert (status["state"], status["exit_code"]) == ("interrupted", code)


def test_a_plain_training_that_hangs_ends_the_run(cli) -> None:
    settings = ("--set", "runtime.backend=local", "--set", "runtime.hang_seconds=0.5")
    done = cli("run", "a.yaml", "--name", "hangs", *settings)
    assert done.returncode == 5
    assert "training hung: no sign of life for 1 s" in done.stdout
    stacks = cli.run_folder("hangs") / "logs" / "stacks-model-0.txt"
    assert str(stacks) in done.stdout
    assert "in hangs" in stacks.read_text()
    last = cli.events("hangs")[-1]
    assert (last["event"], last["exit_code"], last["type"]) == ("run_failed", 5, "WorkerHung")
    status = json.loads(cli("status", "hangs", "--json").stdout)
    assert (status["state"], status["exit_code"]) == ("failed", 5)


def test_killed_run_continues_where_it_stopped(cli, wait_for) -> None:
    process = cli.start("run", "a.yaml", "--name", "slow")
    wait_for(cli.in_work)
    process.kill()
    process.communicate()
    again = cli("run", "a.yaml", "--name", "slow", "--resume", "require")
    assert again.returncode == 0, again.stderr
    assert "[2/3] model: continuing an unfinished build" in again.stdout
    assert list(cli.folder.glob("store/model/*/continued.json"))


def test_resume_never_discards_the_unfinished_build(cli, wait_for) -> None:
    first = cli.start("run", "a.yaml", "--name", "slow")
    wait_for(cli.in_work)
    first.kill()
    first.communicate()
    checkpoint = next(cli.folder.glob("store/model/*.building/scratch/checkpoint"))
    checkpoint.write_text("of the first call")
    second = cli.start("run", "a.yaml", "--name", "slow", "--resume", "never")
    wait_for(lambda: checkpoint.exists() and checkpoint.read_text() == "step 1")
    second.kill()
    out, _ = second.communicate()
    assert "[1/3] catalog: reused" in out


def test_resume_require_needs_work_after_the_catalog(cli) -> None:
    assert cli("run", "a.yaml", "--name", "plain", "--resume", "require").returncode == 5
    assert not cli.run_folder("plain").exists()
    assert not (cli.folder / "store").exists()
    assert cli("run", "a.yaml", "--name", "bug").returncode == 1  # leaves a finished catalog, and nothing of the model
    for left in cli.folder.glob("store/model/*.building"):
        assert not list(left.iterdir())
    refused = cli("run", "a.yaml", "--name", "bug", "--resume", "require")
    assert refused.returncode == 5
    assert "nothing to continue from" in refused.stderr
    assert cli("run", "a.yaml", "--name", "plain").returncode == 0
    assert cli("run", "a.yaml", "--name", "plain", "--resume", "require").returncode == 0


def test_a_run_folder_belongs_to_one_process(cli, wait_for) -> None:
    first = cli.start("run", "a.yaml", "--name", "slow")
    wait_for(cli.in_work)
    before = cli.events("slow")
    second = cli("run", "a.yaml", "--name", "slow")
    assert second.returncode == 2
    assert "another process is at work" in second.stderr
    assert cli.events("slow") == before
    first.kill()
    first.communicate()
