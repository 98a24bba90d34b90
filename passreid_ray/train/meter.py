"""What a training worker measures between two records: speed, waiting for data, memory, mean loss."""

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from passreid_ray.data.execution import Watch
from passreid_ray.distributed import all_gather
from passreid_ray.train.pulse import DATA, STEP, pulse
from passreid_ray.train.worker import WorkerContext


class Meter:
    """Collects over the steps of an interval; only reading it waits for the device, and all workers must do that."""

    def __init__(self, worker: WorkerContext, batch_size: int) -> None:
        self._worker = worker
        self._batch_size = batch_size
        self._restart()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent inside counts as waiting for data."""
        start = time.perf_counter()
        with pulse.doing(DATA, then=STEP):
            yield
        self._wait_seconds += time.perf_counter() - start

    def count_step(self, loss: Tensor) -> None:
        """One more step, with its loss."""
        self._losses.append(loss)
        pulse.count_step()

    def read(self) -> dict[str, float]:
        """Metrics of the interval; begins the next one. ``loss`` is the mean of the finite losses."""
        losses = torch.stack(self._losses)
        mean_loss = losses[torch.isfinite(losses)].mean().item()  # waits for the device
        seconds = time.perf_counter() - self._start
        own = [self._wait_seconds / seconds, self._worker.peak_memory_bytes(), Watch.peak_bytes]
        # A worker that waits makes all others wait for it within their steps, where they cannot see it.
        of_all = all_gather(torch.tensor([own], dtype=torch.float64, device=losses.device))
        wait_W, memory_W, store_W = of_all.T.tolist()
        metrics = {
            "loss": mean_loss,
            "images_per_second": len(losses) * self._batch_size / seconds,
            "data_wait_share": max(wait_W),
            "peak_memory_bytes": max(memory_W),
            "data_object_store_bytes": sum(store_W),
        }
        self._restart()
        return metrics

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._wait_seconds = 0.0
        Watch.peak_bytes = 0
        self._losses: list[Tensor] = []
