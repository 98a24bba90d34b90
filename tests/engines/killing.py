"""Killing a run in the middle, and what is compared with one that was left alone."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from passreid_ray.train.run_log import read_jsonl
from tests.processes import own_processes

ROOT = Path(__file__).parents[2]


def losses(folder: Path) -> dict[int, float]:
    """The loss of every step in a run's records."""
    return {record["step"]: record["loss"] for record in read_jsonl(folder / "metrics.jsonl") if "loss" in record}


def kill_a_worker_at(step: int, folder: Path) -> threading.Thread:
    """Sends SIGKILL to a training worker of this process once ``step`` is logged; alive until it has."""

    def watch() -> None:
        while max(losses(folder), default=0) < step:
            time.sleep(0.02)
        os.kill(own_processes("RayTrainWorker")[0].pid, signal.SIGKILL)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def killed_and_given_again(job: str, preset: Path, is_time: Callable[[], object]) -> str:
    """What ``jobs/<job>`` prints the second time, after its whole process tree was killed as soon as ``is_time``."""
    command = [sys.executable, f"jobs/{job}", str(preset)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": ""}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.DEVNULL
    ) as process:
        while not is_time():
            assert process.poll() is None
            time.sleep(0.01)
        for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(ProcessLookupError):  # ended with one that was killed before it
                os.kill(victim.pid, signal.SIGKILL)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
