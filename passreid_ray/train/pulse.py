"""What this process is doing and when it last got on, for those who look for workers that hang.

Code that trains says so as it goes: ``get_on`` after a piece of work, ``doing`` around what is no step. Each costs less
than a microsecond, and nothing where nobody looks.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

PhaseKind = Literal["step", "work", "others", "task"]
"""step: must end within the time limit. work: the same, but computing counts as getting on. others: waits for other
workers, whose limit counts. task: waits for a Ray task or actor, which Ray watches; it may last."""


@dataclass(frozen=True)
class Phase:
    """What a worker does, in words that go after "it is"."""

    words: str
    kind: PhaseKind


STARTING = Phase("starting", "work")
STEP = Phase("in a step", "step")
DATA = Phase("waiting for data", "step")
CHECKPOINT = Phase("saving a checkpoint", "work")
EVALUATION = Phase("evaluating", "work")
LABELS = Phase("making features and clusters", "work")
LABELS_OF_RANK_0 = Phase("waiting for the clusters of rank 0", "others")
MINING = Phase("waiting for mined triplets", "task")


class Pulse:
    """Phase, steps and the last time that this process got on; written by the thread that trains, read by others."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Training begins now."""
        self.phase = STARTING
        self.first_step = 0
        """Steps that the run had done before; rank 0 alone knows."""
        self.steps = 0
        """Steps since."""
        self.last_seconds = time.monotonic()

    def get_on(self) -> None:
        """Note that a piece of work is done."""
        self.last_seconds = time.monotonic()

    def count_step(self) -> None:
        """Note that a step is done."""
        self.steps += 1
        self.last_seconds = time.monotonic()

    @contextlib.contextmanager
    def doing(self, phase: Phase, then: Phase | None = None) -> Iterator[None]:
        """Inside, the process does ``phase``; afterwards ``then``, or what it did before."""
        then = then or self.phase
        self.phase = phase
        self.last_seconds = time.monotonic()
        try:
            yield
        finally:
            self.phase = then
            self.last_seconds = time.monotonic()


pulse = Pulse()
"""This process's own: it has one thread that trains."""
