"""Batches of one shape: what is filled up is cut off, what is too large is cut; graphs on a GPU give the same."""

from __future__ import annotations

import logging

import pytest
import torch

from genrec_dist.evaluation.generative import GenerativeRanker
from genrec_dist.evaluation.replay import BatchRunner, DeviceProgress
from genrec_dist.generator.search_tables import SearchTables
from genrec_dist.testing.tiny import tiny_generator, tiny_gpt, tiny_histories, tiny_trie

torch.set_num_threads(1)
CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


class Doubling:
    """Doubles x; remembers the rows of each call, and fails above `most` rows."""

    def __init__(self, most: int = 1000) -> None:
        self.calls, self.most = [], most

    def __call__(self, batch):
        if len(batch["x"]) > self.most:
            raise torch.OutOfMemoryError("too many rows")
        self.calls.append(batch["x"].tolist())
        return {"y": 2 * batch["x"]}


def run(runner, *sizes):
    return [runner({"x": torch.arange(n) + 10 * n})["y"].tolist() for n in sizes]


EXPECTED = [[2 * (i + 10 * n) for i in range(n)] for n in (4, 4, 3, 1, 6)]


def test_every_batch_has_the_shape_of_the_first():
    double = Doubling()
    runner = BatchRunner(double, CPU, fixed=True)
    assert run(runner, 4, 4, 3, 1, 6) == EXPECTED
    assert {len(call) for call in double.calls} == {4}
    assert double.calls[3] == [30, 31, 32, 32]  # filled up with its last row
    assert (runner.size, runner.problem) == (4, None)


def test_a_batch_that_is_too_large_is_halved_until_it_fits():
    double = Doubling(most=3)
    runner = BatchRunner(double, CPU, fixed=True)
    assert run(runner, 11, 4, 1) == [[2 * (i + 10 * n) for i in range(n)] for n in (11, 4, 1)]
    assert runner.size == 3
    with pytest.raises(torch.OutOfMemoryError):
        run(BatchRunner(Doubling(most=0), CPU, fixed=True), 4)


def test_a_cpu_takes_batches_as_they_come():
    double = Doubling()
    assert run(BatchRunner(double, CPU), 4, 4, 3, 1, 6) == EXPECTED
    assert [len(call) for call in double.calls] == [4, 4, 3, 1, 6]


def test_results_do_not_change_with_the_next_batch():
    runner = BatchRunner(Doubling(), CPU, fixed=True)
    first = runner({"x": torch.arange(3)})["y"]
    runner({"x": torch.arange(3) + 5})
    assert first.tolist() == [0, 2, 4]


@pytest.mark.parametrize("make", [tiny_generator, tiny_gpt])
def test_ranks_of_filled_up_batches_are_those_of_the_rows_alone(make):
    trie = tiny_trie(25, 4, seed=1)
    ranker = GenerativeRanker(make(trie), 8, 0.4)
    plain, fixed = BatchRunner(ranker, CPU), BatchRunner(ranker, CPU, fixed=True)
    for seed, users in enumerate((9, 9, 4)):
        history, mask = tiny_histories(users, 25, 5, seed=seed)
        batch = {"history": history, "mask": mask, "target": torch.arange(users)}
        expected, found = plain(batch), fixed(batch)
        assert set(expected) == set(found)
        assert all(torch.equal(found[name], values) for name, values in expected.items())


def test_progress_on_a_cpu_is_said_at_once():
    said = []
    progress = DeviceProgress(said.append, CPU)
    progress.queued(3)
    progress.queued(5)
    progress.finish()
    assert said == [3, 5]


@needs_gpu
@pytest.mark.parametrize("make", [tiny_generator, tiny_gpt])
@pytest.mark.parametrize(
    "kind", [{"head": "child"}, {"head": "per_level"}, {"head": "child", "head_similarity": "dot"}]
)
@pytest.mark.parametrize("mix", [0.0, 0.4])
def test_a_graph_gives_the_ranks_of_the_eager_search_and_of_the_cpu(make, kind, mix):
    gpu, trie = torch.device("cuda"), tiny_trie(60, 5, seed=1)
    torch.set_float32_matmul_precision("highest")
    model = make(trie, **kind)
    on_cpu = BatchRunner(GenerativeRanker(model, 12, mix), CPU)
    histories = [tiny_histories(users, 60, 5, seed=users) for users in (32, 32, 5)]
    batches = [{"history": h, "mask": m, "target": torch.arange(len(h))} for h, m in histories]
    expected = [on_cpu(batch) for batch in batches]
    model = model.to(gpu)
    for kernel in ("triton", "gather"):
        ranker = GenerativeRanker(model, 12, mix, SearchTables(model, kernel))
        graphed, eager = BatchRunner(ranker, gpu), BatchRunner(ranker, gpu, graphs=False)
        for batch, wanted in zip(batches, expected):
            there = {name: value.to(gpu) for name, value in batch.items()}
            graphed(there), eager(there)
            torch.cuda.set_sync_debug_mode("error")
            try:
                found, slow = graphed(there), eager(there)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            for name, values in wanted.items():
                assert torch.equal(found[name], slow[name])
                assert (found[name].cpu() == values).float().mean() > 0.95, name  # other sums, other last digits
        assert graphed.problem is None


@needs_gpu
def test_what_cannot_be_captured_runs_kernel_by_kernel(caplog):
    def waits(batch):
        return {"y": batch["x"] * (2 if float(batch["x"].sum()) >= 0 else 3)}

    runner = BatchRunner(waits, torch.device("cuda"))
    with caplog.at_level(logging.WARNING):
        found = [runner({"x": torch.arange(n, device="cuda")})["y"].tolist() for n in (4, 2)]
    assert found == [[0, 2, 4, 6], [0, 2]]
    assert runner.problem
    assert "no CUDA graph" in caplog.text
    later = BatchRunner(lambda batch: {"y": batch["x"] + 1}, torch.device("cuda"))
    assert later({"x": torch.ones(3, device="cuda")})["y"].tolist() == [2, 2, 2]
    assert later.problem is None


@needs_gpu
def test_runner_after_runner_leaves_no_memory_behind():
    """cuBLAS keeps a workspace for every stream: a stream of its own for each runner's warm-up would leave one."""
    weight, held = torch.ones(256, 256, device="cuda"), []
    for _ in range(4):
        runner = BatchRunner(lambda batch: {"y": batch["x"] @ weight}, weight.device)
        runner({"x": torch.ones(64, 256, device="cuda")})
        del runner
        held.append(torch.cuda.memory_allocated())
    assert held[1:] == [held[0]] * 3
