"""How far a run is: a live bar in a terminal, now and then a line anywhere else, such as in a log file."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PhaseProgress = Callable[[str, int, int], None]
"""Called with the name of a phase, how much of it is done and how much there is: images, mostly."""
LINE_SECONDS = 30.0
SHORT_SECONDS = 5.0
"""Phases that take less are not worth a line."""
LINE_SHARE = 0.1
"""A line is due after this many seconds or this share of the run, whatever comes first."""


class RunProgress(Protocol):
    """What shows the progress of a run."""

    def start(self, step: int, end_step: int) -> None:
        """Steps begin after ``step``; may come again when workers were restarted."""
        ...

    def update(self, step: int, state: str) -> None:
        """``step`` steps are done; ``state`` says how it goes."""
        ...

    def phase(self, phase: str, done: int, total: int) -> None:
        """Between steps: so many of a phase's images are done."""
        ...

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


def run_progress(console: Console) -> RunProgress:
    """What suits ``console``."""
    return LiveBar(console) if console.is_terminal else PlainLines(console)


class LiveBar:
    """A bar that stays below whatever is said."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("starting", total=None, state="")
        self._end_step = 0
        self._progress.start()

    def start(self, step: int, end_step: int) -> None:
        self._end_step = end_step
        self._progress.update(self._task, description="training", completed=step, total=end_step)

    def update(self, step: int, state: str) -> None:
        self._progress.update(self._task, description="training", completed=step, total=self._end_step, state=state)

    def phase(self, phase: str, done: int, total: int) -> None:
        self._progress.update(self._task, description=phase, completed=done, total=total, state="")

    def say(self, text: str, style: str | None = None) -> None:
        self._progress.console.print(text, style=style, highlight=False, markup=False)

    def close(self) -> None:
        self._progress.stop()


class PlainLines:
    """Whole lines only."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._end_step = 0
        self._first = self._last = (0, 0.0)
        """Step and time at which steps began, and of the last line."""
        self._phases = PhaseLines(console)

    def start(self, step: int, end_step: int) -> None:
        self._end_step = end_step
        self._first = self._last = (step, time.monotonic())

    def update(self, step: int, state: str) -> None:
        now = time.monotonic()
        last_step, last_seconds = self._last
        is_due = step - last_step >= LINE_SHARE * self._end_step or now - last_seconds >= LINE_SECONDS
        if not is_due and step < self._end_step:
            return
        self._last = (step, now)
        first_step, first_seconds = self._first
        left = timedelta(seconds=round((now - first_seconds) / max(1, step - first_step) * (self._end_step - step)))
        self.say(f"step {step} of {self._end_step}  {state}  {left} left")

    def phase(self, phase: str, done: int, total: int) -> None:
        self._phases(phase, done, total)

    def say(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, highlight=False, markup=False)

    def close(self) -> None:
        pass


class PhaseLines:
    """Phases of a job: a bar while one lasts, and in a log a line when it ends. Call it as ``PhaseProgress``."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=None)
        self._phase = ""
        self._start = self._last = 0.0

    def __enter__(self) -> "PhaseLines":
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._start, self._last = phase, now, now
            self._progress.reset(self._task, description=phase, total=total)
        self._progress.update(self._task, completed=done)
        if done == total:
            seconds = now - self._start
            if seconds >= SHORT_SECONDS:
                rate = f", {total / seconds:,.0f} images/s" if phase == "features" else ""
                self._say(f"{phase}: {total:,} in {seconds:.1f} s{rate}")
            self._phase = ""
        elif now - self._last >= LINE_SECONDS and not self._console.is_terminal:
            self._last = now
            self._say(f"{phase}: {done:,} of {total:,}")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)
