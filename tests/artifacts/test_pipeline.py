"""Stage execution: order, reuse, keys, rebuilding after corruption, and a kill -9 in the middle of a build."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from genrec_dist.artifacts.files import read_json
from genrec_dist.artifacts.store import ArtifactStore
from genrec_dist.config import Config, RuntimeConfig
from genrec_dist.pipeline import Stage, StageContext, closure, execute
from genrec_dist.runs import RunFolder

ROOT = Path(__file__).resolve().parents[2]


class Toy:
    """Two stages, numbers -> total, that count how often they are built."""

    def __init__(self, numbers: list[int], factor: int = 1) -> None:
        self.builds: list[str] = []
        self.numbers = Stage("numbers", 1, {"numbers": numbers}, {}, self._write)
        self.total = Stage("total", 1, {"factor": factor}, {"numbers": self.numbers}, self._sum)

    def _write(self, ctx: StageContext) -> None:
        self.builds.append("numbers")
        (ctx.out / "numbers.txt").write_text("\n".join(map(str, self.numbers.settings["numbers"])))
        (ctx.out / "curves.jsonl").write_text('{"step": 1, "loss": 0.5}\n')

    def _sum(self, ctx: StageContext) -> None:
        self.builds.append("total")
        numbers = (ctx.inputs["numbers"] / "numbers.txt").read_text().split()
        (ctx.out / "total.txt").write_text(str(self.total.settings["factor"] * sum(map(int, numbers))))
        ctx.event("summed", count=len(numbers))

    def run(self, root: Path, name: str = "toy") -> tuple[dict[str, Path], list[str]]:
        run = RunFolder(root / "runs", name)
        run.create(Config(), ["toy"])
        seen: list[str] = []
        folders = execute(
            [self.total],
            ArtifactStore(root / "store"),
            run,
            RuntimeConfig(),
            on_stage=lambda stage, what, _: seen.append(f"{stage.name} {what}"),
        )
        return folders, seen


def test_builds_inputs_first_then_reuses(tmp_path):
    toy = Toy([1, 2, 3], factor=10)
    folders, seen = toy.run(tmp_path)
    assert (folders["total"] / "total.txt").read_text() == "60"
    assert seen == ["numbers building", "numbers built", "total building", "total built"]

    again = Toy([1, 2, 3], factor=10)
    assert again.run(tmp_path) == (folders, ["numbers reused", "total reused"])
    assert again.builds == []

    run = RunFolder(tmp_path / "runs", "toy")
    assert {event["event"] for event in run.events()} >= {"stage_built", "stage_reused", "summed"}
    assert run.metrics() == [{"stage": "numbers", "step": 1, "loss": 0.5}]
    assert run.artifact("total") == folders["total"]
    manifest = read_json(folders["total"] / "MANIFEST.json")
    assert manifest["inputs"] == {"numbers": {"stage": "numbers", "key": toy.numbers.key}}


def test_a_setting_rebuilds_its_own_stage_and_what_reads_it(tmp_path):
    Toy([1, 2]).run(tmp_path)
    factor = Toy([1, 2], factor=2)
    folders, _ = factor.run(tmp_path)
    assert factor.builds == ["total"]
    assert (folders["total"] / "total.txt").read_text() == "6"

    numbers = Toy([1, 5])
    folders, _ = numbers.run(tmp_path)
    assert numbers.builds == ["numbers", "total"]
    assert (folders["total"] / "total.txt").read_text() == "6"
    assert len(list((tmp_path / "store" / "total").glob("*/MANIFEST.json"))) == 3


def test_runtime_is_not_in_the_key_and_shared_inputs_appear_once():
    a, b = Toy([1]), Toy([1], factor=2)
    assert a.numbers.key == b.numbers.key
    assert a.total.key != b.total.key
    assert [stage.name for stage in closure([a.total, b.total])] == ["numbers", "total", "total"]


def test_corrupt_input_is_quarantined_and_rebuilt(tmp_path):
    folders, _ = Toy([1, 2]).run(tmp_path)
    (folders["numbers"] / "numbers.txt").write_text("1")
    again = Toy([1, 2])
    rebuilt, seen = again.run(tmp_path)
    assert seen == ["numbers building", "numbers built", "total reused"]
    assert (rebuilt["numbers"] / "numbers.txt").read_text() == "1\n2"
    (event,) = [e for e in RunFolder(tmp_path / "runs", "toy").events() if e["event"] == "artifact_corrupt"]
    assert "numbers.txt: 1 bytes, recorded 3" in event["detail"]
    assert len(list((tmp_path / "store" / "quarantine").iterdir())) == 1


def test_a_failing_stage_leaves_no_artifact_and_keeps_what_came_before(tmp_path):
    toy = Toy([1])
    toy.numbers.settings["numbers"].append("x")  # int("x") fails in the second stage
    with pytest.raises(ValueError, match="invalid literal"):
        toy.run(tmp_path)
    store = ArtifactStore(tmp_path / "store")
    assert store.exists("numbers", toy.numbers.key)
    assert not store.exists("total", toy.total.key)


def test_two_runs_that_want_one_artifact_build_it_once(tmp_path):
    toys = [Toy([4]), Toy([4])]
    threads = [threading.Thread(target=toy.run, args=(tmp_path, f"run{n}")) for n, toy in enumerate(toys)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(toys[0].builds + toys[1].builds) == ["numbers", "total"]


KILLED = """
import os, signal, sys
from pathlib import Path
from genrec_dist.artifacts.store import ArtifactStore
from genrec_dist.config import Config, RuntimeConfig
from genrec_dist.pipeline import Stage, execute
from genrec_dist.runs import RunFolder

root, die_at = Path(sys.argv[1]), int(sys.argv[2])

def build(ctx):
    for step in range(5):
        done = ctx.scratch / str(step)
        if done.exists():
            continue
        if step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with open(ctx.out / "steps.txt", "a") as handle:
            handle.write(f"{step}\\n")
        done.touch()

run = RunFolder(root / "runs", "toy")
run.create(Config(), ["toy"])
execute([Stage("steps", 1, {}, {}, build)], ArtifactStore(root / "store"), run, RuntimeConfig())
"""


def test_kill_in_a_build_then_the_same_command_continues(tmp_path):
    def command(die_at: int) -> int:
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path), str(die_at)], env=env, timeout=120, check=False
        ).returncode

    assert command(3) == -signal.SIGKILL
    assert not list((tmp_path / "store" / "steps").glob("*/MANIFEST.json"))
    assert command(-1) == 0
    (artifact,) = (tmp_path / "store" / "steps").glob("*/steps.txt")
    assert artifact.read_text().split() == ["0", "1", "2", "3", "4"]  # none lost, none done twice
    assert [p.name for p in artifact.parent.iterdir() if p.is_dir()] == []
    started = [e for e in RunFolder(tmp_path / "runs", "toy").events() if e["event"] == "stage_started"]
    assert [event["resumed"] for event in started] == [False, True]


SLOW = """
import sys, time
from pathlib import Path
from genrec_dist.artifacts.store import ArtifactStore
from genrec_dist.config import Config, RuntimeConfig
from genrec_dist.pipeline import Stage, execute
from genrec_dist.runs import RunFolder

root, name = Path(sys.argv[1]), sys.argv[2]

def build(ctx):
    with open(ctx.out / "builders.txt", "a") as handle:
        handle.write(f"{name}\\n")
    (root / f"{name}.inside").touch()
    while not (root / f"{name}.go").exists():
        time.sleep(0.01)

run = RunFolder(root / "runs", name)
run.create(Config(), ["toy"])
execute([Stage("slow", 1, {}, {}, build)], ArtifactStore(root / "store"), run, RuntimeConfig())
"""


@pytest.mark.parametrize("killed", [False, True])
def test_a_second_process_waits_for_the_builder_and_takes_over_when_it_is_killed(tmp_path, killed):
    env = os.environ | {"PYTHONPATH": str(ROOT)}

    def start(name: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path), name], env=env)

    def events(name: str) -> list[dict]:
        return RunFolder(tmp_path / "runs", name).events()

    with start("first") as first:
        wait_for((tmp_path / "first.inside").exists)
        with start("second") as second:
            wait_for(lambda: any(event["event"] == "stage_waiting" for event in events("second")))
            assert not (tmp_path / "second.inside").exists()
            (tmp_path / "second.go").touch()
            if killed:
                first.kill()
            else:
                (tmp_path / "first.go").touch()
            assert second.wait(60) == 0
        assert first.wait(60) == (-signal.SIGKILL if killed else 0)
    (waiting,) = [event for event in events("second") if event["event"] == "stage_waiting"]
    assert waiting["holder"].startswith(f"process {first.pid} on ")
    (artifact,) = (tmp_path / "store" / "slow").glob("*/builders.txt")
    assert artifact.read_text().split() == (["first", "second"] if killed else ["first"])
    assert events("second")[-1]["event"] == ("stage_built" if killed else "stage_reused")
    assert not list((tmp_path / "store" / "slow").glob("*.building"))


def wait_for(found) -> None:
    """Poll for something that other processes do; half a minute is far more than they need."""
    end = time.monotonic() + 30
    while not found():
        assert time.monotonic() < end
        time.sleep(0.01)
