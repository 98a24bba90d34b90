"""What a failed Ray task means for people."""

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError

from passreid_ray.errors import UserError


def user_error(error: BaseException) -> UserError | None:
    """What to tell the user of ``error``, without the remote traceback; None for a bug, whose traceback is needed.

    It is the ``UserError`` that caused it, or one that says that a worker died, which Ray reports once retries are
    used up.
    """
    return users_mistake(error) or _death(error)


def users_mistake(error: BaseException) -> UserError | None:
    """The ``UserError`` that ``error`` is or was caused by, here or in a task, as it was raised there."""
    for link in _chain(error):
        # Ray raises a cross of RayTaskError and the cause's type, which prints the remote traceback.
        if isinstance(link, UserError) and not isinstance(link, RayTaskError):
            return link
    return None


def _death(error: BaseException) -> UserError | None:
    for link in _chain(error):
        match link:
            case OutOfMemoryError():
                return UserError(
                    "a task was ended because its machine ran out of memory, and so were its retries; use machines "
                    "with more memory, or start Ray with fewer --num-cpus, so that fewer tasks run at a time"
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
