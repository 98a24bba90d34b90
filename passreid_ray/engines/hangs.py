"""Which worker hangs, judged by the beats of all, and the words for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from passreid_ray.train.beats import Heard
from passreid_ray.train.pulse import STEP

SILENT_SHARE = 0.5
"""Of the limit: a worker that was last heard of so long ago does not answer. Beats come several times as often."""


@dataclass(frozen=True)
class Hang:
    """No worker gets on, because of ``culprits``."""

    culprits: tuple[Heard, ...]
    """One, or all those that do not answer."""
    are_silent: bool
    """Whether the culprits do not answer."""
    workers: tuple[Heard, ...]
    """All of them, by rank."""
    step: int
    """Steps that the run has done."""


def find_hang(heard: Sequence[Heard], hang_seconds: float) -> Hang | None:
    """The hang of workers of which none has got on for ``hang_seconds``; None as long as one has, or may take longer.

    Workers wait for each other, so one that hangs stops all. Those that do not answer are to blame; else the one that
    does not wait for the others, and of several the one that is furthest behind.
    """
    if not heard or any(worker.still_seconds < hang_seconds for worker in heard):
        return None
    silent = tuple(worker for worker in heard if worker.silent_seconds >= SILENT_SHARE * hang_seconds)
    if any(worker.beat.phase.kind == "task" and worker not in silent for worker in heard):
        return None
    culprits = silent or (min(heard, key=_innocence),)
    step = max(worker.beat.first_step for worker in heard) + max(worker.beat.steps for worker in heard)
    return Hang(culprits, bool(silent), tuple(heard), step)


def _innocence(worker: Heard) -> tuple[int, int, float]:
    """Higher for a worker that is less likely to hold up the others."""
    beat = worker.beat
    waits = beat.phase.kind == "others" or beat.waits_for_others
    # Inside a step a GPU may wait for the others where Python does not see it.
    return 2 if waits else int(beat.phase == STEP), beat.steps, -worker.still_seconds


def hang_line(hang: Hang, culprit: Heard, state: str, stacks_file: str, outcome: str) -> str:
    """A line for people: who hangs, for how long, where, and what becomes of it.

    ``state``: what its machine says of a process that does not answer.
    """
    beat = culprit.beat
    where = f"{beat.phase.words}, at {beat.place}" if beat.place else beat.phase.words
    if hang.are_silent:
        found = f"it has not answered for {culprit.silent_seconds:.0f} s ({state}). When last heard of it was {where}"
    else:
        found = f"no progress for {culprit.still_seconds:.0f} s. It is {where}"
    return f"{beat.process} hangs after step {hang.step}: {found}. All stacks are in {stacks_file}. {outcome}"


def stacks_text(hang: Hang, seen: Mapping[int, str]) -> str:
    """The stacks of all workers. ``seen``: by rank, those that were read from outside."""
    names = " and ".join(str(worker.beat.process) for worker in hang.culprits)
    parts = [f"After step {hang.step} no worker gets on, held up by {names}.\n"]
    for worker in hang.workers:
        beat, rank = worker.beat, worker.beat.process.rank
        waits = ", where it waits for the others" if beat.waits_for_others else ""
        parts.append(f"== {beat.process}")
        if rank in seen:
            parts.append(f"has not answered for {worker.silent_seconds:.0f} s; as read from outside:\n\n{seen[rank]}")
        if beat.stacks or rank not in seen:
            parts.append(
                f"as it said {worker.silent_seconds:.0f} s ago: {beat.phase.words}{waits}, no progress for "
                f"{beat.still_seconds:.0f} s\n\n{beat.stacks}"
            )
    return "\n".join(parts)
