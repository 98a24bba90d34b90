from types import SimpleNamespace
from typing import Any

import pytest
import ray

from passreid_ray.engines.ray_cluster import WorkersConfig
from passreid_ray.engines.row_blocks import RowBlocks
from passreid_ray.errors import UserError
from tests.engines.test_task_errors import raised_by_get


def blocks(num_rows: int) -> RowBlocks:
    return RowBlocks(num_rows, None, lambda *_: None)


def test_few_rows_are_one_block_in_this_process() -> None:
    assert blocks(5).collect("sum", lambda rows, values: sum(values[rows]), [1, 2, 3, 4, 5]) == [15]


class TasksInFlight:
    """Stands in for Ray: tasks end only when they are waited for."""

    def __init__(self, cpus: float) -> None:
        self.cpus = cpus
        self.asked: list[float] = []
        self.most = 0
        self._running: list[object] = []

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": self.cpus}

    def remote(self, *, num_cpus: float, **_: object) -> Any:
        self.asked.append(num_cpus)
        return lambda function: SimpleNamespace(remote=self._start)

    def wait(self, results: list[object], **_: object) -> tuple[list[object], list[object]]:
        assert results == self._running
        return [self._running.pop(0)], list(self._running)

    def _start(self, *_: object) -> object:
        self._running.append(object())
        self.most = max(self.most, len(self._running))
        return self._running[-1]


@pytest.mark.parametrize(
    ("workers", "cpus", "most"),
    [
        (None, 1, 20),  # of which Ray runs what fits
        (WorkersConfig(cpus_per_worker=4), 0, 4),
        (WorkersConfig(cpus_per_worker=0.5), 1, 20),
        (WorkersConfig(num_workers=(1, 2), cpus_per_worker=0.5), 0, 4),
    ],
)
def test_tasks_beside_workers_that_leave_no_cpu_ask_for_none_and_do_not_start_all_at_once(
    monkeypatch: pytest.MonkeyPatch, workers: WorkersConfig | None, cpus: int, most: int
) -> None:
    tasks, told = TasksInFlight(4), []
    monkeypatch.setattr("passreid_ray.engines.ray_cluster.ray.cluster_resources", tasks.cluster_resources)
    for name in ("remote", "wait"):
        monkeypatch.setattr(f"passreid_ray.engines.row_blocks.ray.{name}", getattr(tasks, name))
    monkeypatch.setattr(RowBlocks, "share", lambda self, value: value)
    spread = RowBlocks(100, 5, lambda phase, done, total: told.append(done), workers)
    assert len(spread.leave("sum", sum, [1.0])) == 20
    assert (tasks.asked, tasks.most) == ([cpus], most)
    assert told == list(range(0, 101, 5))


@pytest.mark.parametrize("cause", [UserError("shard: damaged"), ZeroDivisionError("bug")])
def test_a_mistake_of_the_user_in_a_task_is_one_line_and_a_bug_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, cause: Exception
) -> None:
    error = raised_by_get(cause)

    def get(reference: Any) -> Any:
        raise error

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(type(cause)) as caught:
        blocks(5).read(ray.ObjectRef(bytes(28)))
    if isinstance(cause, UserError):
        assert str(caught.value) == "shard: damaged"
    else:
        assert "remote.py" in str(caught.value)
