"""Triton's passes of k-means, on a GPU, beside float64 and torch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genrec_dist.identifiers.device_points import TorchPasses, on_grid
from genrec_dist.identifiers.points import Grid

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

SHAPES = [(20_003, 128, 256), (5_001, 384, 250), (3_001, 64, 1000), (2_001, 4096, 300), (3_000, 20, 7), (1_000, 1, 3)]


@pytest.mark.parametrize("priced", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
@pytest.mark.parametrize(("rows", "dim", "clusters"), SHAPES)
def test_passes_find_the_nearest_and_add_up_exactly(rows, dim, clusters, scale, priced):
    from genrec_dist.identifiers.triton_passes import TritonPasses

    gpu, rng = torch.device("cuda"), np.random.default_rng(rows + clusters)
    passes, plain = TritonPasses(gpu), TorchPasses(gpu)
    host = (scale * rng.standard_normal((rows, dim))).astype(np.float32)
    centroids = host[rng.choice(rows, clusters, replace=False)] + np.float32(0.1 * scale)
    prices = 0.1 * scale**2 * dim * rng.random(clusters) if priced else None
    largest, values = float(np.abs(host).max()), torch.from_numpy(host).to(gpu)
    errors_on, sums_on = Grid(rows, 4 * dim * largest**2).shift, Grid(rows, largest).shift
    labels = torch.full((rows,), -7, dtype=torch.int32, device=gpu)
    near = torch.full((rows,), torch.nan, device=gpu)
    errors = torch.zeros(passes.error_copies, clusters, dtype=torch.float64, device=gpu)
    passes.nearest(
        values, values.square().sum(1), passes.table(centroids, prices, largest), labels, near, errors, errors_on
    )
    wide, table = values.double(), torch.from_numpy(centroids).to(gpu).double()
    distances = wide.square().sum(1)[:, None] - 2 * wide @ table.T + table.square().sum(1)
    costs = distances if prices is None else distances + torch.from_numpy(prices.astype(np.float32)).to(gpu)
    size = float(wide.square().sum(1).mean())
    chosen = labels.long()[:, None]
    assert float((costs.gather(1, chosen)[:, 0] - costs.min(1).values).max()) <= 4e-6 * size
    assert float((near - distances.gather(1, chosen)[:, 0]).abs().max()) <= 1e-5 * size
    wanted = torch.zeros(clusters, dtype=torch.float64, device=gpu)
    assert torch.equal(errors.sum(0), wanted.index_add_(0, labels.long(), on_grid(near, errors_on)))
    old = torch.from_numpy(rng.integers(0, clusters, rows, np.int32)).to(gpu)
    for before, moved in ((old, (old != labels).nonzero()[:, 0]), (None, torch.arange(rows, device=gpu))):
        found = [
            (
                torch.zeros(clusters, dim, dtype=torch.float64, device=gpu),
                torch.zeros(clusters, dtype=torch.int64, device=gpu),
            )
            for _ in range(2)
        ]
        for way, (sums, counts) in zip((passes, plain), found, strict=True):
            way.move(values, moved, before, labels, sums, counts, sums_on)
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])
