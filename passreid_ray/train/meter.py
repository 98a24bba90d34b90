"""What a training worker measures between two records: speed, waiting for data, memory, mean loss."""

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from passreid_ray.data.execution import Watch
from passreid_ray.train.worker import WorkerContext


class Meter:
    """Collects over the steps of an interval; reading it is the only time the device is waited for."""

    def __init__(self, worker: WorkerContext, batch_size: int) -> None:
        self._worker = worker
        self._batch_size = batch_size
        self._restart()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent inside counts as waiting for data."""
        start = time.perf_counter()
        yield
        self._wait_seconds += time.perf_counter() - start

    def count_step(self, loss: Tensor) -> None:
        """One more step, with its loss."""
        self._losses.append(loss)

    def read(self) -> dict[str, float]:
        """Metrics of the interval; begins the next one. ``loss`` is the mean of the finite losses."""
        losses = torch.stack(self._losses)
        mean_loss = losses[torch.isfinite(losses)].mean().item()  # waits for the device
        seconds = time.perf_counter() - self._start
        metrics = {
            "loss": mean_loss,
            "images_per_second": len(losses) * self._batch_size / seconds,
            "data_wait_share": self._wait_seconds / seconds,
            "peak_memory_bytes": float(self._worker.peak_memory_bytes()),
            "data_object_store_bytes": float(Watch.peak_bytes),
        }
        self._restart()
        return metrics

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._wait_seconds = 0.0
        Watch.peak_bytes = 0
        self._losses: list[Tensor] = []
