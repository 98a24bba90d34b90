"""A trial: an ordinary run of the job, that tells Ray Tune what it logs and stops when Tune says so.

The run lives in a thread. At a record that has the sweep's metric the reading of its board waits for Tune, which may
stop the run there; its workers train on meanwhile, and stop when they next log.
"""

import os
import queue
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from rich.console import Console

from passreid_ray.engines.fit import TrainingFailed
from passreid_ray.engines.live_metrics import RunGauges
from passreid_ray.engines.tune_fitness import score_without_labels
from passreid_ray.engines.tune_jobs import JobConfig
from passreid_ray.engines.tune_plan import SweepPlan
from passreid_ray.errors import UserError
from passreid_ray.train.run_log import read_jsonl
from passreid_ray.train.state_files import checkpoint_name

STOP_SECONDS = 600.0
"""How long a run that is told to stop may take: a worker looks whenever it logs."""
CHECKPOINT_SECONDS = 20.0
"""How long the checkpoint of a step that was just reported may take to appear."""
WAIT_SECONDS = 1.0
STOPPED = "stopped by the sweep"
TIME = "sweep_time"
"""Report key: how much of the run is done, of ``UNITS``: what schedulers count in, whatever the length of a run."""
UNITS = 100.0


@dataclass(frozen=True)
class Report:
    """A step at which the sweep's metric was measured."""

    step: int
    progress: float
    """Share of the run that is done."""
    metrics: dict[str, float]
    """The last value of each until then."""


@dataclass(frozen=True)
class End:
    """The run is over."""

    step: int
    metrics: dict[str, float]
    """The last value of each; none after an error."""
    error: BaseException | None


class RunThread:
    """A run of the job in a thread, as something that can be asked for its next report."""

    def __init__(self, plan: SweepPlan, config: JobConfig) -> None:
        self._plan = plan
        self._config = config
        self._last: dict[str, float] = {}
        self._gauges = RunGauges(plan.config.job, plan.config.run.name, config.run.name)
        self._events: queue.Queue[Report | End] = queue.Queue()
        self._goes_on = threading.Event()
        self._stops = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def next(self) -> Report | End:
        """The next report with the metric of the sweep, or the end; lets the run go on until there."""
        self._goes_on.set()
        return self._events.get()

    @property
    def is_alive(self) -> bool:
        """Whether it is still under way."""
        return self._thread.is_alive()

    def stop(self) -> bool:
        """End the run at its next record; whether it ended in time."""
        self._stops.set()
        self._goes_on.set()
        self._thread.join(STOP_SECONDS)
        return not self._thread.is_alive()

    def _hear(self, step: int, end_step: int, metrics: Mapping[str, float]) -> str | None:
        self._gauges(step, end_step, metrics)
        self._last |= metrics  # a second metric may come in records of its own
        # Not at the last step: a run that is stopped there would lose its last checkpoint, and the end tells all.
        if self._plan.config.metric in metrics and step < end_step and not self._stops.is_set():
            self._goes_on.clear()
            self._events.put(Report(step, step / end_step, dict(self._last)))
            while not self._goes_on.wait(WAIT_SECONDS) and not self._stops.is_set():
                pass
        return STOPPED if self._stops.is_set() else None

    def _run(self) -> None:
        folder, scores = self._config.run.folder, {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "console.log").open("a", encoding="utf-8") as file, self._gauges:
                console = Console(file=file, width=120, highlight=False, soft_wrap=True)
                self._plan.job.run(self._config, console, self._hear)
                if self._plan.config.scores_without_labels:
                    scores = score_without_labels(self._config, self._plan.config.label_free, self._plan.config.seed)
            step, metrics = last_values(folder)
            end = End(step, {**metrics, **scores}, None)
        except BaseException as error:  # noqa: BLE001 whatever ended it is the end of this trial, not of the sweep
            end = End(0, {}, error)
        self._events.put(end)


class TrialRun(tune.Trainable):
    """What Tune runs: config has the trial's ``number`` and its ``settings``."""

    def setup(
        self, config: dict[str, Any], plan: SweepPlan | None = None, use_gpu: bool = False, cwd: str = ""
    ) -> None:
        """Nothing starts before the first step: there may be a checkpoint to copy first."""
        assert plan is not None
        self._plan, self._use_gpu = plan, use_gpu
        self._start_time = time.monotonic()
        if Path(cwd).is_dir():
            os.chdir(cwd)  # where a relative path means what the user meant
        self._become(config)

    def _become(self, config: dict[str, Any]) -> None:
        self._config = self._plan.trial_config(config["number"], config["settings"], use_gpu=self._use_gpu)
        self._run_thread: RunThread | None = None
        self._step = 0
        self._attempt = time.time_ns()
        self._start_time = time.monotonic()

    def __repr__(self) -> str:
        """What Ray's dashboard calls this process, once and for all: with workers of its own it has only one trial."""
        sweep, has_workers = self._plan.config.run.name, self._config.workers.num_workers != 0
        return f"{self._config.run.name} of {sweep}" if has_workers else f"trials of {sweep}"

    def step(self) -> dict[str, Any]:
        """The next report of the run; ``finished`` or ``failure`` with the last."""
        if self._run_thread is None:
            self._run_thread = RunThread(self._plan, self._config)
        event = self._run_thread.next()
        clock = {"seconds": time.monotonic() - self._start_time, "attempt": self._attempt}
        match event:
            case Report(step=step, progress=progress, metrics=metrics):
                self._step = step
                known = {"step": step, **clock, TIME: UNITS * progress, "metrics": metrics}
                return {**known, **self._judged(metrics)}
            case End(metrics=metrics, error=None):
                known = self._judged(metrics)
                if missing := [name for name in self._plan.config.metrics if name not in known]:
                    return {"done": True, "failure": f"never reported {', '.join(missing)}"}
                end = {"step": event.step, **clock, TIME: UNITS, "metrics": metrics}
                return {"done": True, "finished": True, **end, **known}
            case End(error=TrainingFailed() as error):
                raise error
            case End(error=UserError() as error):
                return {"done": True, "failure": str(error)}  # another attempt would end the same
            case End(error=error):
                assert error is not None
                raise error

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial, in the same process; raises ``RuntimeError`` when the old one does not end."""
        if self._run_thread is not None and not self._run_thread.stop():
            # Not False: Ray would count the new trial as failed and tell neither the searcher nor the callback.
            raise RuntimeError(
                f"{self._config.run.name}, which ran here before, was told to stop and goes on after {STOP_SECONDS:g} s"
            )
        self._become(new_config)
        return True

    def cleanup(self) -> None:
        """End the run."""
        # Workers of their own would be started again before they end; they end with this process, which owns them.
        if self._run_thread is not None and self._run_thread.is_alive and self._config.workers.num_workers == 0:
            self._run_thread.stop()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Copy the newest checkpoint of the run, that of the reported step if it comes in time."""
        store, deadline = self._config.run.checkpoints, time.monotonic() + CHECKPOINT_SECONDS
        while max(store.names(), default="") < checkpoint_name(self._step) and time.monotonic() < deadline:
            time.sleep(0.1)
        if names := store.names():
            store.read(names[-1], lambda folder: _copy(folder, Path(checkpoint_dir) / names[-1]))

    def load_checkpoint(self, checkpoint: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Put a checkpoint, of this trial or of a better one, in the place of the run's own."""
        store = self._config.run.checkpoints
        filesystem, _ = store.location()
        for name in store.names():
            filesystem.delete_dir(store.location(name)[1])
        for folder in sorted(Path(checkpoint).glob("step_*")):
            step = int(folder.name.partition("_")[2])
            store.write(step, lambda to, source=folder: _copy(source, to))

    def _judged(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {name: metrics[name] for name in self._plan.config.metrics if name in metrics}


def last_values(folder: Path) -> tuple[int, dict[str, float]]:
    """(last step, last value of each metric) in the records of a run."""
    found: dict[str, float] = {}
    for record in read_jsonl(folder / "metrics.jsonl"):
        found |= record
    step = int(found.pop("step", 0))
    found.pop("nodes", None)  # where workers were: no metric
    return step, {name: float(value) for name, value in found.items()}


def _copy(source: Path, to: Path) -> None:
    shutil.copytree(source, to, dirs_exist_ok=True)
