"""Fixtures of the integration tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from host_cluster import host_cluster

from genrec_dist.testing.hosts import Host, hosts_refused


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    """A head without workers' cores, and two hosts with one each."""
    refused = hosts_refused()
    if refused is not None:
        pytest.skip(f"separate hosts: {refused}")
    with host_cluster(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts
