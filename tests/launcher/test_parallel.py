"""Runs of a study at once: who starts when, what a failing child leaves, a signal to all. Children are shell lines."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from genrec_dist.pipeline import Stage
from launcher.failures import Stopped
from launcher.parallel import Job, run_jobs


def stage(name: str, *inputs: Stage) -> Stage:
    return Stage(name, 1, {}, {one.name: one for one in inputs}, lambda _: None)


class Work:
    """Jobs in a scratch folder; a child says what it does in `said`."""

    def __init__(self, root: Path) -> None:
        self.root, self.said, self.screen = root, root / "said", io.StringIO()
        self.store = root / "store"
        self.said.touch()

    def job(self, name: str, stages: list[Stage], then: str = "", code: int = 0) -> Job:
        """A child that finishes its stages, in order, then runs `then`."""
        lines = [f"echo {name} in >> {self.said}"]
        for one in stages:
            folder = self.store / one.name / one.key
            lines.append(
                f"sleep 0.1; mkdir -p {folder}; touch {folder}/MANIFEST.json; echo {name} {one.name} >> {self.said}"
            )
        lines += [then or "true", f"echo {name} out >> {self.said}", f"echo last words of {name}", f"exit {code}"]
        return Job(name, ["sh", "-c", "\n".join(lines)], stages[-1:], self.root / "logs" / f"{name}.log", grace=5.0)

    def run(self, jobs: list[Job], limit: int, gpus: Sequence[str] = ()):
        return run_jobs(jobs, limit, self.store, Console(file=self.screen, width=200), gpus)

    def words(self) -> list[str]:
        return self.said.read_text().splitlines()


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path)


def test_a_shared_stage_is_waited_for_and_then_work_goes_on_side_by_side(work: Work, wait_for) -> None:
    shared = stage("shared")
    own = [stage(name, shared) for name in ("first", "second")]
    release = work.root / "release"
    hold = f"while [ ! -e {release} ]; do sleep 0.02; done"
    jobs = [work.job("first", [shared, own[0]], then=hold), work.job("second", [shared, own[1]])]
    thread = threading.Thread(target=_release, args=(work, release, wait_for))
    thread.start()
    assert work.run(jobs, 2) is None
    thread.join()
    words = work.words()
    assert words.index("first shared") < words.index("second in")  # not both at the lock of the shared one
    assert words.index("second out") < words.index("first out")  # nor one after the other


def test_runs_are_spread_over_gpus(work: Work, monkeypatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    jobs = [
        work.job(
            str(place),
            [stage(f"s{place}")],
            then=f"echo gpu $CUDA_VISIBLE_DEVICES >> {work.said}; while [ $(grep -c gpu {work.said}) -lt 4 ]; "
            "do sleep 0.02; done",
        )
        for place in range(4)
    ]
    for job in jobs[:3]:
        job.one_gpu = True
    assert work.run(jobs, 4, ["2", "GPU-x"]) is None
    assert sorted(word for word in work.words() if word.startswith("gpu")) == ["gpu", "gpu 2", "gpu 2", "gpu GPU-x"]


def _release(work: Work, release: Path, wait_for: Callable) -> None:
    wait_for(lambda: "second out" in work.words())
    release.touch()


def test_no_more_than_the_limit_at_once(work: Work) -> None:
    jobs = [work.job(str(place), [stage(f"s{place}")]) for place in range(5)]
    assert work.run(jobs, 2) is None
    running = most = 0
    for word in work.words():
        running += {"in": 1, "out": -1}.get(word.split()[1], 0)
        most = max(most, running)
    assert most == 2
    assert running == 0


def test_one_that_fails_is_reported_and_the_others_go_on(work: Work) -> None:
    jobs = [
        work.job("bad", [stage("a")], code=5),
        work.job("good", [stage("b")]),
        work.job("shot", [stage("c")], then="kill -9 $$"),
        work.job("late", [stage("d")]),
    ]
    failure = work.run(jobs, 1)
    assert {"good out", "late out"} <= set(work.words())
    assert failure is not None
    assert failure.exit_code == 5
    assert "2 of 4 runs failed" in failure.text
    assert "bad (exit code 5), shot (killed by SIGKILL)" in failure.text
    assert str(jobs[0].log) in failure.text
    assert "last words of bad" in work.screen.getvalue()
    assert "good: finished in" in work.screen.getvalue()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_on_a_signal_the_children_save_and_the_study_ends(work: Work, wait_for, number, code) -> None:
    trap = f"trap 'echo told >> {work.said}; exit 75' TERM; while true; do sleep 0.02; done"
    jobs = [work.job("one", [stage("a")], then=trap), work.job("two", [stage("b")])]

    def tell() -> None:
        wait_for(lambda: "one a" in work.words())
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=tell)
    thread.start()
    with pytest.raises(Stopped) as caught:
        work.run(jobs, 1)
    thread.join()
    assert caught.value.failure.exit_code == code
    assert work.words()[-1] == "told"
    assert "two in" not in work.words()
    assert jobs[0].process.returncode == 75
