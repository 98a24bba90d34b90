"""What failures and resizes cost a run: steps done twice, and time."""

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

Cause = Literal["failed", "preempted", "resized"]
MAX_REMEMBERED = 65536
"""Steps whose time is kept; a checkpoint that is older than all of them counts from the oldest."""


@dataclass
class Setbacks:
    """Counts how often workers were started anew and what was lost.

    Lost seconds lie between the end of the last step that is kept and the moment that workers go on after it: the time
    of the steps that are done again, and the time without any. All times are of one clock, that of the caller.
    """

    failures: int = 0
    """Times that workers failed or their node was taken away."""
    resizes: int = 0
    """Times that workers were started anew because there was room for more of them, or for fewer."""
    lost_steps: int = 0
    lost_seconds: float = 0.0
    num_workers: int | None = None
    """Of the group that is at work."""
    _cause: Cause | None = None
    _why: str = ""
    _ends: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=MAX_REMEMBERED), repr=False)
    """(step, seconds): when steps ended."""

    def on_step(self, step: int, seconds: float) -> None:
        """``step`` steps are done at ``seconds``."""
        self._ends.append((step, seconds))

    def on_interruption(self, cause: Cause, why: str) -> None:
        """Workers end before the run does; ``why`` is said in brackets. Of several in a row the first is told."""
        if cause == "resized":
            self.resizes += 1
        else:
            self.failures += 1
        if self._cause is None:
            self._cause, self._why = cause, why

    def on_start(self, step: int, seconds: float) -> str | None:
        """Workers go on after ``step`` at ``seconds``: if they were interrupted, what that cost, in a line."""
        cause, why = self._cause, self._why
        self._cause, self._why = None, ""
        if cause is None:
            self._ends.append((step, seconds))
            return None
        last_step = max((own for own, _ in self._ends), default=step)
        kept_until = max(
            (at for own, at in self._ends if own <= step), default=self._ends[0][1] if self._ends else seconds
        )
        steps, lost_seconds = max(0, last_step - step), seconds - kept_until
        self.lost_steps += steps
        self.lost_seconds += lost_seconds
        self._ends.clear()
        self._ends.append((step, seconds))
        brackets = f" ({why})" if why else ""
        workers = "" if self.num_workers is None else f" on {self.num_workers} worker(s)"
        verb = {"failed": "workers failed", "preempted": "workers were preempted", "resized": "workers are resized"}[
            cause
        ]
        return (
            f"{verb} at step {last_step}{brackets}; going on after step {step}{workers}: {steps} steps and "
            f"{lost_seconds:.1f} s lost"
        )

    def as_metrics(self) -> dict[str, float]:
        """Totals by name."""
        return {
            "failures/count": self.failures,
            "failures/resizes": self.resizes,
            "failures/lost_steps": self.lost_steps,
            "failures/lost_seconds": round(self.lost_seconds, 3),
        }
