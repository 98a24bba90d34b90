"""Parallel pre-training on this machine: how two workers scale, and what Ray Train costs the process that trains.

Scaling: one worker, two that do not talk to each other, and two of one run (DDP over gloo) take the same steps in
turns, one thread each. Ray Train: the same steps in a worker of a real Ray Train run and in a plain process, in turns;
then a whole job with its data. Workers live through all turns, so that starting them is not timed.
Run from the repository: ``python -m benchmarks.parallel_step``; ``--help`` lists the settings.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, TypeVar, cast, get_args
from unittest.mock import patch

import psutil
import ray
import torch
import torch.distributed as dist

from benchmarks.compare import Row, Spread, Timing, alternate, write_result
from benchmarks.machine import describe_machine
from benchmarks.pass_step import Setting
from benchmarks.render import table_of
from passreid_ray.data import SyntheticSource
from passreid_ray.data.order import EpochOrder
from passreid_ray.distributed import is_sharded
from passreid_ray.engines import pretrain
from passreid_ray.engines.board import Board
from passreid_ray.engines.fit import fit
from passreid_ray.engines.pretrain import PretrainConfig, build_state
from passreid_ray.engines.ray_cluster import WorkersConfig, connect
from passreid_ray.engines.run_folder import RunConfig
from passreid_ray.train.checkpoints import CheckpointStore
from passreid_ray.train.pass_state import PassState
from passreid_ray.train.pass_step import StepSettings, train_step
from passreid_ray.train.sharing import SharingConfig, Strategy, average_gradients, check_sharing
from passreid_ray.train.worker import WorkerContext

THREADS = 1
WARM_UP_STEPS = 2
"""DDP sorts gradients into other buckets at its second step, and AdamW makes its moments in the first."""
KEPT = (
    "batch",
    "trunk",
    "prototypes",
    "drop_path",
    "precision",
    "strategy",
    "bucket_mb",
    "compress_gradients",
    "repeats",
    "steps",
)
JOIN_SECONDS = 30.0
MARKS_FILE = "marks.json"
ONE, APART, TOGETHER = "one worker", "two that do not talk", "two of one run"
SENDING = "all-reduce alone"
PLAIN, RAY_TRAIN, JOB = "plain process", "Ray Train", "whole job with its data"
SCALING_READING = (
    "Optimiser steps in processes of one thread, in turns; batch is that of each worker; medians over the turns. Of "
    "twice one worker: images/s over twice those of one worker alone, repeat by repeat, with the lowest and highest. "
    "Two that do not talk show what shared memory and caches cost; s more than apart is what talking adds to a step. "
    "The last row sends as many numbers as a step has gradients, with nothing else going on. CPU s: of one process."
)
RAY_READING = (
    "CPU seconds of a step in the process that trains, all its threads; one thread computes. The first two take the "
    "same steps on one fixed batch in turns; CPU against plain: repeat by repeat, with the lowest and highest. The job "
    "comes after them and also decodes images and makes views in that process. Other processes: CPU seconds during a "
    "step of all that Ray runs beside it (raylet, GCS, dashboard, controller, idle workers); for the job, a step's "
    "share of what those that outlive it used from its beginning to its end, the start of some of them included."
)

Answer = TypeVar("Answer")


def new_training(setting: Setting, worker: WorkerContext) -> "Training":
    """What a pre-training job has before its loop: the state of ``worker``, shared as the job's settings say."""
    config = setting.config
    order = EpochOrder(10 * config.batch_size, config.batch_size, config.seed)
    state, settings = build_state(config, order, worker)
    state.forward = average_gradients(state.forward, config.sharing)
    return Training(setting, state, settings)


class Training:
    """What a worker keeps from turn to turn: a state and one batch."""

    def __init__(self, setting: Setting, state: PassState, settings: StepSettings) -> None:
        self.state = state
        self._settings = settings
        self._views, self._rates = setting.views(), setting.rates()

    def step(self) -> float:
        """Take a step; its loss.

        Raises:
            AssertionError: loss or gradient was not finite. Such a step leaves work out, so its time means nothing.
        """
        loss = float(train_step(self.state, self._views, self._rates, self._settings)["loss"])
        assert self.state.refused_steps == 0, "a step was refused: loss or gradient was not finite"
        return loss


Task = Callable[[Training], Answer]


@dataclass(frozen=True)
class Turn:
    """What a worker tells of its steps."""

    steps: list[Timing]
    loss: float
    """Of the last step."""

    @property
    def cpu_seconds(self) -> float:
        """Mean of a step."""
        return statistics.fmean(step.cpu_seconds for step in self.steps)


def take_steps(training: Training, num: int) -> Turn:
    """Task: ``num`` steps, each timed."""
    steps, loss = [], 0.0
    for _ in range(num):
        cpu, wall = time.process_time(), time.perf_counter()
        loss = training.step()
        steps.append(Timing(time.perf_counter() - wall, time.process_time() - cpu))
    return Turn(steps, loss)


def gradient_bytes(training: Training, compress: bool) -> int:
    """Task: bytes of the gradients that are averaged over workers; those of sharded weights are not."""
    parameters = [own for own in training.state.student.parameters() if own.requires_grad and not is_sharded(own)]
    return sum(own.numel() for own in parameters) * (2 if compress else 4)


def all_reduce_alone(training: Training, sharing: SharingConfig) -> Timing:
    """Task of workers of one run: all-reduce as much as there is of gradients, in buckets, without a step."""
    dtype = torch.bfloat16 if sharing.compress_gradients else torch.float32
    numbers = torch.ones(gradient_bytes(training, sharing.compress_gradients) // dtype.itemsize, dtype=dtype)
    # As DDP does, which compresses what is in a bucket; but it sends a parameter larger than a bucket whole.
    buckets = numbers.split(max(1, int(sharing.bucket_mb * 2**20 / 4)))
    dist.barrier()
    cpu, wall = time.process_time(), time.perf_counter()
    for work in [dist.all_reduce(own, async_op=True) for own in buckets]:
        assert work is not None
        work.wait()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def process_id(training: Training) -> int:
    """Task: which process this is."""
    return os.getpid()


def ask(workers: Sequence[Connection], task: Task[Answer]) -> list[Answer]:
    """What each of ``workers`` answers to ``task``, once all have; they work at the same time."""
    for worker in workers:
        worker.send(task)
    return [worker.recv() for worker in workers]


def serve(connection: Connection, training: Training) -> None:
    """Do what ``ask`` asks until told to end, or until nobody is left to ask. Waiting takes no processor time."""
    with suppress(EOFError, KeyboardInterrupt):
        while (task := connection.recv()) is not None:
            connection.send(task(training))


@contextmanager
def plain_workers(setting: Setting, num: int, *, of_one_run: bool = False) -> Iterator[list[Connection]]:
    """``num`` processes that wait for tasks: each for itself, or of one run."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.pass_step"])  # torch and Ray are imported once, not in each
    pipes = [context.Pipe() for _ in range(num)]
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=_work, args=(theirs, setting, rank, num, folder if of_one_run else None), daemon=True
            )
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(processes, pipes, strict=True):
            process.start()
            theirs.close()  # else the death of a worker would not be seen
        try:
            yield [ours for ours, _ in pipes]
        finally:
            for ours, _ in pipes:
                with suppress(OSError):
                    ours.send(None)
            for process in processes:
                process.join(JOIN_SECONDS)
                process.terminate()  # one that waits for a worker that died


def _work(connection: Connection, setting: Setting, rank: int, world_size: int, group_folder: str | None) -> None:
    torch.set_num_threads(setting.threads)
    if group_folder is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        method = f"file://{group_folder}/group"
        dist.init_process_group("gloo", init_method=method, rank=rank, world_size=world_size)
    # No run: nothing is told to a driver and nothing saved.
    context = WorkerContext(rank, world_size, setting.device, board=None, checkpoints=cast(CheckpointStore, None))
    serve(connection, new_training(setting, context))


class Side:
    """Workers that do a task together when called, and what they answered each time."""

    def __init__(self, workers: Sequence[Connection], task: Task[Any]) -> None:
        self._workers, self._task = workers, task
        self.answers: list[list[Any]] = []

    def __call__(self) -> None:
        self.answers.append(ask(self._workers, self._task))


def scaling(setting: Setting, repeats: int, steps: int) -> list[Row]:
    """Rows of one worker, of two that do not talk, of two of one run, and of sending alone where DDP sends."""
    sharing = setting.config.sharing
    take, send = partial(take_steps, num=steps), partial(all_reduce_alone, sharing=sharing)
    with plain_workers(setting, 2) as apart, plain_workers(setting, 2, of_one_run=True) as together:
        num_bytes = ask(together, partial(gradient_bytes, compress=sharing.compress_gradients))[0]
        sides = {ONE: Side(apart[:1], take), APART: Side(apart, take), TOGETHER: Side(together, take)}
        sending = {SENDING: Side(together, send)} if num_bytes else {}
        for workers in (apart, together):
            ask(workers, partial(take_steps, num=WARM_UP_STEPS))
        timings = alternate({**sides, **sending}, repeats, warm_ups=0)
    walls = {name: [timing.wall_seconds / steps for timing in timings[name]] for name in sides}
    cpus = {
        name: statistics.median(turn.cpu_seconds for turns in side.answers for turn in turns)
        for name, side in sides.items()
    }
    rows = scaling_rows(walls, cpus, setting.config.batch_size)
    return [*rows, *(_sending_row(side.answers, num_bytes) for side in sending.values())]


def _sending_row(timings: list[list[Timing]], num_bytes: int) -> Row:
    wall = Spread.of([own.wall_seconds for of_workers in timings for own in of_workers])
    return {
        "side": SENDING,
        "s per step": wall.median,
        "s, lowest": wall.lowest,
        "s, highest": wall.highest,
        "CPU s per step": statistics.median(own.cpu_seconds for of_workers in timings for own in of_workers),
        "MB of gradients": num_bytes / 1e6,
    }


def scaling_rows(walls: dict[str, list[float]], cpus: dict[str, float], batch: int) -> list[Row]:
    """A row for ``ONE``, ``APART`` and ``TOGETHER``, from the seconds of a step in every turn and the CPU seconds."""
    rows: list[Row] = []
    for name, own in walls.items():
        num_workers = 1 if name == ONE else 2
        wall = Spread.of(own)
        share = Spread.of([num_workers / 2 * one / other for one, other in zip(walls[ONE], own, strict=True)])
        row: Row = {
            "side": name,
            "s per step": wall.median,
            "s, lowest": wall.lowest,
            "s, highest": wall.highest,
            "CPU s per step": cpus[name],
            "images/s": num_workers * batch / wall.median,
            "of twice one worker": share.median,
            "lowest": share.lowest,
            "highest": share.highest,
        }
        if name == TOGETHER:
            row["s more than apart"] = statistics.median(b - a for a, b in zip(walls[APART], own, strict=True))
        rows.append(row)
    return rows


@contextmanager
def ray_train_worker(setting: Setting) -> Iterator[Connection]:
    """The one worker of a Ray Train run, which waits for tasks; Ray must run on this machine."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Listener(f"{folder}/tasks") as listener,
        ThreadPoolExecutor(1) as threads,
    ):
        run = RunConfig(name="steps", output=Path(folder))
        run.folder.mkdir()
        board: Any = Board.remote()
        loop_config = {"setting": setting, "tasks": listener.address, "board": board, "checkpoints": run.checkpoints}

        def train() -> None:
            try:
                fit(train_worker, loop_config, run, setting.config.workers, board)
            finally:
                with suppress(OSError):
                    Client(listener.address).close()  # wakes the one below who waits for a worker that never came

        training = threads.submit(train)
        connection = listener.accept()
        try:
            yield connection
        finally:
            with suppress(OSError):
                connection.send(None)
            training.result()


def train_worker(loop_config: dict[str, Any]) -> None:
    """What the Ray Train worker does: the beginning of a pre-training job's, then tasks in place of its loop."""
    setting: Setting = loop_config["setting"]
    worker = WorkerContext.from_ray(loop_config["board"], loop_config["checkpoints"], setting.threads)
    training = new_training(setting, worker)
    with Client(loop_config["tasks"]) as connection:
        serve(connection, training)


@dataclass(frozen=True)
class CpuUse:
    """CPU seconds so far of every living process that this one started."""

    of_process: dict[int, tuple[str, float]]
    """By process id: its name and its seconds."""

    @classmethod
    def now(cls) -> "CpuUse":
        """That of this moment."""
        found: dict[int, tuple[str, float]] = {}
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                times = process.cpu_times()
                found[process.pid] = process.name(), times.user + times.system
        return cls(found)

    def since(self, earlier: "CpuUse", leave_out: Sequence[int] = ()) -> Counter[str]:
        """Milliseconds that those who live now have used since ``earlier``, by name."""
        used: Counter[str] = Counter()
        for pid, (name, seconds) in self.of_process.items():
            if pid not in leave_out:
                used[name] += round(1000 * (seconds - earlier.of_process.get(pid, (name, 0.0))[1]))
        return used


def under_ray(setting: Setting, repeats: int, steps: int, job_steps: int) -> list[Row]:
    """Rows of a plain process, of a Ray Train worker that does the same, and of a whole job. Starts and ends Ray."""
    connect(setting.config.workers)
    try:
        rows = _fixed_batch_rows(setting, repeats, steps)
        if job_steps:
            rows.append(_job_row(setting, job_steps, cast(float, rows[0]["CPU s per step"])))
    finally:
        ray.shutdown()
    return rows


def _fixed_batch_rows(setting: Setting, repeats: int, steps: int) -> list[Row]:
    others: Counter[str] = Counter()
    num_steps = repeats * steps
    with plain_workers(setting, 1) as plain, ray_train_worker(setting) as in_ray:
        workers = [*plain, in_ray]
        pids = ask(workers, process_id)
        ask(workers, partial(take_steps, num=WARM_UP_STEPS))
        sides = {
            PLAIN: Side(plain, partial(take_steps, num=steps)),
            RAY_TRAIN: Side([in_ray], partial(take_steps, num=steps)),
        }

        def ray_turn() -> None:
            before = CpuUse.now()
            sides[RAY_TRAIN]()
            others.update(CpuUse.now().since(before, leave_out=pids))

        alternate({PLAIN: sides[PLAIN], RAY_TRAIN: ray_turn}, repeats, warm_ups=0)
    print(f"Ray's other processes, CPU s of a step: {_listed(others, 1 / num_steps)}")
    rows = cpu_rows({name: [turn for (turn,) in side.answers] for name, side in sides.items()})
    rows[1]["other processes"] = others.total() / 1000 / num_steps
    return rows


def cpu_rows(turns: dict[str, list[Turn]]) -> list[Row]:
    """A row for every side, the first of which is the baseline."""
    baseline, *_ = turns.values()
    rows: list[Row] = []
    for name, own in turns.items():
        cpu = Spread.of([step.cpu_seconds for turn in own for step in turn.steps])
        ratio = Spread.of([b.cpu_seconds / a.cpu_seconds for a, b in zip(baseline, own, strict=True)])
        rows.append(
            {
                "side": name,
                "CPU s per step": cpu.median,
                "CPU s, lowest": cpu.lowest,
                "CPU s, highest": cpu.highest,
                "s per step": statistics.median(step.wall_seconds for turn in own for step in turn.steps),
                "CPU against plain": ratio.median,
                "lowest": ratio.lowest,
                "highest": ratio.highest,
            }
        )
    return rows


def _job_row(setting: Setting, num_steps: int, plain_cpu_seconds: float) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        config = job_config(setting.config, num_steps, Path(folder))
        before, start = CpuUse.now(), time.perf_counter()
        with patch.object(pretrain, "train_worker", marked_worker):
            pretrain.run(config)
        job_seconds = time.perf_counter() - start
        others = CpuUse.now().since(before)
        steps = steps_between(json.loads((config.run.folder / MARKS_FILE).read_text()))
    row = cpu_rows({JOB: [Turn(steps, 0.0)]})[0]
    share_of_job = cast(float, row["s per step"]) / job_seconds
    print(f"Ray's processes that outlive the job, CPU s of a step: {_listed(others, share_of_job)}")
    row["CPU against plain"] = cast(float, row["CPU s per step"]) / plain_cpu_seconds
    row["lowest"] = row["highest"] = None
    row["other processes"] = others.total() / 1000 * share_of_job
    return row


def job_config(config: PretrainConfig, num_steps: int, folder: Path) -> PretrainConfig:
    """A pre-training job of ``num_steps`` steps, or a few more, in ``folder``."""
    images_per_person = SyntheticSource().images_per_person
    num_people = max(2, -(-num_steps * config.batch_size // images_per_person))
    # Frozen prototypes would make the steps of the first epoch, which are all, cheaper than those of the other sides.
    optimizer = config.optimizer.model_copy(update={"frozen_last_layer_epochs": 0})
    return config.model_copy(
        update={
            "run": RunConfig(name="job", output=folder),
            "epochs": 1,
            "data": SyntheticSource(num_people=num_people),
            "optimizer": optimizer,
        }
    )


def marked_worker(loop_config: dict[str, Any]) -> None:
    """The worker of a pre-training job, which also writes down when each step begins, by the clock and in CPU time."""
    marks: list[tuple[float, float]] = []

    def marked_step(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        marks.append((time.perf_counter(), time.process_time()))
        return train_step(*args, **kwargs)

    with patch.object(pretrain, "train_step", marked_step):
        pretrain.train_worker(loop_config)
    run: RunConfig = loop_config["config"].run
    (run.folder.resolve() / MARKS_FILE).write_text(json.dumps(marks))


def steps_between(marks: Sequence[tuple[float, float]]) -> list[Timing]:
    """What passed between the beginnings of steps, the first of which is left out as a warm-up."""
    return [Timing(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(marks[1:])]


def _listed(milliseconds: Counter[str], share: float) -> str:
    return ", ".join(f"{name} {own / 1000 * share:.3f}" for name, own in milliseconds.most_common(8))


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and keep the results."""
    options = _options(arguments)
    torch.set_num_threads(THREADS)
    config = PretrainConfig.model_validate(
        {
            "batch_size": options.batch,
            "precision": options.precision,
            "model": {"trunk": options.trunk, "drop_path": options.drop_path},
            "head": {"num_prototypes": options.prototypes},
            "sharing": {
                "strategy": options.strategy,
                "bucket_mb": options.bucket_mb,
                "compress_gradients": options.compress_gradients,
            },
            "workers": WorkersConfig(threads=THREADS, max_failures=0, use_gpu=False),
        }
    )
    setting = Setting(config, torch.device("cpu"), THREADS)
    check_sharing(config.sharing.strategy, options.prototypes, 2, config.precision)
    machine = describe_machine(setting.device)
    kept = {own: getattr(options, own) for own in KEPT}
    name = options.name or f"parallel_step_{options.strategy}_{options.precision}"
    results = [(name, scaling(setting, options.repeats, options.steps), SCALING_READING)]
    print(table_of(results[0][1]))
    if not options.no_ray:
        results.append(
            (f"{name}_ray", under_ray(setting, options.repeats, options.steps, options.job_steps), RAY_READING)
        )
        print(table_of(results[1][1]))
    for own_name, rows, reading in results:
        print(f"wrote {write_result(own_name, machine, kept, rows, reading=reading)}")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="images of a step of one worker")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--trunk", default="vit_small_patch16_224", help="name of a timm ViT")
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--drop-path", type=float, default=0.1)
    parser.add_argument("--strategy", choices=get_args(Strategy), default="copies", help="how two of one run share")
    parser.add_argument("--bucket-mb", type=float, default=25.0, help="MiB of gradients that are sent together")
    parser.add_argument("--compress-gradients", action="store_true", help="send gradients as bf16")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn")
    parser.add_argument("--job-steps", type=int, default=6, help="steps of the whole job under Ray; 0: no job")
    parser.add_argument("--no-ray", action="store_true", help="scaling alone")
    parser.add_argument("--name", help="of the results; by default from strategy and precision")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # Under its own name: what is sent to other processes would be looked for in their __main__.
    from benchmarks.parallel_step import main as own_main

    own_main()
