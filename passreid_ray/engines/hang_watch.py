"""Looks for workers that hang, names them, writes down the stacks of all, and has the ones that hang replaced."""

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError

from passreid_ray.engines.hangs import Hang, find_hang, hang_line, stacks_text
from passreid_ray.engines.hung_process import Seen, end, look_at
from passreid_ray.engines.ray_cluster import WorkersConfig
from passreid_ray.train.beats import WorkerProcess

LOOK_SECONDS = 5.0
LOOKS_PER_LIMIT = 8
"""With a short limit it looks more often: so many times while it passes."""
SURE_AFTER_LOOKS = 3
"""A machine that slept finds everybody still and silent at first, and hears of them a beat later."""

FoundT = TypeVar("FoundT")


class HangWatch:
    """Watches the beats on a board in the background; idle with ``workers.hang_seconds`` None.

    A worker that hangs is killed, which makes Ray Train start all again from the last checkpoint. With
    ``workers.num_workers`` 0 the worker is this process: the reason is left on the board and ``gave_up`` is set.
    """

    def __init__(self, board: Any, workers: WorkersConfig, folder: Path) -> None:
        self._board = board
        self._hang_seconds = workers.hang_seconds
        self._is_in_process = workers.num_workers == 0
        self._folder = folder
        self.gave_up = threading.Event()
        """The worker hangs and cannot be replaced: whoever waits for it need not."""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "HangWatch":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        if self._hang_seconds is None:
            return
        with contextlib.suppress(RayError):  # the cluster is gone; whoever started the run learns why
            looks = 0
            while not self._done.wait(min(LOOK_SECONDS, self._hang_seconds / LOOKS_PER_LIMIT)):
                hang = find_hang(ray.get(self._board.beats.remote()), self._hang_seconds)
                looks = 0 if hang is None else looks + 1
                if hang is not None and looks == SURE_AFTER_LOOKS:
                    self._handle(hang)
                    ray.get(self._board.forget_beats.remote())
                    looks = 0

    def _handle(self, hang: Hang) -> None:
        if self._is_in_process:
            outcome = "It is the process of this job, so the run ends; the same command goes on from what was saved"
            file = self._write(hang, {})
            ray.get(self._board.stop.remote(hang_line(hang, hang.culprits[0], "", file, outcome)))
            self.gave_up.set()
            return
        processes = [culprit.beat.process for culprit in hang.culprits]
        seen: dict[int, Seen] = {}
        if hang.are_silent:
            seen = dict(zip((process.rank for process in processes), _of_all(look_at, processes), strict=True))
        if not all(own.is_there for own in seen.values()):
            return  # a crash, which Ray Train sees to
        file = self._write(hang, seen)
        for culprit, process, failure in zip(hang.culprits, processes, _of_all(end, processes), strict=True):
            outcome = f"It cannot be killed: {failure}" if failure else "It was killed and counts as a crash"
            state = seen[process.rank].state if hang.are_silent else ""
            line = hang_line(hang, culprit, state, file, outcome)
            ray.get(self._board.post.remote({"kind": "say", "rank": process.rank, "text": line}))

    def _write(self, hang: Hang, seen: dict[int, Seen]) -> str:
        """Add the stacks to the file of this step; its path, or why it cannot be written."""
        path = self._folder / f"stacks-{hang.step}.txt"
        text = stacks_text(hang, {rank: own.stacks for rank, own in seen.items()})
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            return f"no file ({path}: {error.strerror or error})"
        return str(path)


def _of_all(function: Callable[[WorkerProcess], FoundT], processes: list[WorkerProcess]) -> list[FoundT]:
    """``function`` of each process, all at once: machines that do not answer take their time, and runs wait for it."""
    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(function, processes))
