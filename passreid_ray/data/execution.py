"""Ray Data executions that turn the items of a plan into batches, in order, at a bounded cost."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import ray
from ray.data import TaskPoolStrategy
from ray.data._internal.execution.execution_callback import ExecutionCallback

SCHEDULING_PAUSE_SECONDS = 0.01
BLOCK_BYTES = 4 * 2**20
"""Ray Data hands on what a task has made once it has this size: small, so that the first batch does not wait."""


@dataclass(frozen=True)
class DataShare:
    """What the data of one training worker may use of the cluster."""

    cpus: float
    object_store_bytes: int | None = None
    """Shared memory for what is made but not yet read; none: as Ray Data decides."""
    has_cpu: bool = True
    """Whether a CPU is sure to be left for tasks: where training has taken all of them, or takes more as nodes come and
    go, tasks would wait for ever."""


class Watch(ExecutionCallback):
    """Lets go of the core between the scheduling steps of an execution, and notes the shared memory that it uses.

    While an execution is ahead of its reader, Ray Data's loop runs without waiting for anything: on a small machine it
    took twice the CPU time of the training that it was feeding, in the same process.
    """

    peak_bytes: ClassVar[int] = 0
    """Most object-store memory that this process's executions used since it was last set to 0."""

    def on_execution_step(self, executor: Any) -> None:
        used = executor._resource_manager.get_global_usage().object_store_memory
        Watch.peak_bytes = max(Watch.peak_bytes, int(used))
        time.sleep(SCHEDULING_PAUSE_SECONDS)


def execute(
    make: Callable[[Any], Any],
    items: Sequence[Any],
    share: DataShare,
    *,
    batch_size: int,
    batch_format: str,
    max_tasks: int | None = None,
) -> Iterator[Any]:
    """Batches of ``batch_size`` rows, in order, of what ``make`` gives or yields for each of ``items``.

    Every item is a task on one CPU, ``max_tasks`` of them at a time. ``batch_format``: "numpy" or "pyarrow". Where no
    CPU is left for tasks, a thread of this process does their work; ``make`` must give whole batches then.
    """
    if not share.has_cpu:
        yield from _made_here(make, items)
        return

    def make_item(batch: Any) -> Any:
        return make(items[int(batch["id"][0])])

    plan = ray.data.range(len(items), override_num_blocks=len(items))
    tasks = TaskPoolStrategy(max_tasks)
    made = plan.map_batches(make_item, batch_size=1, num_cpus=1, zero_copy_batch=True, compute=tasks)
    made.context.custom_execution_callback_classes = [Watch]
    made.context.target_max_block_size = BLOCK_BYTES
    options = made.context.execution_options
    options.preserve_order = True
    # Without a limit every worker's stream believes that it owns all of the cluster.
    options.resource_limits = options.resource_limits.copy(
        cpu=max(1.0, share.cpus), object_store_memory=share.object_store_bytes
    )
    yield from made.iter_batches(batch_size=batch_size, batch_format=batch_format, prefetch_batches=2)


def _made_here(make: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    from passreid_ray.data.read_ahead import made_ahead  # which needs the streams, and they need this

    def batches_of(item: Any) -> list[Any]:
        made = make(item)
        return list(made) if isinstance(made, Iterator) else [made]

    for batches in made_ahead(batches_of, items):
        yield from batches
