"""Gauges of what runs and sweeps do just now: Ray exports them on the metrics port of every node, for Prometheus.

Ray exports a value once after it was set, and forgets it 20 seconds later. So values are set again for as long as a run
lasts, and those of a run that has ended, or was killed, go by themselves.
"""

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Self

from ray.util.metrics import Gauge

REFRESH_SECONDS = 5.0
"""Ray exports every 10 seconds."""
# Not "job": that is Prometheus's own name for what it scrapes.
RUN_LABELS = ("job_name", "run", "trial")
"""Of the gauges of a run; of a trial, ``run`` is its sweep, of any other run ``trial`` is empty."""
SWEEP_LABELS = ("job_name", "run")
OF_RECORDS = {
    "loss": ("passreid_loss", "Mean loss of the last interval"),
    "images_per_second": ("passreid_images_per_second", "Images that all workers together train on in a second"),
    "data_wait_share": ("passreid_data_wait_share", "Share of the time that training waits for data, 0 to 1"),
    "lr": ("passreid_learning_rate", "Learning rate"),
    "refused_steps": ("passreid_refused_steps", "Steps whose loss or gradient was not finite"),
    "evaluation/mAP": ("passreid_map", "Mean average precision of the last evaluation, 0 to 1"),
    "evaluation/rank1": ("passreid_rank1", "Rank-1 of the last evaluation, 0 to 1"),
}
"""Metric in the records of a run -> (gauge, meaning)."""
STEP = "passreid_step"
PROGRESS = "passreid_progress"
TRIALS = "passreid_sweep_trials"
BEST = "passreid_sweep_best"
GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    **{name: (meaning, RUN_LABELS) for name, meaning in OF_RECORDS.values()},
    STEP: ("Steps that are done", RUN_LABELS),
    PROGRESS: ("Share of the run that is done, 0 to 1", RUN_LABELS),
    TRIALS: ("Trials of a sweep by status; those that have not reported yet are waiting", (*SWEEP_LABELS, "status")),
    BEST: ("Best value of the sweep's metric of all trials that have ended", (*SWEEP_LABELS, "metric")),
}
"""Every gauge: name -> (meaning, labels). Prometheus knows each as ``ray_<name>``."""
STATUSES = ("waiting", "running", "finished", "stopped early", "failed")


class LiveValues:
    """Values of gauges that stay readable while inside ``with``; ``labels`` are on all of them."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = dict(labels)
        self._values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._refresh, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def set(self, name: str, value: float, **more_labels: str) -> None:
        """Show ``value`` from now on."""
        labels = {**self._labels, **more_labels}
        with self._lock:
            self._values[name, frozenset(labels.items())] = value
            _gauge(name).set(value, labels)

    def _refresh(self) -> None:
        while not self._done.wait(REFRESH_SECONDS):
            with self._lock:
                for (name, labels), value in self._values.items():
                    _gauge(name).set(value, dict(labels))


class RunGauges(LiveValues):
    """The gauges of a run, or of a trial of the sweep ``run``; a ``Listener``."""

    def __init__(self, job_name: str, run: str, trial: str = "") -> None:
        super().__init__({"job_name": job_name, "run": run, "trial": trial})

    def __call__(self, step: int, end_step: int, metrics: Mapping[str, float]) -> None:
        """Show what was logged at ``step`` of ``end_step``."""
        self.set(STEP, step)
        self.set(PROGRESS, step / max(1, end_step))
        for metric, (name, _) in OF_RECORDS.items():
            if metric in metrics:
                self.set(name, metrics[metric])


class SweepGauges(LiveValues):
    """The gauges of a sweep of ``num_trials`` trials that is judged by ``metric``."""

    def __init__(self, job_name: str, run: str, metric: str, num_trials: int) -> None:
        super().__init__({"job_name": job_name, "run": run})
        self._metric = metric
        self._num_trials = num_trials

    def show(self, statuses: Iterable[str], best: float | None) -> None:
        """Show where the trials are that were given out, and the ``best`` value so far, if any."""
        found = Counter(statuses)
        found["waiting"] += self._num_trials - found.total()
        for status in STATUSES:
            self.set(TRIALS, found[status], status=status)
        if best is not None:
            self.set(BEST, best, metric=self._metric)


@cache
def _gauge(name: str) -> Gauge:
    meaning, labels = GAUGES[name]
    return Gauge(name, meaning, tag_keys=labels)
