"""Killing a run in the middle, and what is compared with one that was left alone."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

import psutil

from passreid_ray.train.run_log import read_jsonl
from tests.processes import own_processes

WATCH_SECONDS = 400.0
"""How long a process may take to appear."""
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


def stop_a_worker_at(step: int, folder: Path) -> list[int]:
    """Sends SIGSTOP to a training worker of this process once ``step`` is logged; its pid, once it has."""
    pids: list[int] = []

    def watch() -> None:
        while max(losses(folder), default=0) < step:
            time.sleep(0.02)
        pid = own_processes("RayTrainWorker")[-1].pid
        os.kill(pid, signal.SIGSTOP)
        pids.append(pid)

    threading.Thread(target=watch, daemon=True).start()
    return pids


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


class KillOne(threading.Thread):
    """Sends SIGKILL to the first process of this one's cluster that is seen at work on ``word``."""

    def __init__(self, word: str) -> None:
        super().__init__(daemon=True)
        self._word = word
        self.killed: int | None = None
        """Its process id."""
        self.seconds: float | None = None
        """From the kill until another process was seen at work on the same."""
        self.start()

    def run(self) -> None:
        """Watch, kill, watch on."""
        victim = self._next({})
        begun = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        self.killed = victim
        self._next({victim, *self._at_work()})
        self.seconds = time.monotonic() - begun

    def _at_work(self) -> set[int]:
        return {process.pid for process in own_processes(self._word)}

    def _next(self, known: Collection[int]) -> int:
        deadline = time.monotonic() + WATCH_SECONDS
        while not (found := self._at_work().difference(known)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no process at work on {self._word}")
            time.sleep(0.01)
        return min(found)
