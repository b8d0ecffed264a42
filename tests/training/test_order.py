"""Sample order: a permutation, a pure function, every sample once an epoch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec_dist.training import order as order_module
from genrec_dist.training.order import BatchOrder, permute

CPU = torch.device("cpu")
FROZEN_PERMUTATION = [1, 6, 2, 4, 0, 3, 7, 5]
FROZEN_BATCHES = [[1, 9, 5], [6, 7, 3], [8, 4, 0], [2]]


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 5000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10_000))
def test_permute_is_a_bijection(size, seed, epoch):
    image = permute(np.arange(size), size, seed, epoch)
    assert (np.sort(image) == np.arange(size)).all()


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 4095, 4097])
def test_permute_is_a_bijection_at_the_edges_of_powers_of_two(size):
    for seed in range(3):
        assert len(set(permute(np.arange(size), size, seed, seed).tolist())) == size


@settings(max_examples=50, deadline=None)
@given(size=st.integers(2, 5000), data=st.data())
def test_a_part_alone_is_the_part_of_the_whole(size, data):
    indices = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    assert (permute(indices, size, 7, 3) == permute(np.arange(size), size, 7, 3)[indices]).all()


def test_epochs_and_seeds_differ():
    images = [permute(np.arange(1000), 1000, seed, epoch) for seed in range(4) for epoch in range(4)]
    for i, first in enumerate(images):
        for second in images[:i]:
            assert (first == second).mean() < 0.02  # one in a thousand agrees by chance


def test_the_order_looks_random():
    """Mean displacement of a random permutation is n / 3, and neighbours do not stay neighbours."""
    image = permute(np.arange(3000), 3000, 0, 0)
    assert abs(np.abs(image - np.arange(3000)).mean() - 1000) < 50
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.06
    first = [int(permute(np.array([0]), 10, seed, 0)[0]) for seed in range(2000)]
    assert np.bincount(first, minlength=10).min() > 130  # 200 expected at each place


def test_the_order_is_frozen():
    """A checkpoint of an older version must find the order it was written with."""
    assert permute(np.arange(8), 8, 0, 0).tolist() == FROZEN_PERMUTATION
    lengths = np.arange(10) % 4
    assert [BatchOrder(10, 3, 5, lengths, 2).batch(step).tolist() for step in range(4)] == FROZEN_BATCHES


def orders():
    lengths = np.random.default_rng(0).integers(1, 20, 103)
    yield BatchOrder(103, 8, 3)
    yield BatchOrder(96, 8, 3)
    yield BatchOrder(5, 8, 3)
    yield BatchOrder(1, 1, 3)
    yield BatchOrder(103, 8, 3, lengths, 4)
    yield BatchOrder(103, 8, 3, lengths, 100)
    yield BatchOrder(103, 8, 3, lengths, 1)
    yield BatchOrder(97, 8, 3, lengths[:97], 4)


@pytest.mark.parametrize("order", list(orders()), ids=lambda o: f"{o.num_samples}-{o.batch_size}-{o.buckets}")
def test_an_epoch_covers_every_sample_once(order):
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        batches = [order.batch(step) for step in steps]
        assert sorted(np.concatenate(batches).tolist()) == list(range(order.num_samples))
        assert all(0 < len(batch) <= order.batch_size for batch in batches)
        assert sum(len(batch) < order.batch_size for batch in batches) <= 1


@pytest.mark.parametrize("order", list(orders()), ids=lambda o: f"{o.num_samples}-{o.batch_size}-{o.buckets}")
def test_any_step_alone_is_the_step_of_the_sequence(order):
    total = 3 * order.steps_per_epoch
    in_turn = [order.batch(step).tolist() for step in range(total)]
    assert [order.batch(step).tolist() for step in reversed(range(total))] == in_turn[::-1]
    for step in range(0, total, 5):
        fresh = BatchOrder(order.num_samples, order.batch_size, order.seed, order.lengths, order.buckets)
        assert fresh.batch(step).tolist() == in_turn[step]


def test_buckets_gather_like_lengths_and_shuffle_the_batches():
    lengths = np.random.default_rng(1).integers(1, 50, 800)
    plain, bucketed = BatchOrder(800, 10, 0, lengths), BatchOrder(800, 10, 0, lengths, 40)
    spread = [np.mean([np.ptp(lengths[o.batch(s)]) for s in range(80)]) for o in (plain, bucketed)]
    assert spread[1] < 0.15 * spread[0]
    means = [lengths[bucketed.batch(s)].mean() for s in range(40)]
    assert means != sorted(means)
    assert means != sorted(means, reverse=True)


def test_buckets_without_lengths_are_the_plain_order():
    assert BatchOrder(50, 7, 1, None, 4).batch(3).tolist() == BatchOrder(50, 7, 1).batch(3).tolist()


@pytest.mark.parametrize("device", [None, CPU], ids=["numpy", "torch"])
@pytest.mark.parametrize("permuted", [1, 24, 30, 10_000])
def test_windows_of_any_size_give_the_same_batches(device, permuted):
    plain, other = BatchOrder(103, 8, 3), BatchOrder(103, 8, 3, device=device, permuted=permuted)
    for step in (*range(3 * plain.steps_per_epoch), 5, 20, 0):
        epoch, index = divmod(step, plain.steps_per_epoch)
        alone = permute(np.arange(index * 8, min(index * 8 + 8, 103)), 103, 3, epoch)
        assert plain.batch(step).tolist() == other.batch(step).tolist() == alone.tolist()


def test_a_window_is_permuted_once(monkeypatch):
    calls = []
    monkeypatch.setattr(order_module, "permute", lambda *args: calls.append(len(args[0])) or permute(*args))
    order = BatchOrder(103, 8, 3, device=CPU, permuted=40)
    for step in range(order.steps_per_epoch):
        order.batch(step)
    assert calls == [40, 40, 23]
