"""Another number of workers or another ZeRO stage on the way: same samples, same losses, same end."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from genrec_dist.artifacts.files import read_jsonl
from genrec_dist.testing.parity import without_unseen_bias
from genrec_dist.testing.processes import run_processes
from genrec_dist.testing.tiny_tasks import TASKS
from genrec_dist.testing.world_sizes import PARTS, Phase, phase_job
from genrec_dist.training.schedule import parts_of
from genrec_dist.training.worker import Worker

torch.set_num_threads(1)
DROPOUT = 0.3
CHANGES = [Phase(1, "zero1", 2), Phase(2, "zero3", 4), Phase(4, "zero1", 6), Phase(2, "zero3")]


def go(folder, phases: list[Phase], task: str) -> dict:
    """Run the phases one after the other; state, losses by step and samples by step of the whole training."""
    folder.mkdir()
    for phase in phases:
        if phase.world_size == 1:
            phase_job(Worker(), folder, task, phase, DROPOUT)
        else:
            run_processes(phase_job, phase.world_size, folder, task, phase, DROPOUT)
    samples: dict[int, list[int]] = {}
    for file in sorted(folder.glob("samples-*.jsonl")):
        for line in read_jsonl(file):
            samples.setdefault(line["step"], []).extend(line["samples"])
    curves = [line for line in read_jsonl(folder / "curves.jsonl") if line["split"] == "train"]
    return {
        "state": load_file(folder / "end.safetensors"),
        "losses": torch.tensor([line["loss"] for line in curves]),
        "samples": samples,
    }


@pytest.mark.parametrize("task", ["sasrec", pytest.param("generator", marks=pytest.mark.slow)])
def test_one_two_four_two_workers_and_stages(tmp_path, task):
    """World sizes 1, 2, 4, 2 and stages 1, 3, 1, 3 against one process of the torch engine, with dropout."""
    whole = go(tmp_path / "whole", [Phase(1, "torch")], task)
    changed = go(tmp_path / "changed", CHANGES, task)
    torch.testing.assert_close(changed["losses"], whole["losses"], atol=1e-5, rtol=1e-5)
    assert changed["state"].keys() == whole["state"].keys()
    for name, value in whole["state"].items():
        got, expected = without_unseen_bias(name, changed["state"][name]), without_unseen_bias(name, value)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4, msg=name)
    order = TASKS[task](Worker(), batch_size=9).order
    assert sorted(changed["samples"]) == list(range(3 * order.steps_per_epoch))
    for step, taken in changed["samples"].items():  # none lost, none repeated
        assert sorted(taken) == sorted(order.batch(step).tolist()), step


def test_the_stages_of_one_process_give_the_same(tmp_path):
    """Four parts of a batch on one worker, under every engine."""
    whole = go(tmp_path / "torch", [Phase(1, "torch")], "sasrec")
    for engine in ("zero0", "zero1", "zero2", "zero3"):
        other = go(tmp_path / engine, [Phase(1, engine)], "sasrec")
        torch.testing.assert_close(other["losses"], whole["losses"], atol=1e-6, rtol=1e-6)


def test_parts_are_shared_out_once():
    for world_size in (1, 2, 3, 4, 8):
        parts = [p for rank in range(world_size) for p in parts_of(Worker(rank, world_size), PARTS)]
        total = max(PARTS, world_size) if PARTS % world_size == 0 or world_size > PARTS else 6
        assert {p.world_size for p in parts} == {total}
        assert sorted(p.rank for p in parts) == list(range(total))
    assert parts_of(Worker(1, 3), 0) == [Worker(1, 3)]
