"""A thread in every training worker that tells the run's board, every few seconds, how the worker gets on."""

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import ray
import ray.train
import ray.util

import passreid_ray
from passreid_ray.train.beats import Beat, WorkerProcess
from passreid_ray.train.pulse import pulse

BEAT_SECONDS = 5.0
BEATS_PER_LIMIT = 4
"""With a short limit beats come more often: so many while it passes."""
COMPUTING_SHARE = 0.05
"""Of a core: a thread that uses more computes, if only on a busy machine; one that waits uses nearly nothing."""
OWN_CODE = str(Path(passreid_ray.__file__).parent)
WAITING_FOR_OTHERS = (
    f"{os.sep}torch{os.sep}distributed{os.sep}",
    f"{os.sep}torch{os.sep}nn{os.sep}parallel{os.sep}",
    f"{os.sep}torch{os.sep}autograd{os.sep}",  # backward, in which DDP averages gradients
    f"{os.sep}ray{os.sep}train{os.sep}",  # a report, which is a barrier
)
"""Parts of paths of the library code in which a worker waits for the other workers."""


@contextlib.contextmanager
def beating(board: Any, hang_seconds: float | None) -> Iterator[None]:
    """Inside, the calling thread trains and another one posts its beats; none at all with ``hang_seconds`` None."""
    if hang_seconds is None:
        yield
        return
    pulse.restart()
    heart = Heart(board, hang_seconds)
    try:
        yield
    finally:
        heart.stop()


class Heart:
    """Posts the beats of the thread that made it, until it is stopped."""

    def __init__(self, board: Any, hang_seconds: float) -> None:
        self._board = board
        self._hang_seconds = hang_seconds
        self._trainer = threading.get_ident()
        # The clock is made by the thread itself, while it surely lives.
        self._cpu_clock = time.pthread_getcpuclockid(self._trainer) if sys.platform == "linux" else None
        self._cpu_seconds, self._cpu_since = self._cpu_time(), time.monotonic()
        self._process = this_process()
        self._posted: Any = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")
        self._thread.start()

    def stop(self) -> None:
        """The worker has ended, well or not: it is not missed."""
        self._done.set()
        self._thread.join()
        self._board.end_beats.remote(self._process)

    def _run(self) -> None:
        interval = min(BEAT_SECONDS, self._hang_seconds / BEATS_PER_LIMIT)
        while True:
            self._beat()
            if self._done.wait(interval):
                return

    def _beat(self) -> None:
        if not ray.is_initialized():  # the job gave this worker up and is ending; a call would start Ray again
            return
        if self._posted is not None and not ray.wait([self._posted], timeout=0)[0]:
            return  # the board has not read the last one
        if self._is_computing() and pulse.phase.kind == "work":
            pulse.get_on()
        self._posted = self._board.beat.remote(self.read())

    def read(self) -> Beat:
        """How the worker gets on now."""
        still_seconds = time.monotonic() - pulse.last_seconds
        frames = sys._current_frames()
        place, waits_for_others = whereabouts(frames.get(self._trainer))
        is_suspect = still_seconds >= self._hang_seconds / 2
        return Beat(
            self._process,
            pulse.phase,
            pulse.first_step,
            pulse.steps,
            still_seconds,
            place,
            waits_for_others,
            stacks_of(frames, self._trainer) if is_suspect else "",
        )

    def _is_computing(self) -> bool:
        """Whether the thread that trains has used the CPU since the last call."""
        before, since = self._cpu_seconds, self._cpu_since
        self._cpu_seconds, self._cpu_since = self._cpu_time(), time.monotonic()
        return self._cpu_seconds - before > COMPUTING_SHARE * (self._cpu_since - since)

    def _cpu_time(self) -> float:
        return time.process_time() if self._cpu_clock is None else time.clock_gettime(self._cpu_clock)


def this_process() -> WorkerProcess:
    """Where the worker is that this is called in."""
    return WorkerProcess(
        ray.train.get_context().get_world_rank(),
        ray.get_runtime_context().get_node_id(),
        ray.util.get_node_ip_address(),
        os.getpid(),
        psutil.Process().create_time(),
    )


def whereabouts(innermost: FrameType | None) -> tuple[str, bool]:
    """(line of this package, whether it waits for other workers) of a thread, given its innermost frame."""
    waits_for_others, frame = False, innermost
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(OWN_CODE):
            package = Path(path).relative_to(Path(OWN_CODE).parent)
            return f"{package}:{frame.f_lineno} ({frame.f_code.co_name})", waits_for_others
        waits_for_others = waits_for_others or any(part in path for part in WAITING_FOR_OTHERS)
        frame = frame.f_back
    return "", waits_for_others


def stacks_of(frames: dict[int, FrameType], trainer: int) -> str:
    """Python stacks of all threads, the one that trains first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident in sorted(frames, key=lambda ident: ident != trainer):
        title = f"thread {names.get(ident, ident)}" + (", which trains" if ident == trainer else "")
        parts.append(f"{title}:\n{''.join(traceback.format_stack(frames[ident]))}")
    return "\n".join(parts)
