"""What a failed Ray task means for people."""

from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import (
    NodeDiedError,
    OutOfDiskError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from passreid_ray.engines.spill_disk import LIMIT
from passreid_ray.errors import UserError


@contextmanager
def telling_people() -> Iterator[None]:
    """Raise what ``user_error`` has to say of an error of Ray in its place."""
    try:
        yield
    except RayError as error:
        if (told := user_error(error)) is not None:
            raise told from None
        raise


def user_error(error: BaseException) -> UserError | None:
    """What to tell the user of ``error``, without the remote traceback; None for a bug, whose traceback is needed.

    It is the ``UserError`` that caused it, or one that says that a worker died, which Ray reports once retries are
    used up, or that there is no room for its results.
    """
    return users_mistake(error) or _want(error)


def users_mistake(error: BaseException) -> UserError | None:
    """The ``UserError`` that ``error`` is or was caused by, here or in a task, as it was raised there."""
    for link in _chain(error):
        # Ray raises a cross of RayTaskError and the cause's type, which prints the remote traceback.
        if isinstance(link, UserError) and not isinstance(link, RayTaskError):
            return link
    return None


def _want(error: BaseException) -> UserError | None:
    for link in _chain(error):
        match link:
            case OutOfMemoryError():
                return UserError(
                    "a task was ended because its machine ran out of memory, and so were its retries; use machines "
                    "with more memory, or start Ray with fewer --num-cpus, so that fewer tasks run at a time"
                )
            case OutOfDiskError():
                return UserError(
                    "the object store of a machine is full, and so is the disk that Ray moves objects to "
                    f"(that of /tmp/ray, up to the share {LIMIT}, 0.95 where it is not set); make room there, "
                    "start Ray with RAY_TMPDIR on a larger disk, or give it more --object-store-memory"
                )
            case WorkerCrashedError() | NodeDiedError():
                return UserError(
                    "the process of a task died, and so did its retries: out of memory, or brought down by a library "
                    "or a machine; Ray's logs tell more (/tmp/ray/session_latest/logs on the machine where it ran)"
                )
    return None


def _chain(error: BaseException) -> list[BaseException]:
    """``error``, its cause, the cause of that, and so on."""
    chain = [error]
    while True:
        cause = getattr(chain[-1], "cause", None)
        cause = cause if isinstance(cause, BaseException) else chain[-1].__cause__
        if cause is None or cause in chain:
            return chain
        chain.append(cause)
