"""The Slurm script: shellcheck, and whole runs of it over a fake Slurm, Ray and genrec."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli import app

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "cluster" / "slurm" / "genrec.sbatch"
SCRIPTS = [SCRIPT, ROOT / "cluster" / "torchrun.sh"]
FAKES = {
    # Runs what it is asked to, once, on this machine.
    "srun": 'echo "srun $*" >>"$CALLS"; while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'echo "scontrol $*" >>"$CALLS"; [[ $1 != show ]] || printf "%s\\n" n1 n2 n3',
    "hostname": "echo 127.0.0.1 ::1 ${ADDRESS-10.1.2.3}",
    "ray": """echo "ray $*" >>"$CALLS"
if [[ $1 == start ]]; then
  stat -c "%a %n" "$RAY_AUTH_TOKEN_PATH" "$(dirname "$RAY_AUTH_TOKEN_PATH")" >>"$CALLS"
  wc -c <"$RAY_AUTH_TOKEN_PATH" >>"$CALLS"
  echo $$ >>"$CALLS.pids"
  [[ -z ${HEAD_DIES:-} ]] || exit 1
  exec sleep 60
fi
[[ -z ${HEAD_DIES:-} ]] && grep -q . "$CALLS.pids"
""",
    "python": """echo "python $*" >>"$CALLS"
until [[ $(wc -l <"$CALLS.pids") -ge 2 ]]; do sleep 0.05; done
echo $$ >>"$CALLS.pids"
if [[ -n ${JOIN_LONG:-} ]]; then touch "$CALLS.at_work"; exec sleep 60; fi
exit "${JOIN_CODE:-0}"
""",
    "genrec": """echo "genrec $*" >>"$CALLS"
trap 'echo saved >>"$CALLS"; exit 75' TERM
if [[ -n ${LONG:-} ]]; then touch "$CALLS.at_work"; for _ in {1..100}; do sleep 0.1; done; fi
exit "${CODE:-0}"
""",
}


class FakeSlurm:
    """A folder of fake programs that write down their calls."""

    def __init__(self, folder: Path) -> None:
        self.runs, self.calls_file = folder / "my runs", folder / "calls"
        programs = folder / "bin"
        programs.mkdir()
        for name, body in FAKES.items():
            (programs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (programs / name).chmod(0o755)
        text = SCRIPT.read_text()
        for start, value in (("runs=", f"'{self.runs}'"), ("config=", "'/c/my config.yaml'"), ("name=", "mine")):
            line = next(line for line in text.splitlines() if line.startswith(start))
            text = text.replace(f"\n{line}\n", f"\n{start}{value}\n")
        self.script = folder / "genrec.sbatch"
        self.script.write_text(text)
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(self.calls_file), "SLURM_JOB_ID": "12345",
            "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_CPUS_PER_TASK": "8",
            "RAY_AUTH_TOKEN": "of somebody else",
        }  # fmt: skip

    def start(self, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(self.script)], env=self.environment | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, **environment: str) -> int:
        process = self.start(**environment)
        self.output, _ = process.communicate(timeout=60)
        return process.returncode

    def calls(self, program: str) -> list[str]:
        lines = self.calls_file.read_text().splitlines()
        return [line.removeprefix(program).strip() for line in lines if line.split(" ")[0] == program]

    def nothing_left(self) -> bool:
        pids = [int(pid) for pid in Path(f"{self.calls_file}.pids").read_text().split()]
        return not any(Path(f"/proc/{pid}").exists() for pid in pids) and list(self.runs.iterdir()) == []


@pytest.fixture
def slurm(tmp_path) -> FakeSlurm:
    return FakeSlurm(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_finds_nothing(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    program = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or "shellcheck"
    done = subprocess.run([program, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_head_workers_driver_and_nothing_left_behind(slurm):
    assert slurm.run() == 0, slurm.output
    head, workers = [call for call in slurm.calls("ray") if call.startswith("start")]
    base = 20000 + 12345 % 2000 * 10
    assert head.startswith(f"start --head --node-ip-address=10.1.2.3 --port={base} --include-dashboard=false")
    assert workers.startswith(f"start --address=10.1.2.3:{base}")
    for call in (head, workers):
        assert "--num-cpus=8" in call
        assert "--block" in call
    steps = slurm.calls("srun")
    assert "--nodes=1 --ntasks=1 --cpus-per-task=8 --nodelist=n1" in steps[1]
    assert "--nodes=2 --ntasks=2 --cpus-per-task=8 --exclude=n1" in steps[2]
    assert slurm.calls("python") == [f"- 10.1.2.3:{base} 3"]
    assert slurm.calls("genrec") == [
        f"run /c/my config.yaml --name mine --store /shared/store --runs {slurm.runs} "
        f"--set runtime.ray_address=10.1.2.3:{base}"
    ]
    assert slurm.nothing_left()


def test_a_sweep_is_one_word_away(slurm):
    slurm.script.write_text(slurm.script.read_text().replace("\ncommand=run ", "\ncommand=sweep "))
    assert slurm.run() == 0, slurm.output
    assert slurm.calls("genrec")[0].startswith("sweep /c/my config.yaml --name mine --store /shared/store --runs ")


def test_the_token_is_for_its_owner_only_and_in_no_argument(slurm):
    assert slurm.run() == 0, slurm.output
    text = slurm.calls_file.read_text().splitlines()
    assert [line.split()[0] for line in text if ".ray-12345." in line and line[:1].isdigit()] == ["600", "700"] * 2
    assert text.count("64") == 2  # 32 random bytes in hex, without an end of line
    assert "somebody else" not in slurm.calls_file.read_text()


@pytest.mark.parametrize("code", [0, 3, 5])
def test_the_code_of_the_run_is_the_jobs(slurm, code):
    assert slurm.run(CODE=str(code)) == code
    assert not [call for call in slurm.calls("scontrol") if call.startswith("requeue")]
    assert slurm.nothing_left()


@pytest.mark.parametrize("when", ["LONG", "JOIN_LONG"])
def test_slurms_signal_saves_and_queues_the_job_again(slurm, when):
    process = slurm.start(**{when: "1"})
    deadline = time.monotonic() + 30
    while not Path(f"{slurm.calls_file}.at_work").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75, output
    assert slurm.calls("saved") == ([""] if when == "LONG" else [])
    assert slurm.calls("scontrol")[-1] == "requeue 12345"
    assert slurm.nothing_left()


def test_a_head_that_does_not_start_and_nodes_that_do_not_come_are_4(slurm):
    assert slurm.run(HEAD_DIES="1") == 4
    assert "the Ray head did not start" in slurm.output
    assert slurm.run(JOIN_CODE="1") == 4
    assert slurm.calls("genrec") == []
    assert slurm.nothing_left()


def test_a_node_without_an_address_is_4(slurm):
    assert slurm.run(ADDRESS="") == 4
    assert "no IPv4 address of node n1" in slurm.output


def test_the_rendered_script_has_the_runs_settings(tmp_path):
    words = ["--store", "/big disk/store", "--runs", "/shared/runs", "--set", "runtime.num_workers=4"]
    words += ["--set", "runtime.device=cuda", "--render", "slurm", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["submit", str(ROOT / "configs" / "quickstart.yaml"), *words])
    assert done.exit_code == 0, done.output
    made = (tmp_path / "out" / "genrec.sbatch").read_text().splitlines()
    changed = [line for line in made if line not in SCRIPT.read_text().splitlines()]
    assert changed == [
        "#SBATCH --job-name=quickstart",
        "#SBATCH --nodes=4",
        "#SBATCH --gpus-per-node=1",
        f"config={tmp_path / 'out' / 'config.yaml'}",
        "store='/big disk/store'",
    ]
    assert (tmp_path / "out" / "config.yaml").stat().st_mode & stat.S_IRUSR
    subprocess.run(["bash", "-n", str(tmp_path / "out" / "genrec.sbatch")], check=True)
