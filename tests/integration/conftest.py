"""What the tests of the Kubernetes modules start: an API of their own with three simulated nodes, beside the lab."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.local_cluster import LocalCluster


@pytest.fixture(scope="module", name="kube")
def local_kube() -> Iterator[LocalCluster]:
    with LocalCluster(controller_manager=True, scheduler=True, nodes=3) as cluster:
        yield cluster
