"""`genrec sweep` and its status: kills, resumes, retries, extensions, refusals; slow: signals, real trainings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cli_process import HERE, REAL
from test_study_command import here  # noqa: F401  (a fixture)
from tiny_study import TINY

from genrec_dist.artifacts.files import read_json, read_jsonl
from genrec_dist.errors import ConfigError
from genrec_dist.studies.scaling.sweep_file import SweepFile
from launcher.sweep import extend_file, parse_extend

FAKE_SWEEP = [str(HERE / "fake_sweep.py")]
SWEEP = {"arms": {"prorec": {"config": "a.yaml"}}, "depths": [1, 2, 3]}


def write_sweep(folder: Path, **changes) -> None:
    (folder / "s.yaml").write_text(yaml.safe_dump(SWEEP | changes))


@pytest.fixture
def sweep(cli):
    """The fake command in a folder with s.yaml; two trials at once."""
    write_sweep(cli.folder)
    (cli.folder / "a.yaml").write_text("runtime: {backend: local, device: cpu, num_threads: 1, max_failures: 0}\n")

    def call(*arguments: str):
        return cli("sweep", "s.yaml", "--parallel", "2", *arguments, script=FAKE_SWEEP)

    call.cli, call.folder = cli, cli.folder
    return call


def start(sweep) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *FAKE_SWEEP, "sweep", "s.yaml", "--parallel", "2"],
        cwd=sweep.folder,
        env=sweep.cli.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def status(sweep) -> dict:
    return json.loads(sweep.cli("status", "s", "--json", script=FAKE_SWEEP).stdout)


def pid_of(sweep, trial: str) -> int | None:
    """Process of a trial whose model stage has begun."""
    events = read_jsonl(sweep.folder / "runs" / "s" / "trials" / trial / "events.jsonl")
    kinds = [event["event"] for event in events]
    if not kinds or "stage_started" not in kinds[max(i for i, kind in enumerate(kinds) if kind == "run_started") :]:
        return None
    return [event["pid"] for event in events if event["event"] == "process"][-1]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_sweep_outlives_killed_trials_killed_drivers_and_failures(sweep, wait_for):
    """A trial is killed, then the driver; the same command goes on, retries on request, and takes in new depths."""
    for name in ("hang-3", "hang-2", "fail-1"):
        (sweep.folder / name).touch()
    driver = start(sweep)  # the largest first: depths 3 and 2
    wait_for(lambda: pid_of(sweep, "prorec-d3-s0") is not None and pid_of(sweep, "prorec-d2-s0") is not None)
    os.kill(pid_of(sweep, "prorec-d3-s0"), signal.SIGKILL)
    failed = sweep.folder / "runs" / "s" / "trials" / "prorec-d1-s0" / "events.jsonl"
    wait_for(lambda: any(event["event"] == "run_failed" for event in read_jsonl(failed)))
    found = {trial["name"]: trial for trial in status(sweep)["trials"]}
    assert found["prorec-d3-s0"]["state"] == "failed"
    assert "SIGKILL" in found["prorec-d3-s0"]["error"]
    assert (found["prorec-d1-s0"]["state"], found["prorec-d1-s0"]["error"]) == ("failed", "made to fail")
    assert (found["prorec-d2-s0"]["state"], found["prorec-d2-s0"]["progress"]) == (
        "running", "generator: 1 of 4 steps, epoch 0.25"
    )  # fmt: skip
    orphan = pid_of(sweep, "prorec-d2-s0")
    driver.kill()
    driver.communicate()
    wait_for(lambda: gone(orphan))  # a trial does not outlive the process that started it

    for file in sweep.folder.glob("hang-*"):
        file.unlink()
    again = sweep()
    assert again.returncode == 5, again.stdout + again.stderr
    assert "prorec-d2-s0: finished" in again.stdout
    assert "prorec-d3-s0: failed in an earlier call" in again.stdout
    assert "1 of 3 trials complete" in again.stdout
    (sweep.folder / "fail-1").unlink()
    retried = sweep("--retry-failed", "--extend", "depth=4")
    assert retried.returncode == 0, retried.stdout + retried.stderr
    assert "prorec-d2-s0: already complete" in retried.stdout
    assert "4 of 4 trials complete" in retried.stdout
    built = [record["stage"] for record in read_jsonl(sweep.folder / "built.jsonl")]
    assert built.count("catalog") == 1
    assert {stage: built.count(stage) for stage in set(built)} == {
        "catalog": 1, "model-1": 2, "model-2": 2, "model-3": 2, "model-4": 1
    }  # fmt: skip

    folder = sweep.folder / "runs" / "s"
    trials = read_json(folder / "trials.json")
    assert sorted(trial["depth"] for trial in trials) == [1, 2, 3, 4]
    assert {trial["state"] for trial in trials} == {"finished"}
    assert list((folder / "claims").glob("*.json")) == []
    write_sweep(sweep.folder, seeds=[0, 1])
    refused = sweep()
    assert refused.returncode == 2
    assert "prorec-d1-s1: new" in refused.stderr
    assert "--extend file" in refused.stderr
    write_sweep(sweep.folder, set={"generator.dropout": 0.5})
    refused = sweep("--extend", "file")
    assert refused.returncode == 2
    assert "generator.dropout was 0.3, is 0.5" in refused.stderr


@pytest.mark.slow
def test_sigterm_reaches_the_trials_and_the_sweep_leaves_with_its_code(sweep, wait_for):
    (sweep.folder / "hang-3").touch()
    (sweep.folder / "hang-2").touch()
    driver = start(sweep)
    wait_for(lambda: pid_of(sweep, "prorec-d3-s0") is not None and pid_of(sweep, "prorec-d2-s0") is not None)
    driver.send_signal(signal.SIGTERM)
    out, error = driver.communicate(timeout=60)
    assert driver.returncode == 75, out + error
    for trial in ("prorec-d3-s0", "prorec-d2-s0"):
        events = read_jsonl(sweep.folder / "runs" / "s" / "trials" / trial / "events.jsonl")
        assert (events[-1]["event"], events[-1]["exit_code"]) == ("preempted", 75)
    assert status(sweep)["state"] == "interrupted"


def test_what_extends_a_sweep():
    assert parse_extend(["depth=48,64", "depth=96", "seed=3", "file"]) == {"depth": [48, 64, 96], "seed": [3]}
    file = SweepFile.model_validate(SWEEP)
    assert extend_file(file, {"depth": [3, 4], "seed": [1]}).depths == [1, 2, 3, 4]
    assert extend_file(file, {"depth": [3, 4], "seed": [1]}).seeds == [0, 1]
    for wrong in ("width=3", "depth=", "depth=a", "depths=3"):
        with pytest.raises(ConfigError, match="--extend"):
            parse_extend([wrong])
    with pytest.raises(ConfigError, match="no ladder"):
        extend_file(file.model_copy(update={"depths": []}), {"depth": [4]})


def write_real(folder: Path) -> None:
    """A sweep of three depths of real trainings on a synthetic catalog, seconds each."""
    write_sweep(folder, arms={"prorec": {"config": "tiny.yaml"}})


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["local", "ray"])
def test_real_trainings_of_three_depths(here, cli, backend):  # noqa: F811
    write_real(here)
    cli.folder = here
    arguments = ["sweep", "s.yaml", "--set", f"runtime.backend={backend}"]
    plan = cli(*arguments, "--dry-run", script=REAL)
    assert plan.returncode == 0, plan.stderr
    assert "prorec-d3-s0" in plan.stdout
    assert "from steps timed here" in plan.stdout
    assert not (here / "runs").exists()
    done = subprocess.run(
        [sys.executable, *REAL, *arguments], cwd=here, env=cli.environment, capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 trials complete" in done.stdout
    for stage in ("catalog", "fusion", "identifiers"):
        assert len(list((here / "store" / stage).glob("*/MANIFEST.json"))) == 1
    assert len(list((here / "store" / "generator").glob("*/MANIFEST.json"))) == 3
    trials = read_json(here / "runs" / "s" / "trials.json")
    numbers = {trial["depth"]: trial["num_parameters"]["layers"] for trial in trials}
    assert numbers[1] < numbers[2] < numbers[3]
    assert all(trial["bits_per_item"] > 0 for trial in trials)
    assert (here / "runs" / "s" / "report.html").is_file()
    again = cli(*arguments, script=REAL)
    assert again.stdout.count("already complete") == 3
    assert TINY["runtime"]["backend"] == "local"
