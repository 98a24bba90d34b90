"""Connecting to Ray: the cluster that is there, or a quiet local one that fits this machine."""

import logging
import math
import os
import socket
import sys
from typing import Annotated, Literal, Self

import psutil
import ray
import torch
from pydantic import Field, model_validator
from ray._private.services import canonicalize_bootstrap_address
from ray.data import DataContext
from ray.exceptions import AuthenticationError
from ray.train import ScalingConfig

from passreid_ray.config import Section
from passreid_ray.data.execution import DataShare
from passreid_ray.engines.cluster_access import (
    check_local_start,
    check_open_cluster,
    head_asks_for_token,
    ip_addresses,
)
from passreid_ray.engines.own_token import keep_token_private
from passreid_ray.engines.spill_disk import use_disk_almost_whole
from passreid_ray.engines.terminated import keeping_sigterm
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

PositiveInt = Annotated[int, Field(ge=1)]


class WorkersConfig(Section):
    """How many processes share the work, and what each gets."""

    num_workers: Annotated[int, Field(ge=0)] | tuple[PositiveInt, PositiveInt] = 1
    """Training processes; a batch is divided among them and results do not depend on their number. 0: train in the
    process of the job itself, which starts sooner, but whose crash ends the run (the same command goes on).
    [min, max]: training starts once the cluster has room for min, goes on with more, up to max, when nodes join, and
    with fewer when they leave; each does more of the batch then, in more pieces and not in more memory. A thread of
    each worker reads its images then, and no task: tasks could wait for ever for the CPU of a node that has left."""
    resize_seconds: float = Field(default=60.0, gt=0)
    """Where num_workers is a range: how often to look whether the cluster has room for more workers. Ray counts its
    nodes every 20 s, and a change costs the time in which workers start."""
    use_gpu: bool | Literal["auto"] = "auto"
    """One GPU per worker; auto: when the cluster has enough of them."""
    cpus_per_worker: float = Field(default=1.0, ge=0.0001, le=1024)
    """Logical CPUs that Ray sets aside for each worker; a fraction lets more workers than cores share a machine.
    Ray places workers by this, and does not limit their threads."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads that compute in each worker; none: this machine's cores divided by the workers, or by the most of
    them where their number is a range."""
    max_failures: int = Field(default=3, ge=-1)
    """How often crashed workers are restarted from the last checkpoint; -1: without end."""
    hang_seconds: float | None = Field(default=480.0, gt=0)
    """A worker that holds up the others for so long is named, its stack written down, and replaced as if it had
    crashed; none: wait for ever. Longer than the slowest step, wait for data or checkpoint of a healthy run. Beyond 600
    Ray Train restarts a worker that does not answer, and beyond 1800 one that others wait for, without saying where."""

    def to_ray(self) -> ScalingConfig:
        """Ray's counterpart, once Ray runs. Raises ``UserError`` when the cluster has too few CPUs or GPUs."""
        if self.num_workers == 0:
            return self._in_this_process()
        num_gpus, num_cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
        least = self.sizes[0]
        # A range grows into whatever CPUs there are, so its data does without one of its own (see spare_cpus).
        if num_cpus < least * self.cpus_per_worker + (not self.is_range):
            each = "a CPU" if self.cpus_per_worker == 1 else f"{self.cpus_per_worker:g} CPUs"
            needed = "" if self.is_range else " and data needs one more"
            raise UserError(
                f"workers.num_workers: {least} workers take {each} each{needed}; the cluster has {num_cpus}. "
                "Give fewer workers, or start its nodes with more --num-cpus"
            )
        if self.use_gpu is True and num_gpus < least:
            raise UserError(
                f"workers.use_gpu: {least} workers need a GPU each, the cluster has {num_gpus}; give fewer workers, or "
                "submit when its nodes are there"
            )
        use_gpu = num_gpus >= least if self.use_gpu == "auto" else self.use_gpu
        return ScalingConfig(
            num_workers=self.num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": self.cpus_per_worker, "GPU": int(use_gpu)},
            elastic_resize_monitor_interval_s=self.resize_seconds,
        )

    def gpu_warning(self) -> str | None:
        """A line for GPUs of the cluster that nobody uses because they are too few, once Ray runs; else None."""
        num_gpus, least = int(ray.cluster_resources().get("GPU", 0)), self.sizes[0]
        if self.use_gpu != "auto" or self.num_workers == 0 or not 0 < num_gpus < least:
            return None
        return (
            f"warning: workers.use_gpu=auto: {least} workers train on CPUs, since the cluster has {num_gpus} GPU(s); "
            f"for GPUs set workers.num_workers={num_gpus}, or submit when more nodes are there"
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

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.num_workers, tuple) and self.num_workers[0] > self.num_workers[1]:
            raise ValueError(f"num_workers: expected [min, max] with min <= max, got {list(self.num_workers)}")
        return self

    @property
    def is_range(self) -> bool:
        """Whether the number of workers follows the nodes of the cluster."""
        return isinstance(self.num_workers, tuple)

    @property
    def sizes(self) -> range:
        """How many processes may share a batch: one number, or all from the least to the most."""
        least, most = self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers,) * 2
        return range(max(1, least), max(1, most) + 1)

    @property
    def cpus(self) -> float:
        """Logical CPUs of all training processes but the job's own; where their number is a range, of the most."""
        return 0.0 if self.num_workers == 0 else self.world_size * self.cpus_per_worker

    @property
    def world_size(self) -> int:
        """Processes that share a batch; where their number is a range, the most. A worker knows how many there are."""
        return self.sizes[-1]

    @property
    def described(self) -> str:
        """How many workers, in words."""
        if isinstance(self.num_workers, tuple):
            return "{} to {} workers".format(*self.num_workers)
        return f"{self.num_workers} worker(s)"

    def threads_per_worker(self) -> int:
        """CPU threads of one worker."""
        return self.threads or max(1, num_cores() // self.world_size)


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def connect(workers: WorkersConfig, object_store_bytes: int = 0) -> None:
    """Join the Ray cluster of ``RAY_ADDRESS`` (set by ``ray job submit``), or start a local one; idempotent.

    ``object_store_bytes``: shared memory that the job will need at least; a local cluster sets that much aside.

    Raises ``UserError`` when nothing answers at that address, when the cluster there asks for no token and can be
    reached from the internet, or when the local one does not start.

    A local cluster announces loopback addresses, keeps Ray's token authentication (Ray's own ports are open on every
    network interface, to those who have the token; without it a local cluster is refused), sends no usage statistics,
    and has one logical CPU per core for data beside those of the training workers, so that neither waits for the other
    for ever.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # else every worker builds an environment again
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "local")
        with keeping_sigterm():
            if address in ("", "local"):
                _start_local(workers, object_store_bytes)
            else:
                _join(address)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def data_share(num_workers: int, cpus_per_worker: float = 1.0, *, is_range: bool = False) -> DataShare:
    """What the data stream of each of ``num_workers`` training workers may use of the cluster.

    ``is_range``: their number is a range; no CPU is counted on then, and each makes its data in a thread of its own.
    """
    resources = ray.cluster_resources()
    object_store_bytes = DATA_OBJECT_STORE_SHARE * resources.get("object_store_memory", 0) / num_workers
    cpus = max(1.0, resources.get("CPU", 1.0) / num_workers - cpus_per_worker)
    has_cpu = spare_cpus(num_workers, cpus_per_worker, is_range=is_range) > 0
    return DataShare(cpus, int(object_store_bytes) or None, has_cpu)


def spare_cpus(num_workers: int, cpus_per_worker: float = 1.0, *, is_range: bool = False) -> int:
    """What a task asks for beside ``num_workers`` training workers: 1 CPU, or 0 where they have taken all there are.

    A task that asked for a CPU would wait for ever then. ``is_range``: their number is a range, and it is 0 too: they
    take what they find, and the node with the only spare CPU may leave while tasks are waiting for it.
    """
    if is_range:
        return 0
    return int(ray.cluster_resources().get("CPU", 1.0) >= num_workers * cpus_per_worker + 1)


def _join(address: str) -> None:
    advice = "give host:port of a running cluster (as ray start prints it), or unset RAY_ADDRESS to run on this machine"
    host, port = _head_of(address, advice)
    asks_for_token = head_asks_for_token(host, port, timeout_seconds=PROBE_SECONDS)
    if not asks_for_token:
        check_open_cluster(ip_addresses(host), address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (AuthenticationError, ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"RAY_ADDRESS: cannot join {address}: {str(error).splitlines()[0]}; {advice}") from None
    if not asks_for_token:
        _check_nodes(address)


def _head_of(address: str, advice: str) -> tuple[str, int]:
    """Host and port of the head that ``address`` names, where something listens."""
    if "://" in address:
        raise UserError(f"RAY_ADDRESS: {address} is not the address of a cluster's head; {advice}")
    if address == "auto":
        try:
            address = str(canonicalize_bootstrap_address(address))
        except (ConnectionError, ValueError) as error:
            raise UserError(f"RAY_ADDRESS: cannot join auto: {str(error).splitlines()[0]}; {advice}") from None
    host, colon, port = address.rpartition(":")
    host = host.strip("[]")
    if not colon or not port.isdigit():
        raise UserError(f"RAY_ADDRESS: {address!r} is no address; {advice}")
    # Ray itself would wait for minutes and then end this process.
    try:
        socket.create_connection((host, int(port)), timeout=PROBE_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"RAY_ADDRESS: nothing answers at {address} ({error}); {advice}") from None
    return host, int(port)


def _check_nodes(address: str) -> None:
    """Say who can reach the nodes of the cluster that was joined at ``address`` and asks for no token; leave it again,
    with a ``UserError``, when anybody can."""
    try:
        warning = check_open_cluster([node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]], address)
    except UserError:
        ray.shutdown()
        raise
    if warning is not None:
        print(warning, file=sys.stderr)


def _start_local(workers: WorkersConfig, object_store_bytes: int) -> None:
    check_local_start()
    keep_token_private()
    use_disk_almost_whole()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # OpenMP threads that wait by spinning take the core that the data tasks need: on two busy cores steps of a small
    # ViT took seven times as long with two spinning threads as with two sleeping ones.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    low, high = OBJECT_STORE_LIMITS_BYTES
    free = psutil.virtual_memory().available
    try:
        ray.init(
            "local",  # else a cluster that was started on this machine by hand would be joined
            num_cpus=num_cores() + math.ceil(workers.cpus),
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
