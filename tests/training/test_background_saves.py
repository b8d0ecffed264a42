"""The writer thread: one write at a time, waited for by the next save and by every way out; its errors come back."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from pathlib import Path
from threading import Event

import pytest
import torch

from genrec_dist.errors import CheckpointError, CheckpointSpaceError
from genrec_dist.testing.faults import InjectedFault
from genrec_dist.training import checkpoints as module
from genrec_dist.training.checkpoints import Checkpoints
from genrec_dist.training.worker import Worker
from launcher.failures import explain


def save_step(checkpoints: Checkpoints, step: int, size: int = 4) -> float:
    return checkpoints.save(step, {"step": step}, {"w": torch.full((size,), float(step))}, None, 0)


def save_and_leave(folder: Path, step: int, error: BaseException) -> None:
    with Checkpoints(folder) as checkpoints:
        save_step(checkpoints, step)
        raise error


def newest(folder: Path) -> int:
    return Checkpoints(folder).latest(Worker())[0]["step"]


class Gate:
    """Holds the writer back until it is opened."""

    def __init__(self, monkeypatch) -> None:
        self.reached, self.open = Event(), Event()
        write = module.save_tensors

        def gated(tensors, path):
            self.reached.set()
            assert self.open.wait(60)
            return write(tensors, path)

        monkeypatch.setattr(module, "save_tensors", gated)


@pytest.fixture
def gate(monkeypatch) -> Gate:
    return Gate(monkeypatch)


def test_a_save_returns_before_it_is_written_and_the_next_one_waits_for_it(tmp_path, gate):
    with Checkpoints(tmp_path) as checkpoints:
        save_step(checkpoints, 1)
        assert gate.reached.wait(60)
        assert not (tmp_path / "step-1").exists()
        before = checkpoints.stalled_seconds
        gate.open.set()
        stalled = save_step(checkpoints, 2)
        assert (tmp_path / "step-1").exists()
        assert checkpoints.stalled_seconds == pytest.approx(before + stalled)
    assert newest(tmp_path) == 2


def test_the_seconds_that_a_save_waited_are_counted(tmp_path, monkeypatch):
    write = module.save_tensors
    monkeypatch.setattr(module, "save_tensors", lambda *a: time.sleep(0.5) or write(*a))
    with Checkpoints(tmp_path) as checkpoints:
        first = save_step(checkpoints, 1)
        assert first < 0.3
        assert save_step(checkpoints, 2) > 0.3
        assert checkpoints.wait() > 0.3
        assert checkpoints.wait() < 0.3
        assert checkpoints.stalled_seconds > 0.8
    inline = Checkpoints(tmp_path / "inline", background=False)
    assert save_step(inline, 1) > 0.5
    assert newest(tmp_path / "inline") == 1


@pytest.mark.parametrize("way_out", [InjectedFault, SystemExit, KeyboardInterrupt, ValueError])
def test_every_way_out_waits_for_the_write_in_flight(tmp_path, monkeypatch, way_out):
    write = module.save_tensors
    monkeypatch.setattr(module, "save_tensors", lambda *a: time.sleep(0.2) or write(*a))
    with pytest.raises(way_out) as caught:
        save_and_leave(tmp_path, 3, way_out())
    assert newest(tmp_path) == 3
    assert not hasattr(caught.value, "__notes__")


def break_writing(monkeypatch, error: BaseException) -> None:
    def fail(tensors, path):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(module, "save_tensors", fail)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith("writing")]


@pytest.mark.parametrize("then", ["save", "wait", "close", "leave"])
def test_an_error_of_the_writer_is_raised_at_the_next_call(tmp_path, monkeypatch, then):
    checkpoints = Checkpoints(tmp_path)
    save_step(checkpoints, 1)
    checkpoints.wait()
    break_writing(monkeypatch, OSError(errno.EIO, os.strerror(errno.EIO)))
    save_step(checkpoints, 2)
    calls = {
        "save": lambda: save_step(checkpoints, 3),
        "wait": checkpoints.wait,
        "close": checkpoints.close,
        "leave": lambda: checkpoints.__exit__(None, None, None),
    }
    with pytest.raises(CheckpointError, match="Input/output error") as caught:
        calls[then]()
    assert caught.value.exit_code == 5
    assert leftovers(tmp_path) == []
    assert newest(tmp_path) == 1
    checkpoints.close()  # an error is raised once


def test_after_an_error_the_next_save_is_a_whole_one_again(tmp_path, monkeypatch):
    best = {"w": torch.ones(1)}
    with Checkpoints(tmp_path) as checkpoints:
        with monkeypatch.context() as patch:
            break_writing(patch, OSError(errno.EIO, "x"))
            checkpoints.save(1, {"step": 1}, {"w": torch.ones(1)}, best, 1)
            with pytest.raises(CheckpointError):
                checkpoints.wait()
        checkpoints.save(2, {"step": 2}, {"w": torch.ones(1)}, best, 1)
    found = Checkpoints(tmp_path).latest(Worker())
    assert found[0]["step"] == 2
    assert found[2]["w"].tolist() == [1.0]


def test_beside_another_error_it_is_a_note(tmp_path, monkeypatch):
    break_writing(monkeypatch, OSError(errno.EIO, "x"))
    with pytest.raises(InjectedFault) as caught:
        save_and_leave(tmp_path, 1, InjectedFault())
    assert "the checkpoint in flight was not written" in caught.value.__notes__[0]


def test_a_bug_in_the_writer_stays_what_it_is(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"loss": float("nan")}, {"w": torch.ones(1)}, None, 0)  # no number of JSON
    with pytest.raises(ValueError, match="JSON"):
        checkpoints.close()
    assert leftovers(tmp_path) == []


def test_a_full_disk_says_what_to_do_and_leaves_the_older_ones(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, background=False)
    save_step(checkpoints, 1)
    break_writing(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(CheckpointSpaceError) as caught:
        save_step(checkpoints, 2, size=1000)
    assert explain(caught.value).exit_code == 4
    assert "bytes free" in caught.value.got
    assert "4,000 bytes" in caught.value.expected
    assert "free space" in caught.value.fix
    assert leftovers(tmp_path) == []
    assert newest(tmp_path) == 1


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=30)


def test_a_disk_that_is_really_full(small_disk):
    folder = small_disk / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        save_step(checkpoints, 1, size=100_000)
        save_step(checkpoints, 2, size=200_000)  # does not fit beside the other
        with pytest.raises(CheckpointSpaceError, match="No space left"):
            checkpoints.wait()
        assert leftovers(folder) == []
        assert newest(folder) == 1
        save_step(checkpoints, 3, size=100_000)
    assert newest(folder) == 3
