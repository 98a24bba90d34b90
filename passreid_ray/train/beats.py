"""What workers tell of how they get on, and the newest of it, as the run's board keeps it."""

import time
from dataclasses import dataclass

from passreid_ray.train.pulse import Phase


@dataclass(frozen=True)
class WorkerProcess:
    """Where a worker is."""

    rank: int
    node_id: str
    address: str
    pid: int
    created_seconds: float
    """When it began, by its machine's clock: a later process may have the same pid."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.address} (pid {self.pid})"


@dataclass(frozen=True)
class Beat:
    """How a worker gets on."""

    process: WorkerProcess
    phase: Phase
    first_step: int
    """Steps that the run had done when the workers began, on rank 0; elsewhere 0."""
    steps: int
    """Steps since."""
    still_seconds: float
    """Time since it last got on."""
    place: str
    """The line of this package where it is."""
    waits_for_others: bool
    """Whether that line is inside a collective, a backward pass or a report."""
    stacks: str = ""
    """Python stacks of all threads, once it has been still for a while."""


@dataclass(frozen=True)
class Heard:
    """A beat, and how long ago it was heard."""

    beat: Beat
    silent_seconds: float

    @property
    def still_seconds(self) -> float:
        """Time since the worker last got on, as far as is known."""
        return self.beat.still_seconds + self.silent_seconds


class Beats:
    """Keeps the newest beat of every rank of the group of workers that was heard last."""

    def __init__(self) -> None:
        self._heard: dict[int, tuple[Beat, float]] = {}

    def add(self, beat: Beat) -> None:
        """Keep ``beat``."""
        rank = beat.process.rank
        if rank in self._heard and self._heard[rank][0].process != beat.process:
            self._heard.clear()  # the workers were started again
        self._heard[rank] = (beat, time.monotonic())

    def end(self, process: WorkerProcess) -> None:
        """No more will come of ``process``, and none are missed."""
        rank = process.rank
        if rank in self._heard and self._heard[rank][0].process == process:
            del self._heard[rank]

    def forget(self) -> None:
        """Miss nobody; whoever beats again is heard again."""
        self._heard.clear()

    def read(self) -> list[Heard]:
        """What was heard, by rank."""
        now = time.monotonic()
        return [Heard(beat, now - when) for _, (beat, when) in sorted(self._heard.items())]
