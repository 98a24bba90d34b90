"""How far a packing job is."""

import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from passreid_ray.engines.pack_disk import size_text
from passreid_ray.engines.progress import LINE_SECONDS


class PackProgress:
    """Images per second and bytes written: a live bar in a terminal, now and then a line anywhere else."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None, state="")
        self._phase = ""
        self._first, self._start, self._last = 0, 0.0, 0.0
        """Images that were done when the phase began, when that was, and when the last line was."""
        self._bytes = 0

    def __enter__(self) -> "PackProgress":
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def __call__(self, phase: str, done: int, total: int, new_bytes: int = 0) -> None:
        """``done`` of ``total`` images; ``new_bytes`` were written since the last call."""
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._first, self._start, self._last, self._bytes = phase, done, now, now, 0
            self._bar.reset(self._task, description=phase, total=total)
        self._bytes += new_bytes
        per_second = (done - self._first) / max(now - self._start, 1e-9)
        state = f"{per_second:,.0f} images/s" + (f", {size_text(self._bytes)}" if self._bytes else "")
        self._bar.update(self._task, completed=done, state=state)
        if now - self._last >= LINE_SECONDS and not self._console.is_terminal and per_second:
            self._last = now
            left = timedelta(seconds=round((total - done) / per_second))
            self._console.print(f"{phase}: {done:,} of {total:,}  {state}  {left} left", highlight=False, markup=False)
