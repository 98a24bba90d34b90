"""Whether a sweep fits the cluster: what a trial takes, how many fit at once, and a table for when none does."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from passreid_ray.engines.ray_cluster import WorkersConfig
from passreid_ray.errors import UserError

DATA_CPUS = 1
"""CPUs that each trial's data needs beside its workers: Ray Data takes them as it goes, and without one it would wait
for ever."""


@dataclass(frozen=True)
class Resources:
    """Logical CPUs and GPUs."""

    cpus: float
    gpus: float

    def holds(self, other: "Resources") -> int:
        """How many times ``other`` fits."""
        by_cpu = int(self.cpus // other.cpus)
        return min(by_cpu, int(self.gpus // other.gpus)) if other.gpus else by_cpu


def needed_by_trial(workers: WorkersConfig, found: Resources) -> tuple[Resources, Resources]:
    """What the workers of one trial take, and its data; a trial in one process is its own worker.

    A GPU for each worker where ``workers.use_gpu`` says so, or is auto and ``found`` has enough for a trial.
    """
    num = workers.world_size
    use_gpu = found.gpus >= num if workers.use_gpu == "auto" else workers.use_gpu
    return Resources(num, num if use_gpu else 0), Resources(DATA_CPUS, 0)


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
