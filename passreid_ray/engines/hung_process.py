"""What is done about a worker's process on its own machine, as Ray tasks there: look at it, end it."""

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from passreid_ray.train.beats import WorkerProcess

TRAIN_WORKER = "RayTrainWorker"
"""In the title of every process that may be ended."""
TASK_SECONDS = 60.0
"""How long a task may take to start and to end."""
DUMP_SECONDS = 20.0
END_SECONDS = 10.0
CLOCK_SECONDS = 1.0
STATES = {
    psutil.STATUS_STOPPED: "stopped by a signal",
    psutil.STATUS_TRACING_STOP: "held by a debugger",
    psutil.STATUS_DISK_SLEEP: "waiting for a disk or a network file system",
    psutil.STATUS_RUNNING: "computing, and letting no other thread run",
}


@dataclass(frozen=True)
class Seen:
    """A process from outside."""

    state: str
    is_there: bool = True
    stacks: str = ""


def look_at(process: WorkerProcess) -> Seen:
    """What ``process`` is doing, as its machine sees it."""
    return _on_its_node(_look_at, process, Seen("its machine does not answer either"))


def end(process: WorkerProcess) -> str:
    """Kill ``process``; why that was not possible, or nothing."""
    return _on_its_node(_end, process, "its machine does not answer")


def _on_its_node(function: Any, process: WorkerProcess, otherwise: Any) -> Any:
    place: Any = NodeAffinitySchedulingStrategy(process.node_id, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=place)(function)
    try:
        return ray.get(task.remote(process), timeout=TASK_SECONDS)
    except RayError:  # it is gone, or cut off; Ray finds that out by itself
        return otherwise


def _look_at(process: WorkerProcess) -> Seen:
    found = _find(process)
    if found is None:
        return Seen("gone", is_there=False)
    state = found.status()
    return Seen(STATES.get(state, state), stacks=_dump(process.pid))


def _end(process: WorkerProcess) -> str:
    found = _find(process)
    if found is None:
        return ""
    try:
        found.kill()
    except psutil.NoSuchProcess:
        return ""
    except psutil.Error as error:
        return str(error)
    deadline = time.monotonic() + END_SECONDS
    while _is_alive(found):
        if time.monotonic() > deadline:
            return f"it is still there {END_SECONDS:g} s later"
        time.sleep(0.05)
    return ""


def _find(process: WorkerProcess) -> psutil.Process | None:
    """The process, if it still is the training worker that it was."""
    try:
        found = psutil.Process(process.pid)
        is_same = abs(found.create_time() - process.created_seconds) < CLOCK_SECONDS
        is_worker = TRAIN_WORKER in " ".join(found.cmdline())
        return found if is_same and is_worker and _is_alive(found) else None
    except psutil.Error:
        return None


def _is_alive(process: psutil.Process) -> bool:
    """Whether it still runs; its command line says nothing of that, the kernel empties it early in the exit."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _dump(pid: int) -> str:
    """Stacks of a process that does not answer: py-spy, which comes with Ray, reads them from its memory."""
    py_spy = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if py_spy is None:
        return "no stacks: py-spy is not installed on its machine\n"
    command = [py_spy, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DUMP_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no stacks: {error}\n"
    return done.stdout if done.returncode == 0 else f"no stacks: {done.stderr.strip()}\n"
