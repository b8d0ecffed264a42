"""Checkpoints of which every worker has a part: whole or not at all, one choice and one error for all workers."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from genrec_dist.artifacts.files import read_json, write_json
from genrec_dist.errors import ArtifactError, CheckpointSpaceError
from genrec_dist.testing.faults import InjectedFault, flip_byte
from genrec_dist.testing.processes import run_processes
from genrec_dist.training import checkpoints as module
from genrec_dist.training.agreement import agree_on_error
from genrec_dist.training.checkpoint_folder import MANIFEST
from genrec_dist.training.checkpoints import Checkpoints
from genrec_dist.training.worker import Worker


def save_step(checkpoints: Checkpoints, worker: Worker, step: int, best_step: int) -> None:
    state = {"rows": torch.tensor([worker.rank]), "w": torch.full((3,), float(step + worker.rank))}
    best = {"w": torch.full((2,), float(best_step))}
    checkpoints.save_sharded(step, {"step": step}, state, best, best_step, worker)


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def slow_writer(seconds: float) -> None:
    write = module.save_tensors
    module.save_tensors = lambda *a: time.sleep(seconds) or write(*a)


def write_and_resume(worker: Worker, root: Path) -> None:
    """Three saves; then the newest is broken, and all go back together."""
    with Checkpoints(root / "c") as checkpoints:
        for step, best_step in ((1, 1), (2, 2), (3, 2)):
            save_step(checkpoints, worker, step, best_step)
    if worker.is_main:
        flip_byte(root / "c" / "step-3" / "state-1.safetensors")
    worker.barrier()
    later = Checkpoints(root / "c")
    loop, files, best = later.latest_sharded(worker)
    parts = [file.name for file in (*files, *best)]
    found = {"loop": loop, "files": parts, "skipped": later.skipped, "own": load_file(files[worker.rank])["w"].tolist()}
    before = best[0].stat().st_ino
    with later:
        save_step(later, worker, 3, 2)
    found["same best"] = (root / "c" / "best-2" / best[0].name).stat().st_ino == before
    write_json(root / f"resumed-{worker.rank}.json", found)


def fail_on_one(worker: Worker, root: Path) -> None:
    """Worker 1 has no room at the second save: both are told so, and the first save is what is left."""
    checkpoints = Checkpoints(root / "f")
    save_step(checkpoints, worker, 1, 1)
    checkpoints.wait()
    write = module.save_tensors
    if worker.rank == 1:

        def full(tensors, path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        module.save_tensors = full
    save_step(checkpoints, worker, 2, 1)
    try:
        save_step(checkpoints, worker, 3, 1)
    except CheckpointSpaceError as error:
        write_json(root / f"failed-{worker.rank}.json", str(error))
    module.save_tensors = write
    worker.barrier()
    if worker.is_main:
        write_json(root / "left.json", steps(root / "f"))
    worker.barrier()
    save_step(checkpoints, worker, 4, 1)
    checkpoints.close()


def leave_alone(worker: Worker, root: Path) -> None:
    """Both leave by an error while they write; worker 1 is slower."""
    slow_writer(0.1 + worker.rank)
    try:
        with Checkpoints(root / "l") as checkpoints:
            save_step(checkpoints, worker, 1, 1)
            raise InjectedFault
    except InjectedFault:
        pass


def never_come(worker: Worker, root: Path) -> None:
    """Worker 1 is gone before it wrote its part."""
    module.PATIENCE_SECONDS = 0.5
    try:
        with Checkpoints(root / "n") as checkpoints:
            if worker.rank == 1:
                worker.barrier()
                return
            save_step(checkpoints, worker, 1, 1)
            raise InjectedFault
    except InjectedFault:
        pass


def agree(worker: Worker, root: Path) -> None:
    own = [None, ArtifactError("damaged", where="x", got=worker.rank, fix="mend")][worker.rank]
    found = [agree_on_error(own, worker), agree_on_error(None, worker)]
    untyped = agree_on_error(RuntimeError("é" * 300) if worker.rank == 0 else None, worker)
    same = found[0] is own
    write_json(
        root / f"agreed-{worker.rank}.json", [same, type(found[0]).__name__, str(found[0]), found[1], str(untyped)]
    )


def plain_latest(worker: Worker, root: Path) -> None:
    """Worker 0 alone writes; all read what it chose, though worker 1 looks at a copy whose newest one is whole."""
    checkpoints = Checkpoints(root / "p" / str(worker.rank), background=False)
    for step in (1, 2):
        checkpoints.save(step, {"step": step}, {"w": torch.tensor(float(step))}, None, 0)
    if worker.is_main:
        flip_byte(checkpoints.folder / "step-2" / "state.safetensors")
    worker.barrier()
    loop, state, _ = checkpoints.latest(worker)
    write_json(root / f"plain-{worker.rank}.json", [loop["step"], float(state["w"]), len(checkpoints.skipped)])


def work(worker: Worker, root: Path) -> None:
    for function in (write_and_resume, fail_on_one, leave_alone, agree, plain_latest, never_come):
        function(worker, root)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sharded")
    run_processes(work, 2, root)
    return root


def test_all_parts_are_there_and_all_workers_go_back_together(done):
    found = [read_json(done / f"resumed-{rank}.json") for rank in range(2)]
    for rank, one in enumerate(found):
        assert one["loop"] == {"step": 2}
        assert one["files"] == [f"{kind}-{part}.safetensors" for kind in ("state", "model") for part in range(2)]
        assert one["own"] == [2.0 + rank] * 3
        assert one["same best"]
    assert found[0]["skipped"] == ["step-3: state-1.safetensors does not match its SHA-256"]
    assert steps(done / "c") == ["best-2", "step-2", "step-3"]
    assert sorted(read_json(done / "c" / "step-3" / MANIFEST)["files"]) == [
        "state-0.safetensors",
        "state-1.safetensors",
    ]


def test_one_workers_full_disk_is_every_workers_error_and_leaves_the_older_one(done):
    texts = [read_json(done / f"failed-{rank}.json") for rank in range(2)]
    assert texts[0] == texts[1]
    assert "No space left" in texts[0]
    assert read_json(done / "left.json") == ["best-1", "step-1"]
    assert steps(done / "f") == ["best-1", "step-1", "step-4"]


def test_leaving_by_an_error_waits_for_the_other_workers_part(done):
    assert Checkpoints(done / "l").latest_sharded(Worker())[0] == {"step": 1}


def test_leaving_by_an_error_does_not_wait_for_ever(done):
    assert steps(done / "n") == []


def test_errors_are_agreed_on(done):
    first, second = (read_json(done / f"agreed-{rank}.json") for rank in range(2))
    assert first[1:4] == second[1:4]
    assert (first[4], second[4].splitlines()[0]) == ("é" * 300, "a worker failed")  # its own, and what others hear
    assert (first[0], second[0]) == (False, True)
    assert first[1:4] == ["ArtifactError", "damaged\n  where: x\n  got: 1\n  fix: mend", None]
    error = RuntimeError("x")
    assert agree_on_error(error, Worker()) is error


def test_worker_0_chooses_for_all(done):
    assert read_json(done / "plain-0.json") == [1, 1.0, 1]
    assert read_json(done / "plain-1.json") == [1, 1.0, 0]


def test_a_plain_checkpoint_is_no_sharded_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, background=False)
    checkpoints.save(1, {}, {"w": torch.ones(1)}, None, 0)
    assert checkpoints.latest_sharded(Worker()) is None
    assert checkpoints.skipped == ["step-1: it has no state-0.safetensors"]
