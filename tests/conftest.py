"""One local Ray cluster for all tests of a session that need one."""

import os
from collections.abc import Iterator

import pytest
import ray

from passreid_ray.engines.ray_cluster import WorkersConfig, connect

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A local cluster with room for two training workers."""
    connect(WorkersConfig(num_workers=2))
    yield
    ray.shutdown()
