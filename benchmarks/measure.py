"""What one call costs: processor time, wall time and memory. Prints nothing; the other benchmarks use it."""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec, TypeVar

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


@dataclass(frozen=True)
class Cost:
    """Of one call, in the process that made it."""

    cpu_seconds: float
    """Of all threads."""
    wall_seconds: float
    peak_bytes: int
    """Highest resident memory less what was resident before: imports and inputs are left out."""

    def __str__(self) -> str:
        return f"{self.cpu_seconds:7.2f} s CPU, {self.wall_seconds:7.2f} s wall, peak {self.peak_bytes / 1e9:6.3f} GB"


def cpu_seconds(function: Callable[[], Result]) -> tuple[float, Result]:
    """Process time of one call, and what it returned."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def cost(function: Callable[[], Result]) -> tuple[Cost, Result]:
    """``Cost`` of one call, and what it returned.

    Call it ``in_own_process`` and load the inputs from files there: what has been used and freed before the call, the
    call can use again without its being seen.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is resident now
    before, wall = _peak_bytes(), time.perf_counter()
    seconds, result = cpu_seconds(function)
    return Cost(seconds, time.perf_counter() - wall, _peak_bytes() - before), result


def in_own_process(function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
    """The result of a call in a fresh process, whose peak of memory owes nothing to earlier calls."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        return executor.submit(function, *args, **kwargs).result()


def _peak_bytes() -> int:
    # Not getrusage: a process starts with the peak of the one that started it there.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024
