"""Prefetching: the same batches as without, never too far ahead, errors at their step, a clean end."""

from __future__ import annotations

import threading
import time

import pytest

from genrec_dist.training.prefetch import Prefetcher


def threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


@pytest.mark.parametrize("depth", [0, 1, 2, 7])
def test_batches_come_in_turn(depth):
    with Prefetcher(lambda step: step * step, 3, 20, depth) as batches:
        assert [batches.get(step) for step in range(3, 10)] == [step * step for step in range(3, 10)]
        assert list(batches) == [step * step for step in range(10, 20)]
    assert threads() == 0


def test_at_most_depth_ahead():
    made: list[int] = []
    enough = threading.Semaphore(0)

    def make(step: int) -> int:
        made.append(step)
        enough.release()
        return step

    with Prefetcher(make, 0, 100, depth=3) as batches:
        for _ in range(3):
            assert enough.acquire(timeout=10)
        assert not enough.acquire(timeout=0.05)
        for step in range(5):
            batches.get(step)
            assert enough.acquire(timeout=10)
            assert not enough.acquire(timeout=0.02)
        assert made == list(range(8))
    assert made == list(range(8))


def test_an_error_comes_at_its_step_and_ends_the_thread():
    def make(step: int) -> int:
        if step == 4:
            raise KeyError("four")
        return step

    with Prefetcher(make, 0, 10) as batches:
        assert [batches.get(step) for step in range(4)] == [0, 1, 2, 3]
        for _ in range(2):  # and again when it is asked for again
            with pytest.raises(KeyError, match="four"):
                batches.get(4)
    assert threads() == 0


def test_an_error_of_the_training_ends_the_thread():
    def training() -> None:
        with batches:
            batches.get(0)
            raise RuntimeError("training")

    batches = Prefetcher(lambda step: step, 0, 1000)
    with pytest.raises(RuntimeError, match="training"):
        training()
    assert threads() == 0
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        batches.get(1)


def test_closing_waits_for_the_batch_in_the_making():
    begun, finish = threading.Event(), threading.Event()

    def make(step: int) -> int:
        begun.set()
        assert finish.wait(10)
        return step

    batches = Prefetcher(make, 0, 10)
    assert begun.wait(10)
    threading.Timer(0.05, finish.set).start()
    batches.close()
    assert threads() == 0


@pytest.mark.parametrize("depth", [0, 2])
def test_only_the_next_step_can_be_had(depth):
    with Prefetcher(lambda step: step, 0, 2, depth) as batches:
        with pytest.raises(ValueError, match="step 1 asked for; step 0 of 2 is next"):
            batches.get(1)
        assert list(batches) == [0, 1]
        with pytest.raises(ValueError, match="step 2 asked for"):
            batches.get(2)


def test_waiting_is_counted_and_hidden_by_the_thread():
    def make(step: int) -> int:
        time.sleep(0.02)
        return step

    waited = {}
    for depth in (0, 2):
        with Prefetcher(make, 0, 10, depth) as batches:
            for _ in batches:
                time.sleep(0.04)
            waited[depth] = batches.waited_seconds
    assert waited[0] >= 10 * 0.02
    assert waited[2] < 0.5 * waited[0]
