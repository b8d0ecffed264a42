"""When a checkpoint is due: by a clock that is told the time, and by steps."""

from __future__ import annotations

import pytest

from genrec_dist.training.cadence import Cadence


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def test_by_the_clock():
    clock = Clock()
    cadence = Cadence(2.0, 0, clock)
    clock.seconds += 119.5
    assert not cadence.due(10_000)
    clock.seconds += 0.5
    assert cadence.due(1)
    assert cadence.due(2)  # until it is saved
    cadence.saved(2)
    assert not cadence.due(3)
    clock.seconds += 120
    assert cadence.due(3)


def test_by_steps():
    cadence = Cadence(0.0, 3, Clock())
    due = []
    for step in range(1, 11):
        if cadence.due(step):
            due.append(step)
            cadence.saved(step)
    assert due == [3, 6, 9]


def test_whichever_comes_first_and_both_count_from_the_last_one():
    clock = Clock()
    cadence = Cadence(1.0, 4, clock)
    clock.seconds += 60
    assert cadence.due(2)
    cadence.saved(2)
    clock.seconds += 59
    assert not cadence.due(5)
    assert cadence.due(6)
    cadence.saved(6)
    clock.seconds += 59
    assert not cadence.due(9)
    clock.seconds += 1
    assert cadence.due(9)


def test_a_resumed_run_counts_from_what_it_read():
    cadence = Cadence(0.0, 10, Clock())
    cadence.saved(95)
    assert not cadence.due(100)
    assert cadence.due(105)


@pytest.mark.parametrize(("minutes", "steps", "by_clock"), [(0.0, 0, False), (0.0, 5, False), (1.0, 5, True)])
def test_neither_means_never_and_only_a_clock_needs_agreement(minutes, steps, by_clock):
    clock = Clock()
    cadence = Cadence(minutes, steps, clock)
    clock.seconds += 1e9
    assert cadence.by_clock is by_clock
    assert cadence.due(1) is by_clock
