"""Going on from the newest checkpoint that is whole: damaged ones after it are set aside, never deleted.

One process decides, the driver before a run or rank 0 in it, so that none reads what another renames.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from passreid_ray.data.storage import shown
from passreid_ray.errors import UserError
from passreid_ray.train.checkpoints import CheckpointStore
from passreid_ray.train.state_files import DamagedCheckpoint, step_of

T = TypeVar("T")


@dataclass(frozen=True)
class Found(Generic[T]):
    """The newest whole checkpoint, and what stood in its way."""

    name: str
    value: T
    """What was read of it."""
    damaged: Mapping[str, str]
    """Name of each newer checkpoint -> why it is not whole."""


def newest_whole(store: CheckpointStore, read: Callable[[str], T]) -> Found[T] | None:
    """The newest checkpoint that ``read``, given its name, does not refuse as damaged; None where there is none at all.

    Raises ``UserError`` when all are damaged: a run must not start afresh unasked. Nothing is renamed yet.
    """
    damaged: dict[str, str] = {}
    for name in reversed(store.names()):
        try:
            return Found(name, read(name), damaged)
        except DamagedCheckpoint as error:
            damaged[name] = error.reason
    if not damaged:
        return None
    raise UserError(
        f"{shown(store.address)}: none of the {len(damaged)} checkpoint(s) is whole: {'; '.join(damaged.values())}. "
        "Put a copy of one back to go on from it, or give another run.name to start afresh"
    )


def set_damaged_aside(store: CheckpointStore, found: Found[T]) -> list[str]:
    """Rename the damaged checkpoints after ``found``, so that they no longer count; a line to tell of each."""
    return [
        f"{reason}; set aside as {store.set_aside(name)}, going on from step {step_of(found.name)}: "
        f"{step_of(name) - step_of(found.name)} steps are done again"
        for name, reason in found.damaged.items()
    ]
