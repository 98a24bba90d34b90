"""Connecting to Ray: the cluster that is there, or a quiet local one that fits this machine."""

import logging
import os
import socket
import sys
from typing import Literal

import psutil
import ray
import torch
from pydantic import Field
from ray.data import DataContext
from ray.train import ScalingConfig

from passreid_ray.config import Section
from passreid_ray.data.execution import DataShare
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
PROBE_SECONDS = 10.0
OBJECT_STORE_SHARE = 0.1
DATA_OBJECT_STORE_SHARE = 0.5
"""Share of the object store for all streams of data together."""
OBJECT_STORE_LIMITS_BYTES = (256 * 2**20, 8 * 2**30)


class WorkersConfig(Section):
    """How many processes share the work, and what each gets."""

    num_workers: int = Field(default=1, ge=0)
    """Training processes; a batch is divided among them and results do not depend on their number. 0: train in the
    process of the job itself, which starts sooner, but whose crash ends the run (the same command goes on)."""
    use_gpu: bool | Literal["auto"] = "auto"
    """One GPU per worker; auto: when the cluster has enough of them."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads that compute in each worker; none: this machine's cores divided by the workers."""
    max_failures: int = Field(default=3, ge=-1)
    """How often crashed workers are restarted from the last checkpoint; -1: without end."""

    def to_ray(self) -> ScalingConfig:
        """Ray's counterpart, once Ray runs. Raises ``UserError`` when the cluster has too few CPUs or GPUs."""
        if self.num_workers == 0:
            return self._in_this_process()
        num_gpus, num_cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
        if num_cpus <= self.num_workers:
            raise UserError(
                f"workers.num_workers: {self.num_workers} workers take a CPU each and data needs one more; the cluster "
                f"has {num_cpus}. Give fewer workers, or start its nodes with more --num-cpus"
            )
        if self.use_gpu is True and num_gpus < self.num_workers:
            raise UserError(f"workers.use_gpu: {self.num_workers} workers need a GPU each, the cluster has {num_gpus}")
        use_gpu = num_gpus >= self.num_workers if self.use_gpu == "auto" else self.use_gpu
        return ScalingConfig(
            num_workers=self.num_workers, use_gpu=use_gpu, resources_per_worker={"CPU": 1, "GPU": int(use_gpu)}
        )

    def _in_this_process(self) -> ScalingConfig:
        has_gpu = torch.cuda.is_available()
        if self.use_gpu is True and not has_gpu:
            raise UserError(
                "workers.use_gpu: true, but the process of this job, where workers.num_workers=0, has no GPU"
            )
        if self.use_gpu is False and has_gpu:
            # Ray Train takes the GPU that it finds, whatever it is told.
            raise UserError(
                "workers.use_gpu: false, but the process of this job, where workers.num_workers=0, has a GPU and would "
                "use it; set CUDA_VISIBLE_DEVICES= (nothing) to hide it"
            )
        return ScalingConfig(num_workers=0)

    @property
    def world_size(self) -> int:
        """Processes that share a batch."""
        return max(1, self.num_workers)

    def threads_per_worker(self) -> int:
        """CPU threads of one worker."""
        return self.threads or max(1, num_cores() // self.world_size)


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def connect(workers: WorkersConfig, object_store_bytes: int = 0) -> None:
    """Join the Ray cluster of ``RAY_ADDRESS`` (set by ``ray job submit``), or start a local one; idempotent.

    ``object_store_bytes``: shared memory that the job will need at least; a local cluster sets that much aside.

    Raises ``UserError`` when nothing answers at that address, or the local one does not start.

    A local cluster announces loopback addresses, keeps Ray's token authentication (Ray's own ports are open on every
    network interface, to those who have the token), sends no usage statistics, and has one logical CPU per core for
    data beside one per training worker, so that neither waits for the other for ever.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # else every worker builds an environment again
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "local")
        if address in ("", "local"):
            _start_local(workers, object_store_bytes)
        else:
            _join(address)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def data_share(num_workers: int) -> DataShare:
    """What the data stream of each of ``num_workers`` training workers may use of the cluster."""
    resources = ray.cluster_resources()
    object_store_bytes = DATA_OBJECT_STORE_SHARE * resources.get("object_store_memory", 0) / num_workers
    return DataShare(max(1.0, (resources.get("CPU", 1.0) - num_workers) / num_workers), int(object_store_bytes) or None)


def _join(address: str) -> None:
    advice = "give host:port of a running cluster (as ray start prints it), or unset RAY_ADDRESS to run on this machine"
    if "://" in address:
        raise UserError(f"RAY_ADDRESS: {address} is not the address of a cluster's head; {advice}")
    host, colon, port = address.rpartition(":")
    if address != "auto":
        if not colon or not port.isdigit():
            raise UserError(f"RAY_ADDRESS: {address!r} is no address; {advice}")
        # Ray itself would wait for minutes and then end this process.
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise UserError(f"RAY_ADDRESS: nothing answers at {address} ({error}); {advice}") from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"RAY_ADDRESS: cannot join {address}: {str(error).splitlines()[0]}; {advice}") from None


def _start_local(workers: WorkersConfig, object_store_bytes: int) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # OpenMP threads that wait by spinning take the core that the data tasks need: on two busy cores steps of a small
    # ViT took seven times as long with two spinning threads as with two sleeping ones.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    low, high = OBJECT_STORE_LIMITS_BYTES
    free = psutil.virtual_memory().available
    try:
        ray.init(
            "local",  # else a cluster that was started on this machine by hand would be joined
            num_cpus=num_cores() + workers.num_workers,
            object_store_memory=int(max(object_store_bytes, min(max(low, OBJECT_STORE_SHARE * free), high))),
            include_dashboard=True,  # Ray Train cleans up through its API
            dashboard_host=DASHBOARD_HOST,
            _node_ip_address=NODE_ADDRESS,
            log_to_driver=False,
            logging_level=logging.WARNING,
            configure_logging=True,
        )
    except Exception as error:  # bare, when its processes do not come up in time
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"Ray does not start on this machine: {reason} Its logs are in /tmp/ray/session_latest/logs; "
            "try again when the machine is less busy"
        ) from error
