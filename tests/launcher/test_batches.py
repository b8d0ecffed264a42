"""Which batches and numbers of workers go together."""

from __future__ import annotations

import pytest

from genrec_dist.config import build_config
from genrec_dist.errors import ConfigError
from launcher.run import check_batches
from launcher.torchrun import shared


def config(batch: int, method: str = "sasrec", **runtime):
    return build_config(
        {
            "method": method,
            "catalog": {"source": "synthetic"},
            "sasrec": {"optim": {"batch_size": batch}},
            "references": [],
            "runtime": runtime,
        },
        where="test",
    )


@pytest.mark.parametrize(("batch", "least", "most"), [(12, 0, 3), (12, 1, 4), (12, 3, 4), (64, 2, 2), (60, 3, 6)])
def test_every_number_of_workers_that_may_take_part_divides_the_batch(batch, least, most):
    check_batches(config(batch, num_workers=most, min_workers=least))


@pytest.mark.parametrize(
    ("batch", "least", "most", "fix"), [(64, 0, 3, "63 or 66"), (64, 2, 4, "60 or 72"), (2, 1, 3, "6 or 6")]
)
def test_other_batches_are_refused_with_the_nearest_that_would_do(batch, least, most, fix):
    with pytest.raises(ConfigError, match=r"sasrec\.optim\.batch_size") as caught:
        check_batches(config(batch, num_workers=most, min_workers=least))
    assert caught.value.fix == f"use {fix}"


@pytest.mark.parametrize(
    "changes",
    [
        {"num_workers": 2, "min_workers": 3},
        {"num_workers": 2, "min_workers": 1, "backend": "local"},
        {"num_workers": 2, "min_workers": 1, "method": "lightgcn"},
        {"num_workers": 2, "min_workers": 1, "method": "prorec", "shard_tables": True},
    ],
)
def test_where_the_number_of_workers_cannot_change_that_is_said(changes):
    with pytest.raises(ConfigError, match=r"runtime\.min_workers"):
        check_batches(config(64, **changes))


def test_torchruns_ranks_are_the_workers(monkeypatch):
    assert shared(config(64)).runtime.num_workers == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    for given in (1, 4):
        assert shared(config(64, backend="local", num_workers=given)).runtime.num_workers == 4
    with pytest.raises(ConfigError, match=r"runtime\.num_workers"):
        shared(config(64, backend="local", num_workers=2))
    with pytest.raises(ConfigError, match=r"runtime\.backend"):
        shared(config(64, backend="ray"))
