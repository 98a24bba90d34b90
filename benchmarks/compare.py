"""Two or more ways to do one job, timed in turns, and the file that a comparison is kept in.

All sides are timed in one process, one call after the other, the order reversed in every other repeat: what else the
machine does then hits all of them alike, and a repeat's ratio compares calls that lie seconds apart. Memory needs a
process of its own for each side (``measure.in_own_process``): in a shared one it is that of the larger.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import Machine

RESULTS = Path(__file__).parent / "results"
Row = dict[str, str | float | None]


@dataclass(frozen=True)
class Timing:
    """Of one call."""

    wall_seconds: float
    cpu_seconds: float
    """Of all threads of this process."""


@dataclass(frozen=True)
class Spread:
    """The middle of some numbers and how far they reach."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """That of ``values``, at least one."""
        return cls(statistics.median(values), min(values), max(values))


def alternate(
    sides: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warm_ups: int = 1,
    wait: Callable[[], object] = lambda: None,
) -> dict[str, list[Timing]]:
    """Timings of ``repeats`` calls of every side, in turns; ``warm_ups`` calls of each come first and are left out.

    ``wait`` returns when all that was started is done: a GPU's ``synchronize``. A repeat's timings have the same index.
    """
    for _ in range(warm_ups):
        for call in sides.values():
            call()
    timings: dict[str, list[Timing]] = {name: [] for name in sides}
    for repeat in range(repeats):
        names = list(sides) if repeat % 2 == 0 else list(sides)[::-1]
        for name in names:
            timings[name].append(_timed(sides[name], wait))
    return timings


def times_as_fast(baseline: Sequence[Timing], other: Sequence[Timing]) -> Spread:
    """How many times as fast as the baseline the other is by the clock, over the repeats."""
    return Spread.of([a.wall_seconds / b.wall_seconds for a, b in zip(baseline, other, strict=True)])


def times_less_cpu(baseline: Sequence[Timing], other: Sequence[Timing]) -> Spread:
    """How many times the baseline's processor time is the other's, over the repeats."""
    return Spread.of([a.cpu_seconds / b.cpu_seconds for a, b in zip(baseline, other, strict=True)])


def rows_of(timings: Mapping[str, Sequence[Timing]], images: int) -> list[Row]:
    """A row for every side, the first of which is the baseline; each call does ``images`` images."""
    baseline, *_ = timings.values()
    rows = []
    for name, own in timings.items():
        wall, speed, cpu = Spread.of([t.wall_seconds for t in own]), *_ratios(baseline, own)
        rows.append(
            {
                "side": name,
                "wall s": wall.median,
                "wall s, lowest": wall.lowest,
                "wall s, highest": wall.highest,
                "CPU s": statistics.median(t.cpu_seconds for t in own),
                "images/s": images / wall.median,
                "times as fast": speed.median,
                "lowest": speed.lowest,
                "highest": speed.highest,
                "times less CPU": cpu.median,
            }
        )
    return rows


def write_result(
    name: str,
    machine: Machine,
    settings: Mapping[str, Any],
    rows: Sequence[Row],
    *,
    reading: str,
    folder: Path = RESULTS,
) -> Path:
    """Write ``<folder>/<name>.json`` and return its path; ``reading`` is one line that says how to read the rows."""
    result = {
        "name": name,
        "date": datetime.now(UTC).date().isoformat(),
        "reading": reading,
        "machine": asdict(machine),
        "settings": dict(settings),
        "rows": list(rows),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def _ratios(baseline: Sequence[Timing], own: Sequence[Timing]) -> tuple[Spread, Spread]:
    return times_as_fast(baseline, own), times_less_cpu(baseline, own)


def _timed(call: Callable[[], object], wait: Callable[[], object]) -> Timing:
    wait()
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    wait()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)
