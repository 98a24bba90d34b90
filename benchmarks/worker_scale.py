"""What a growing number of workers costs on one machine: start-up, reports, the driver's memory, processor time.

Each number of workers gets a fresh process, a fresh local Ray and the real pre-training engine: 50 steps of a toy model
with one global batch for all, a checkpoint every 10 steps. A worker takes a fraction of a logical CPU and one thread.
Run from the repository: ``python -m benchmarks.worker_scale 2 4 8 16``; one size at a time adds to the kept result.
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import ray
import torch

from benchmarks.compare import RESULTS, Row, write_result
from benchmarks.machine import describe_machine
from benchmarks.measure import in_own_process
from benchmarks.render import table_of
from benchmarks.worker_marks import MarkedWorker, Marks, read_marks
from passreid_ray.config import build
from passreid_ray.engines import pretrain
from passreid_ray.engines.pretrain import PretrainConfig
from passreid_ray.engines.ray_cluster import connect

NAME = "worker_scale"
STEPS = 50
STEPS_PER_EPOCH = 10
BATCH_SIZE = 48
"""Shared by 2, 4, 8 and 16 workers without a rest."""
CPUS_FOR_WORKERS = 2
"""Logical CPUs of all workers together."""
SAMPLE_SECONDS = 1.0
CONTROLLER = "TrainController"
LEFTOVER_SECONDS = 10.0
"""How long processes may take to end after Ray was told to."""
READING = (
    "Start: from the call that starts training to the end of the first step, which every worker must take part in; it "
    "is group (all workers call the training function) and first step. Report: `ray.train.report` with a checkpoint on "
    "rank 0, which calls it last. Ask: asking the board whether to stop, which all workers do at each step here. Stop: "
    "from the last worker's end to the return of the call. Driver: most resident memory, and what of it came after Ray "
    "had started; controller: the same of Ray Train's own process, which polls the workers. All: of all processes of "
    "the run, Ray's included, each shared page counted once. CPU: of the same processes, sampled each second. Left: "
    "processes that were there 10 s after Ray was shut down. Load before: the machine's load average when the run "
    "began, so what others did."
)


@dataclass(frozen=True)
class Run:
    """Of one training run, as its driver saw it; times in seconds since 1970."""

    num_workers: int
    load_before: float
    """Processes that wanted a core in the minute before, on average."""
    fit_start: float
    fit_end: float
    driver_bytes: int
    """Highest resident memory of the driver."""
    driver_bytes_before: int
    """The same when Ray had started and training had not."""
    controller_bytes: int
    """Highest resident memory of Ray Train's controller."""
    cpu_seconds: float
    memory_bytes: int
    """Highest memory of all processes together, shared pages counted once."""
    num_left: int


def toy_config(output: Path, num_workers: int) -> PretrainConfig:
    """Pre-training of the smallest PASS model on as many synthetic people as make ``STEPS_PER_EPOCH`` steps."""
    return build(
        PretrainConfig,
        {
            "run": {"output": str(output), "name": f"workers{num_workers}"},
            "epochs": STEPS // STEPS_PER_EPOCH,
            "batch_size": BATCH_SIZE,
            "log_every_steps": 1,
            "data": {
                "kind": "synthetic",
                "num_people": 2 * STEPS_PER_EPOCH * BATCH_SIZE // 12,  # half of them are in the training split
                "images_per_person": 12,
                "splits": ["train"],
            },
            "views": {"global_size_px": (64, 32), "local_size_px": (32, 16), "local_views_per_part": 1},
            "model": {"trunk": "vit_tiny_patch16_224", "embed_dim": 24, "depth": 2, "num_heads": 2},
            "head": {"num_prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 16},
            "optimizer": {"warmup_epochs": 1, "lr": 0.01},
            "workers": {
                "num_workers": num_workers,
                "cpus_per_worker": CPUS_FOR_WORKERS / num_workers,
                "threads": 1,
                "use_gpu": False,
                "max_failures": 0,
            },
        },
    )


def measured_row(num_workers: int) -> Row:
    """One run and what it cost; ``RuntimeError`` when some worker did not take every step."""
    with tempfile.TemporaryDirectory() as folder:
        run = train(toy_config(Path(folder), num_workers), Path(folder))
        marks = read_marks(Path(folder))
    if [len(each.steps) for each in marks] != [STEPS] * num_workers:
        raise RuntimeError(f"steps of the workers: {[len(each.steps) for each in marks]}")
    return row_of(run, marks)


def train(config: PretrainConfig, folder: Path) -> Run:
    """Train as ``config`` says in this process, which must be new; workers leave their marks in ``folder``."""
    load_before, _, _ = os.getloadavg()
    connect(config.workers)
    before = peak_bytes()
    fit_span: list[float] = []
    fit = pretrain.fit_and_watch

    def timed_fit(*args: Any, **kwargs: Any) -> None:
        fit_span.append(time.time())
        fit(*args, **kwargs)
        fit_span.append(time.time())

    with (
        Sampler() as sampler,
        patch.object(pretrain, "train_worker", MarkedWorker(folder)),
        patch.object(pretrain, "fit_and_watch", timed_fit),
    ):
        pretrain.run(config)
    started = psutil.Process().children(recursive=True)
    after = peak_bytes()
    ray.shutdown()
    _, left = psutil.wait_procs(started, timeout=LEFTOVER_SECONDS)
    for process in left:
        print(f"left over: {process.pid} {process.name()}")
    return Run(
        num_workers=config.workers.world_size,
        load_before=load_before,
        fit_start=fit_span[0],
        fit_end=fit_span[1],
        driver_bytes=after,
        driver_bytes_before=before,
        controller_bytes=sampler.controller_bytes,
        cpu_seconds=sampler.cpu_seconds,
        memory_bytes=sampler.memory_bytes,
        num_left=len(left),
    )


def row_of(run: Run, marks: Sequence[Marks]) -> Row:
    """The figures of a run; ``marks`` of all its workers, by rank."""
    group_up = max(each.work.start for each in marks)
    first_step = max(each.steps[0].end for each in marks)
    last_step = max(each.steps[-1].end for each in marks)
    reports = [report.seconds for report in marks[0].reports]
    return {
        "workers": run.num_workers,
        "start s": first_step - run.fit_start,
        "group s": group_up - run.fit_start,
        "first step s": first_step - group_up,
        "s per step": (last_step - first_step) / (len(marks[0].steps) - 1),
        "report s": statistics.median(reports),
        "report s, highest": max(reports),
        "ask s": statistics.median(ask.seconds for each in marks for ask in each.asks),
        "stop s": run.fit_end - max(each.work.end for each in marks),
        "driver GB": run.driver_bytes / 1e9,
        "driver GB, of the run": (run.driver_bytes - run.driver_bytes_before) / 1e9,
        "controller GB": run.controller_bytes / 1e9,
        "all GB": run.memory_bytes / 1e9,
        "CPU s": run.cpu_seconds,
        "left": run.num_left,
        "load before": run.load_before,
    }


@dataclass(frozen=True)
class Line:
    """``a + b W``, fitted by least squares."""

    a: float
    b: float

    @classmethod
    def through(cls, workers: Sequence[float], values: Sequence[float]) -> "Line":
        """The line of least squares through at least two different numbers of workers."""
        b, a = statistics.linear_regression(workers, values)
        return cls(a, b)

    def at(self, workers: float) -> float:
        """Its value for ``workers``: what would be if the growth went on as it was, and on the same cores."""
        return self.a + self.b * workers


def growth(rows: Sequence[Mapping[str, Any]], column: str) -> Line:
    """How ``column`` grows with the number of workers, over the rows that have it."""
    having = [row for row in rows if row.get(column) is not None]
    return Line.through([float(row["workers"]) for row in having], [float(row[column]) for row in having])


class Sampler:
    """Processor time and memory of all that this process has started, while it lasts, its own among them."""

    def __init__(self) -> None:
        self._cpu_seconds: dict[tuple[int, float], float] = {}
        self.memory_bytes = self.controller_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Sampler":
        self._before = self._sample()
        self._cpu_seconds.clear()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()
        self._sample()

    @property
    def cpu_seconds(self) -> float:
        """Since it was entered; of a process that ended, up to its last sample."""
        return sum(seconds - self._before.get(process, 0.0) for process, seconds in self._cpu_seconds.items())

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> dict[tuple[int, float], float]:
        memory = 0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            with suppress(psutil.Error, OSError):
                times = process.cpu_times()
                self._cpu_seconds[process.pid, process.create_time()] = times.user + times.system
                memory += proportional_bytes(process.pid)
                if CONTROLLER in " ".join(process.cmdline()[:1]):
                    self.controller_bytes = max(self.controller_bytes, process.memory_info().rss)
        self.memory_bytes = max(self.memory_bytes, memory)
        return dict(self._cpu_seconds)


def proportional_bytes(pid: int) -> int:
    """Memory of a process, each shared page divided by those who share it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


def peak_bytes() -> int:
    """Highest resident memory of this process so far."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def merged(kept: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """``kept`` rows with those of the same number of workers replaced, by number of workers."""
    rows = {row["workers"]: row for row in [*kept, *new]}
    return [rows[workers] for workers in sorted(rows, key=lambda each: float(each or 0))]


def kept_rows(folder: Path = RESULTS) -> list[Row]:
    """Rows of the result that is kept, if any."""
    path = folder / f"{NAME}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def main() -> None:
    """Measure the given sizes, keep the figures, print them and how those that grow would go on."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workers", type=int, nargs="*", default=[2, 4, 8, 16], help="numbers of workers")
    rows: list[Row] = []
    for num_workers in parser.parse_args().workers:
        rows = merged(kept_rows(), [in_own_process(measured_row, num_workers)])
        settings = {"steps": STEPS, "batch": BATCH_SIZE, "CPUs for workers": CPUS_FOR_WORKERS, "threads": 1}
        write_result(NAME, describe_machine(torch.device("cpu")), settings, rows, reading=READING)
        print(table_of(rows), flush=True)
    for column in ("start s", "ask s", "all GB", "CPU s"):
        if sum(row.get(column) is not None for row in rows) > 1:
            line = growth(rows, column)
            print(f"{column}: {line.a:.3g} + {line.b:.3g} W; 64: {line.at(64):.3g}, 512: {line.at(512):.3g}")


if __name__ == "__main__":
    main()
