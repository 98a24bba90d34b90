"""Connecting to Ray: the cluster that is there, or a quiet local one that fits this machine."""

import logging
import os
import sys
from typing import Literal

import psutil
import ray
from pydantic import Field
from ray.data import DataContext
from ray.train import ScalingConfig

from passreid_ray.config import Section
from passreid_ray.errors import UserError

DASHBOARD_HOST = "127.0.0.1"
NODE_ADDRESS = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
"""Loopback too; Ray replaces 127.0.0.1 by the machine's own network address."""
CHATTY = (
    "ray._private.authentication.authentication_token_setup",
    "ray.data._internal.progress",
    "ray.data._internal.execution.streaming_executor",
)
"""Loggers that warn about what is meant to be so."""
OBJECT_STORE_SHARE = 0.1
OBJECT_STORE_LIMITS_BYTES = (256 * 2**20, 8 * 2**30)


class WorkersConfig(Section):
    """How many processes share the work, and what each gets."""

    num_workers: int = Field(default=1, ge=1)
    """Training processes; a batch is divided among them and results do not depend on their number."""
    use_gpu: bool | Literal["auto"] = "auto"
    """One GPU per worker; auto: when the cluster has enough of them."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads that compute in each worker; none: this machine's cores divided by the workers."""
    max_failures: int = Field(default=3, ge=-1)
    """How often crashed workers are restarted from the last checkpoint; -1: without end."""

    def to_ray(self) -> ScalingConfig:
        """Ray's counterpart, once Ray runs. Raises ``UserError`` when the cluster has too few GPUs."""
        num_gpus = int(ray.cluster_resources().get("GPU", 0))
        if self.use_gpu is True and num_gpus < self.num_workers:
            raise UserError(f"workers.use_gpu: {self.num_workers} workers need a GPU each, the cluster has {num_gpus}")
        use_gpu = num_gpus >= self.num_workers if self.use_gpu == "auto" else self.use_gpu
        return ScalingConfig(
            num_workers=self.num_workers, use_gpu=use_gpu, resources_per_worker={"CPU": 1, "GPU": int(use_gpu)}
        )

    def threads_per_worker(self) -> int:
        """CPU threads of one worker."""
        return self.threads or max(1, num_cores() // self.num_workers)


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def connect(workers: WorkersConfig) -> None:
    """Join the Ray cluster of ``RAY_ADDRESS`` (set by ``ray job submit``), or start a local one; idempotent.

    A local cluster is given loopback addresses, keeps Ray's token authentication, sends no usage statistics, and has
    one logical CPU per core for data beside one per training worker, so that neither waits for the other for ever.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # else every worker builds an environment again
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not ray.is_initialized():
        if os.environ.get("RAY_ADDRESS"):
            ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING)
        else:
            _start_local(workers)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def data_cpus(num_workers: int) -> float:
    """Logical CPUs that the data stream of each of ``num_workers`` training workers may use."""
    return max(1.0, (ray.cluster_resources().get("CPU", 1.0) - num_workers) / num_workers)


def _start_local(workers: WorkersConfig) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    low, high = OBJECT_STORE_LIMITS_BYTES
    free = psutil.virtual_memory().available
    ray.init(
        num_cpus=num_cores() + workers.num_workers,
        object_store_memory=int(min(max(low, OBJECT_STORE_SHARE * free), high)),
        include_dashboard=True,  # Ray Train cleans up through its API
        dashboard_host=DASHBOARD_HOST,
        _node_ip_address=NODE_ADDRESS,
        log_to_driver=False,
        logging_level=logging.WARNING,
        configure_logging=True,
    )
