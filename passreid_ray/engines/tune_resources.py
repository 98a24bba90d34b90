"""Whether a sweep fits the cluster: what a trial takes, how many fit at once, and a table for when none does."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import ray
import torch
from rich.console import Console
from rich.table import Table

from passreid_ray.config import assignments, overridden, read_preset
from passreid_ray.engines.ray_cluster import WorkersConfig, num_cores
from passreid_ray.engines.tune_config import TuneConfig
from passreid_ray.errors import UserError

DATA_CPUS = 1
"""CPUs that each trial's data needs beside its workers: Ray Data takes them as it goes, and without one it would wait
for ever."""
ROUNDING = 1e-9
"""Of a division whose result is whole."""


@dataclass(frozen=True)
class Resources:
    """Logical CPUs and GPUs."""

    cpus: float
    gpus: float

    def holds(self, other: "Resources") -> int:
        """How many times ``other`` fits."""
        by_cpu = int(self.cpus / other.cpus + ROUNDING)  # 0.6 + 1 CPUs fit 5 times into 8
        return min(by_cpu, int(self.gpus // other.gpus)) if other.gpus else by_cpu


def check_early(config: TuneConfig, presets: Path | None) -> None:
    """``check_gpus`` for a sweep, from its settings alone: the plan takes seconds, most of them to import the jobs."""
    try:
        values = read_preset(config.preset, presets).get("workers", {})
        workers = overridden(WorkersConfig, values, assignments(config.overrides.get("workers", {})))
    except (UserError, AttributeError):
        return  # no such preset or settings: the plan says so, and why
    check_gpus(workers)


def check_gpus(workers: WorkersConfig) -> None:
    """Raise ``UserError`` with a table when this machine, on which Ray will start, has too few GPUs for a trial."""
    is_local = not ray.is_initialized() and os.environ.get("RAY_ADDRESS", "local") in ("", "local")
    if is_local and workers.use_gpu is True:
        found = Resources(2 * num_cores() + math.ceil(cpus_of_trial(workers)), torch.cuda.device_count())
        trials_at_once(workers, found, 1)


def cpus_of_trial(workers: WorkersConfig) -> float:
    """Logical CPUs of the workers of one trial; a trial in one process takes one."""
    return workers.cpus or 1.0


def room_for(workers: WorkersConfig, wanted: int) -> WorkersConfig:
    """What ``connect`` is given so that a local cluster has room for ``wanted`` trials at once with their data."""
    cpus = wanted * cpus_of_trial(workers)
    # A CPU of data for each trial, beside the one per core that a local cluster has anyway.
    return WorkersConfig(num_workers=math.ceil(cpus) + max(0, wanted * DATA_CPUS - num_cores()))


def needed_by_trial(workers: WorkersConfig, found: Resources) -> tuple[Resources, Resources]:
    """What the workers of one trial take, and its data; a trial in one process is its own worker.

    A GPU for each worker where ``workers.use_gpu`` says so, or is auto and ``found`` has enough for a trial.
    """
    num = workers.world_size
    use_gpu = found.gpus >= num if workers.use_gpu == "auto" else workers.use_gpu
    return Resources(cpus_of_trial(workers), num if use_gpu else 0), Resources(DATA_CPUS, 0)


def trials_at_once(workers: WorkersConfig, found: Resources, wanted: int) -> int:
    """How many trials run at once, at most ``wanted``; ``UserError`` with a table when not even one ever could."""
    own, data = needed_by_trial(workers, found)
    fitting = found.holds(Resources(own.cpus + data.cpus, own.gpus))
    if fitting == 0:
        raise UserError(
            "a trial does not fit the cluster and would wait for ever. Lower overrides.workers.num_workers, or start "
            f"nodes with more --num-cpus or --num-gpus\n{resource_table(own, data, found)}"
        )
    return min(wanted, fitting)


def resource_table(own: Resources, data: Resources, found: Resources) -> str:
    """What a trial needs and what there is, to be printed."""
    table = Table("", "CPUs", "GPUs")
    for title, row in (
        ("workers of a trial", own),
        ("its data", data),
        ("a trial in all", Resources(own.cpus + data.cpus, own.gpus + data.gpus)),
        ("the cluster", found),
    ):
        table.add_row(title, f"{row.cpus:g}", f"{row.gpus:g}")
    console = Console(width=60, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()
