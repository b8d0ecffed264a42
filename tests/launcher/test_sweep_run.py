"""The scheduler of sweeps over a pool that the test controls, children of the local pool, what fits on a machine."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from genrec_dist.config import build_config
from genrec_dist.errors import ClusterError
from genrec_dist.pipeline import Stage
from genrec_dist.studies.scaling.leases import Leases, Owner
from genrec_dist.studies.scaling.plan import Unit
from genrec_dist.studies.scaling.sweep_folder import SweepFolder
from launcher import sweep_run
from launcher.failures import Stopped
from launcher.sweep_machine import GIB, Machine, Need, need_of, refuse_too_large, shared_need
from launcher.sweep_pool import LocalPool
from launcher.sweep_run import Scheduler
from launcher.sweep_state import failure_of


def unit(name: str, *needs: str, shared: bool = False, **runtime) -> Unit:
    config = build_config({"name": name, "runtime": {"backend": "local"} | runtime})
    return Unit(name, shared, config, [Stage(f"stage-{name}", 1, {}, {}, lambda context: None)], needs)


class FakePool:
    """Ends each unit at the next look, by `script`: name -> exit codes of its attempts; 0 leaves a finished run."""

    def __init__(self, folder: SweepFolder, store: Path, script: dict[str, list[int | None]], room: int = 2) -> None:
        self.folder, self.store, self.script, self.room = folder, store, script, room
        self.units: dict[str, Unit] = {}
        self.started: list[str] = []
        self.most, self.told, self.closed = 0, [], False

    @property
    def running(self) -> set[str]:
        return set(self.units)

    def has_room(self, unit: Unit) -> bool:
        return len(self.units) < self.room

    def start(self, unit: Unit) -> None:
        self.units[unit.name] = unit
        self.started.append(unit.name)
        self.most = max(self.most, len(self.units))

    def ended(self):
        done = []
        for name, unit in list(self.units.items()):
            codes = self.script.get(name, [0])
            if codes == ["hang"] and not self.told:
                continue
            code = codes.pop(0) if len(codes) > 1 else codes[0]
            del self.units[name]
            if code == 0:
                finish(self.folder, self.store, unit)
            elif code in (1, 3):
                self.folder.run(name, unit.shared).event(
                    "run_failed", exit_code=code, error=f"broke with {code}\n  more"
                )
            done.append((unit, 75 if code == "hang" else code))
        return done

    def grow(self, unit: Unit) -> float:
        return 0.0

    def tell(self, number: signal.Signals) -> None:
        self.told.append(number)

    def close(self) -> None:
        self.closed = True


def finish(folder: SweepFolder, store: Path, unit: Unit) -> None:
    """What a finished child leaves."""
    run, stage = folder.run(unit.name, unit.shared), unit.stages[0]
    artifact = store / stage.name / stage.key
    artifact.mkdir(parents=True, exist_ok=True)
    (artifact / "MANIFEST.json").write_text("{}")
    run.link(stage.title, stage.name, stage.key, artifact)
    (run.path / "metrics.json").write_text("{}")
    run.event("run_finished", exit_code=0)


@pytest.fixture
def carry_out(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_run, "POLL_SECONDS", 0.001)
    folder, store = SweepFolder(tmp_path / "runs", "s"), tmp_path / "store"

    def go(units, script=None, retry=False, room=2, leases=None):
        pool, said = FakePool(folder, store, script or {}, room), []
        keys = {u.name: {(s.name, s.key) for s in u.stages} for u in units}
        leases = leases or Leases(folder.path / "claims", Owner.this_process())
        try:
            outcome = Scheduler(folder, store, units, pool, leases, said.append, keys).run(retry)
        except Stopped as stopped:
            outcome = stopped
        assert pool.closed
        assert leases.held == set()
        return outcome, pool, said

    go.folder = folder
    return go


def test_shared_stages_come_before_the_trials_that_need_them(carry_out):
    units = [unit("a", shared=True), unit("b", "a", shared=True), unit("t1", "a", "b"), unit("t2", "a"), unit("t3")]
    outcome, pool, _ = carry_out(units, room=1)
    assert outcome.finished == {"a", "b", "t1", "t2", "t3"}
    order = pool.started.index
    assert order("a") < order("b") < order("t1")
    assert order("a") < order("t2")
    assert sorted(pool.started) == ["a", "b", "t1", "t2", "t3"]
    assert pool.most == 1


def test_as_many_run_at_once_as_the_pool_has_room_for(carry_out):
    assert carry_out([unit(f"t{i}") for i in range(7)], room=3)[1].most == 3


def test_a_second_call_starts_nothing_and_says_where_trials_are(carry_out):
    units = [unit("a", shared=True), unit("t1", "a")]
    carry_out(units)
    outcome, pool, said = carry_out(units)
    assert pool.started == []
    assert outcome.finished == {"a", "t1"}
    assert said == [f"t1: already complete, {carry_out.folder.run('t1', False).path}"]


def test_a_failure_stops_no_other_and_is_tried_again_only_on_request(carry_out):
    units = [unit("t1"), unit("t2"), unit("t3")]
    outcome, pool, _ = carry_out(units, {"t1": [3]})
    assert outcome.failed == {"t1": "broke with 3"}
    assert outcome.finished == {"t2", "t3"}
    outcome, pool, said = carry_out(units)
    assert (pool.started, outcome.failed) == ([], {"t1": "broke with 3"})
    assert "--retry-failed" in said[0]
    outcome, pool, _ = carry_out(units, retry=True)
    assert (pool.started, outcome.failed) == (["t1"], {})


def test_trials_whose_shared_stages_failed_are_not_started(carry_out):
    units = [unit("a", shared=True), unit("b", "a", shared=True), unit("t1", "b"), unit("t2", "a"), unit("t3")]
    outcome, pool, _ = carry_out(units, {"a": [1]})
    assert outcome.blocked == {"b": "a", "t1": "a", "t2": "a"}
    assert outcome.finished == {"t3"}
    assert sorted(pool.started) == ["a", "t3"]


def test_killed_children_and_lost_nodes_start_again_within_their_budgets(carry_out):
    outcome, pool, _ = carry_out([unit("t1")], {"t1": [-9, 0]})
    assert (outcome.finished, pool.started) == ({"t1"}, ["t1", "t1"])
    outcome, pool, _ = carry_out([unit("t2", max_failures=2)], {"t2": [-9]})
    assert pool.started == ["t2"] * 3
    assert "killed by SIGKILL" in outcome.failed["t2"]
    outcome, pool, _ = carry_out([unit("t2", max_failures=2)])
    assert pool.started == []  # a second call finds the record
    outcome, pool, _ = carry_out([unit("t3", max_failures=0)], {"t3": [None, 75, None, 0]})
    assert (outcome.finished, len(pool.started)) == ({"t3"}, 4)
    outcome, pool, _ = carry_out([unit("t4", max_preemptions=1)], {"t4": [None]})
    assert (list(outcome.failed), len(pool.started)) == (["t4"], 2)


def test_a_trial_that_another_call_works_on_is_waited_for_and_not_run_twice(carry_out, tmp_path):
    units = [unit("t1"), unit("t2"), unit("t3")]
    other = Leases(carry_out.folder.path / "claims", Owner("other", "elsewhere", 1, 0.0))
    assert other.take("t1")
    assert other.take("t3")

    def elsewhere() -> None:
        time.sleep(0.3)
        finish(carry_out.folder, tmp_path / "store", units[0])
        carry_out.folder.run("t3", False).event("run_failed", exit_code=3, error="broke there")
        other.release("t1")
        other.release("t3")

    thread = threading.Thread(target=elsewhere)
    thread.start()
    outcome, pool, _ = carry_out(units)
    thread.join()
    assert pool.started == ["t2"]
    assert (outcome.finished, outcome.failed) == ({"t1", "t2"}, {"t3": "broke there"})


def test_what_another_call_ended_meanwhile_is_not_run_again(carry_out, tmp_path):
    units = [unit("t1"), unit("t2"), unit("t3")]

    class Late(Leases):
        """Another call ends t2 and t3 before this one ever asked for them."""

        def take(self, name: str) -> bool:
            if name == "t2":
                finish(carry_out.folder, tmp_path / "store", units[1])
            if name == "t3":
                carry_out.folder.run("t3", False).event("run_failed", exit_code=3, error="broke there")
            return super().take(name)

    late = Late(carry_out.folder.path / "claims", Owner.this_process())
    outcome, pool, _ = carry_out(units, room=1, leases=late)
    assert pool.started == ["t1"]
    assert (outcome.finished, outcome.failed) == ({"t1", "t2"}, {"t3": "broke there"})


def test_a_killed_child_that_had_written_a_failure_starts_again(carry_out, monkeypatch):
    ended = FakePool.ended

    def writes_first(self):
        if "t1" in self.started and len(self.started) == 1:
            self.folder.run("t1", False).event("run_failed", exit_code=1, error="on its way out")
        return ended(self)

    monkeypatch.setattr(FakePool, "ended", writes_first)
    outcome, pool, _ = carry_out([unit("t1")], {"t1": [-9, 0]})
    assert (outcome.finished, pool.started) == ({"t1"}, ["t1", "t1"])


def test_the_reason_of_an_earlier_failure_is_not_that_of_a_new_one(carry_out):
    assert carry_out([unit("t1")], {"t1": [3]})[0].failed == {"t1": "broke with 3"}
    outcome, _, _ = carry_out([unit("t1")], {"t1": [4]}, retry=True)  # dies before it can say anything
    assert "exit code 4" in outcome.failed["t1"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_signals_reach_the_children_and_end_the_sweep(carry_out, number, code):
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
    stopped, pool, _ = carry_out([unit("t1"), unit("t2"), unit("t3")], {"t1": ["hang"], "t2": ["hang"]})
    assert stopped.failure.exit_code == code
    assert pool.told == [signal.SIGTERM]  # on which a training saves first
    assert sorted(pool.started) == ["t1", "t2"]


def children(tmp_path, machine: Machine, needs: dict[str, Need], parallel: int, code: str) -> LocalPool:
    command = lambda unit, runtime: [sys.executable, "-S", "-c", code, unit.name, str(runtime["num_threads"])]  # noqa: E731
    return LocalPool(machine, needs, parallel, command, tmp_path / "logs")


def wait_all(pool: LocalPool) -> dict[str, int | None]:
    ends: dict[str, int | None] = {}
    while pool.running:
        ends |= {unit.name: code for unit, code in pool.ended()}
        time.sleep(0.01)
    return ends


def test_local_children_have_exit_codes_logs_threads_and_gpus(tmp_path):
    machine = Machine(4, 64 * GIB, (16 * GIB, 16 * GIB))
    needs = {name: Need(2, GIB, 0.6) for name in ("0", "3", "9")}
    code = "import os, sys; print(sys.argv[2], os.environ['CUDA_VISIBLE_DEVICES']); sys.exit(int(sys.argv[1]))"
    pool = children(tmp_path, machine, needs, 0, code)
    for name in ("0", "3"):
        assert pool.has_room(unit(name))
        pool.start(unit(name))
    assert not pool.has_room(unit("9"))  # cores and both GPUs are taken
    assert wait_all(pool) == {"0": 0, "3": 3}
    shown = {name: (tmp_path / "logs" / f"{name}.log").read_text().split() for name in ("0", "3")}
    assert [threads for threads, _ in shown.values()] == ["2", "2"]
    assert {gpu for _, gpu in shown.values()} == {"0", "1"}


def test_the_local_pool_tells_and_kills(tmp_path):
    code = (
        "import signal, sys, time; signal.signal(15, lambda *a: sys.exit(75)); print('up', flush=True); time.sleep(60)"
    )
    pool = children(tmp_path, Machine(1, 64 * GIB), {"a": Need(1, GIB), "b": Need(1, GIB)}, 2, code)
    for name in ("a", "b"):
        assert pool.has_room(unit(name))
        pool.start(unit(name))
    assert not pool.has_room(unit("c"))
    while not all((tmp_path / "logs" / f"{name}.log").read_text() for name in ("a", "b")):
        time.sleep(0.01)
    pool.tell(signal.SIGTERM)
    assert wait_all(pool) == {"a": 75, "b": 75}
    pool.start(unit("a"))
    pool.close()
    assert pool.running == set()


class SharedGpu(LocalPool):
    """Children on a made-up GPU; what a child of a real trial would have written is written here."""

    folder: SweepFolder
    store: Path
    beside: list[tuple[str, list[str]]]

    def start(self, unit: Unit) -> None:
        self.beside.append((unit.name, sorted(self.running)))
        super().start(unit)

    def ended(self):
        done = super().ended()
        for unit, code in done:
            if code == 0:
                finish(self.folder, self.store, unit)
            elif unit.name != "silent":
                error = {4: "a resource gave way\n  got: CUDA error: out of memory", 40: "the disk is full"}[code]
                self.folder.run(unit.name, unit.shared).event("run_failed", exit_code=min(code, 4), error=error)
        return [(unit, min(code, 4)) for unit, code in done]


@pytest.fixture
def on_shared_gpu(tmp_path, monkeypatch):
    """Run trials whose child exits with the first of its codes, then the second, ... by name: share and codes."""
    monkeypatch.setattr(sweep_run, "POLL_SECONDS", 0.001)
    code = """if True:
        import pathlib, sys, time
        attempt = pathlib.Path(sys.argv[1]).read_text().splitlines().count("up") - 1
        codes = sys.argv[2].split(",")
        time.sleep(0.2)
        sys.exit(int(codes[min(attempt, len(codes) - 1)]))"""

    def go(**trials: tuple[float, str]):
        def command(unit, runtime):
            log = tmp_path / "logs" / f"{unit.name}.log"
            log.write_text(log.read_text() + "up\n")
            return [sys.executable, "-S", "-c", code, str(log), trials[unit.name][1]]

        needs = {name: Need(1, GIB, share) for name, (share, _) in trials.items()}
        pool = SharedGpu(Machine(8, 64 * GIB, (80 * GIB,)), needs, 0, command, tmp_path / "logs")
        pool.folder, pool.store, pool.beside = SweepFolder(tmp_path / "runs", "s"), tmp_path / "store", []
        units, said = [unit(name) for name in trials], []
        keys = {u.name: {(s.name, s.key) for s in u.stages} for u in units}
        leases = Leases(pool.folder.path / "claims", Owner.this_process())
        outcome = Scheduler(pool.folder, pool.store, units, pool, leases, said.append, keys).run(False)
        return outcome, pool, said

    return go


def test_a_trial_without_memory_on_a_shared_gpu_starts_again_with_more_of_one(on_shared_gpu):
    outcome, pool, said = on_shared_gpu(t1=(0.3, "4,4,0"), t2=(0.3, "0"), silent=(0.3, "4,0"))
    assert (outcome.finished, outcome.failed) == ({"t1", "t2", "silent"}, {})
    assert {name: need.gpu for name, need in pool.needs.items()} == {"t1": 1.0, "t2": 0.3, "silent": 0.6}
    assert pool.beside[:3] == [("t1", []), ("t2", ["t1"]), ("silent", ["t1", "t2"])]
    assert ("t1", []) in pool.beside[3:]  # with a whole GPU it is alone
    again = "t1: out of memory on a GPU that it shared, started again from its last checkpoint with {} of one"
    assert [line for line in said if "again" in line and "t1" in line] == [again.format("0.60"), again.format("1.00")]
    events = pool.folder.run("t1", False).events()
    assert [event["event"] for event in events] == ["run_failed", "run_restarted"] * 2 + ["run_finished"]
    assert events[1]["error"] == again.format("0.60")[len("t1: ") :]
    assert failure_of(pool.folder.run("silent", False), []) is None


def test_a_trial_that_had_the_gpu_to_itself_has_failed(on_shared_gpu):
    outcome, pool, _ = on_shared_gpu(t1=(0.6, "4"), t2=(1.0, "4"), full=(0.3, "40"), cpu=(0.0, "4"))
    assert outcome.failed == dict.fromkeys(("t1", "t2", "cpu"), "a resource gave way") | {"full": "the disk is full"}
    assert sorted(name for name, _ in pool.beside) == ["cpu", "full", "t1", "t1", "t2"]
    assert [set(others) - {"cpu"} for name, others in pool.beside if name == "t1"][1] == set()


def test_what_trials_take():
    cpu, gpu = [Machine(8, 32 * GIB)], [Machine(8, 32 * GIB, (80 * GIB,))]
    plain = unit("a").config
    assert need_of(plain, 2 * GIB, cpu, 0) == Need(1, 3.5 * GIB)
    assert need_of(plain, 2 * GIB, cpu, 4).cores == 2
    assert need_of(unit("a", num_threads=3).config, None, cpu, 4).cores == 3
    assert need_of(plain, 2 * GIB, gpu, 0).gpu == pytest.approx(0.05)
    assert need_of(plain, 30 * GIB, gpu, 0).gpu == pytest.approx(0.5)
    assert need_of(plain, 79 * GIB, gpu, 0).gpu == 1.0
    assert need_of(unit("a", device="cpu").config, GIB, gpu, 0).gpu == 0.0
    assert need_of(unit("a", num_workers=2).config, GIB, gpu, 0) == Need(
        1, 4.5 * GIB, 0.0, 2
    )  # one GPU for two workers
    assert shared_need(plain, cpu[0]) == Need(8, GIB)
    assert shared_need(plain, gpu[0]) == Need(8, GIB, 0.5)
    two = Machine(32, 256 * GIB, (80 * GIB, 80 * GIB))
    assert shared_need(plain, two) == Need(8, GIB, 0.5)
    assert shared_need(unit("a", num_workers=2).config, two) == Need(8, 2 * GIB, 1.0, 2)


def test_a_sweep_whose_largest_trial_fits_nowhere_is_refused_by_name():
    estimates = {"small": 1 * GIB, "large": 90 * GIB, "larger": 200 * GIB, "unknown": None}
    machines = [Machine(8, 512 * GIB, (80 * GIB,))]
    with pytest.raises(ClusterError, match="larger") as caught:
        refuse_too_large(estimates, True, machines)
    assert "2 trials" in str(caught.value.got)
    refuse_too_large(estimates, False, machines)
    refuse_too_large({"unknown": None}, True, machines)
