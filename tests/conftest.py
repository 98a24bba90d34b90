"""One local Ray cluster for all tests of a session that need one."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from passreid_ray.engines.ray_cluster import WorkersConfig, connect

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray starts workers at niceness 15: beside the other process of the tests, at 0, one took minutes to start.
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Several processes share the tests so that one alone starts a Ray cluster."""
    from tests.scheduling import OneCluster

    return OneCluster(config, log)


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A local cluster with room for two training workers."""
    connect(WorkersConfig(num_workers=2))
    yield
    ray.shutdown()
