"""Functions of row blocks, spread over Ray: restarted when a process dies, put together again in order."""

from collections.abc import Callable, Sequence
from typing import Any

import ray
import torch

from passreid_ray import distributed
from passreid_ray.engines.progress import PhaseProgress
from passreid_ray.engines.ray_cluster import WorkersConfig, spare_cpus
from passreid_ray.engines.task_errors import telling_people
from passreid_ray.train.pulse import pulse

IN_PROCESS_ROWS = 8192
"""Up to here the work is done before a Ray task would have started."""
BLOCK_ROWS = (1024, 16384)
BLOCKS_PER_CPU = 4
MAX_TASK_RETRIES = 10


class RowBlocks:
    """Runs a function on row blocks: as Ray tasks, or in this process when there are few rows."""

    def __init__(
        self,
        num_rows: int,
        block_rows: int | None,
        progress: PhaseProgress,
        workers: WorkersConfig | None = None,
    ) -> None:
        """``workers``: the training workers beside whom this runs, if any."""
        self.num_rows = num_rows
        self.progress = progress
        self._workers = workers or WorkersConfig()
        self._is_local = block_rows is None and num_rows <= IN_PROCESS_ROWS
        if block_rows is None:
            cpus = 1 if self._is_local else ray.cluster_resources().get("CPU", 1)
            low, high = BLOCK_ROWS
            block_rows = num_rows if self._is_local else int(min(max(low, num_rows / (BLOCKS_PER_CPU * cpus)), high))
        self.blocks = [slice(a, min(a + block_rows, num_rows)) for a in range(0, num_rows, block_rows)]

    def share(self, value: Any) -> Any:
        """``value`` where every task can read it. Raises ``UserError`` when there is no room for it."""
        with telling_people():
            return value if self._is_local else ray.put(value)

    def read(self, shared: Any) -> Any:
        """What was shared, or the result of a task.

        Raises ``UserError`` where the task raised one or its process died, and else what ``ray.get`` raises.
        """
        if not isinstance(shared, ray.ObjectRef):
            return shared
        with telling_people():
            value = ray.get(shared)
        pulse.get_on()
        return value

    def collect(self, phase: str, function: Callable[..., Any], *shared: Any) -> list[Any]:
        """``function(rows, *shared)`` of every block, in order. Raises as ``read`` does."""
        return [self.read(result) for result in self.leave(phase, function, *shared)]

    def leave(self, phase: str, function: Callable[..., Any], *shared: Any) -> list[Any]:
        """Like ``collect``, but results stay with Ray."""
        self.progress(phase, 0, self.num_rows)
        places = [value if isinstance(value, ray.ObjectRef) else self.share(value) for value in shared]
        calls = [(rows, *places) for rows in self.blocks]
        results = self._run(function, calls, lambda done: self.progress(phase, done, self.num_rows))
        if self._is_local:
            self.progress(phase, self.num_rows, self.num_rows)
        return results

    def follow(self, function: Callable[..., Any], results: Sequence[Any], *shared: Any) -> list[Any]:
        """``function(rows, result, *shared)`` of every block's earlier result, in order."""
        found = self._run(
            function, [(rows, result, *shared) for rows, result in zip(self.blocks, results, strict=True)]
        )
        return [self.read(result) for result in found]

    def _run(
        self,
        function: Callable[..., Any],
        calls: list[tuple[Any, ...]],
        tell: Callable[[int], None] = lambda done: None,
    ) -> list[Any]:
        """Results of all ``calls``, which begin with their rows; ``tell`` hears how many rows are done."""
        if self._is_local:
            return [function(*call) for call in calls]
        workers = self._workers
        cpus = spare_cpus(distributed.world_size(), workers.cpus_per_worker, is_range=workers.is_range)
        # Tasks that ask for no CPU would all start at once, and on one node.
        at_once = len(calls) if cpus else max(1, int(ray.cluster_resources().get("CPU", 1)))
        task = ray.remote(
            num_cpus=cpus, max_retries=MAX_TASK_RETRIES, scheduling_strategy="DEFAULT" if cpus else "SPREAD"
        )(_single_threaded(function))
        results: list[ray.ObjectRef] = []
        running: dict[ray.ObjectRef, int] = {}
        done = 0
        while len(results) < len(calls) or running:
            while len(results) < len(calls) and len(running) < at_once:
                rows, *_ = call = calls[len(results)]
                results.append(task.remote(*call))
                running[results[-1]] = rows.stop - rows.start
            ready, _ = ray.wait(list(running), num_returns=1, fetch_local=False)
            done += sum(running.pop(result) for result in ready)
            tell(done)
            pulse.get_on()
        return results


def _single_threaded(function: Callable[..., Any]) -> Callable[..., Any]:
    def block_task(*arguments: Any) -> Any:
        torch.set_num_threads(1)  # there is a task for every core
        return function(*arguments)

    block_task.__name__ = getattr(function, "__name__", "block").strip("_")  # what ps and the dashboard show
    return block_task
