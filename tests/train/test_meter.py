from types import SimpleNamespace
from typing import Any, cast

import torch

from passreid_ray.data.execution import Watch
from passreid_ray.distributed import rank
from passreid_ray.train import meter as meter_module
from passreid_ray.train.meter import Meter
from passreid_ray.train.pulse import DATA, STEP, pulse
from passreid_ray.train.worker import WorkerContext
from tests.ranks import run_on_ranks


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


def read_meter(num_steps: int) -> dict[str, float]:
    """Rank 0 waits a quarter of the time and rank 1 half of it."""
    clock: Any = Clock()
    meter_module.time = clock
    worker: Any = SimpleNamespace(peak_memory_bytes=lambda: 1000 * (rank() + 1))
    meter = Meter(worker, batch_size=8)
    for loss in range(num_steps):
        with meter.waiting():
            clock.seconds += 1.0 + rank()
        clock.seconds += 3.0 - rank()
        meter.count_step(torch.tensor(float(loss)))
    Watch.peak_bytes = 10 + rank()
    return meter.read()


def test_a_worker_is_in_a_step_once_it_has_its_data_and_counts_its_steps() -> None:
    pulse.restart()
    meter = Meter(cast(WorkerContext, None), batch_size=8)
    for _ in range(3):
        with meter.waiting():
            assert pulse.phase == DATA
        assert pulse.phase == STEP
        meter.count_step(torch.tensor(0.0))
    assert pulse.steps == 3


def test_the_slowest_worker_and_the_memory_of_all_are_told_on_every_rank() -> None:
    for metrics in run_on_ranks(read_meter, 4):
        assert metrics == {
            "loss": 1.5,
            "images_per_second": 2.0,
            "data_wait_share": 0.5,
            "peak_memory_bytes": 2000.0,
            "data_object_store_bytes": 21.0,
        }
