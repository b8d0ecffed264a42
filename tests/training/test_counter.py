"""Counter-based random numbers: the same bits in numpy and torch, spread evenly, no stream like another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genrec_dist.training.counter import mix, normals, stream_key, uniforms
from genrec_dist.training.order import BatchOrder, permute

COUNTERS = np.arange(200_000)


def test_known_values_of_splitmix64():
    """The first outputs of SplitMix64 with seed 0: key 0 hashes counter n * golden ratio."""
    golden = 0x9E3779B97F4A7C15
    states = np.array([0, golden], np.uint64).view(np.int64)
    assert mix(states, 0).view(np.uint64).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@pytest.mark.parametrize("function", [mix, uniforms])
@pytest.mark.parametrize("key", [0, 1, 2**63 + 5, 2**64 - 1])
def test_numpy_and_torch_agree_to_the_bit(function, key):
    assert np.array_equal(function(COUNTERS, key), function(torch.from_numpy(COUNTERS), key).numpy())


def test_uniform_and_normal():
    chance = uniforms(COUNTERS, 3)
    assert 0 <= chance.min() < chance.max() < 1
    counts = np.histogram(chance, 50, (0, 1))[0]
    assert np.abs(counts - 4000).max() < 5 * 4000**0.5
    values = normals(COUNTERS, 3)
    assert abs(values.mean()) < 0.01
    assert values.std() == pytest.approx(1, abs=0.01)
    assert (np.abs(values) > 3).mean() == pytest.approx(0.0027, abs=0.0006)
    assert abs(np.corrcoef(uniforms(COUNTERS, 3), uniforms(COUNTERS, 4))[0, 1]) < 0.01


def test_keys_depend_on_every_part_and_their_order():
    keys = {stream_key(*parts) for parts in ((1, 2), (2, 1), (1, 2, 0), (1,), (0, 1, 2), (1, 3))}
    assert len(keys) == 6


def test_batches_on_a_device_are_the_same():
    plain, device = BatchOrder(1000, 64, 5), BatchOrder(1000, 64, 5, device=torch.device("cpu"))
    for step in range(40):
        assert np.array_equal(plain.batch(step), device.batch(step).numpy())
    assert np.array_equal(permute(np.arange(1000), 1000, 5, 1), permute(torch.arange(1000), 1000, 5, 1).numpy())
