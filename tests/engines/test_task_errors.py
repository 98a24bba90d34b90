import pytest
from ray.exceptions import OutOfDiskError, OutOfMemoryError, RayTaskError, WorkerCrashedError

from passreid_ray.engines.task_errors import telling_people, user_error, users_mistake
from passreid_ray.errors import UserError

REMOTE = 'Traceback (most recent call last):\n  File "remote.py", line 3, in task\nUserError: data: gone'


def raised_by_get(cause: Exception) -> RayTaskError:
    """What ``ray.get`` raises when a task raised ``cause``."""
    return RayTaskError("task", REMOTE, cause).as_instanceof_cause()


def test_the_users_mistake_in_a_task_is_told_without_the_remote_traceback() -> None:
    error = raised_by_get(UserError("data: gone"))
    assert isinstance(error, UserError)
    assert "remote.py" in str(error)
    for found in (user_error(error), users_mistake(error)):
        assert str(found) == "data: gone"
        assert type(found) is UserError


def test_the_users_mistake_is_found_behind_other_errors() -> None:
    outer = RuntimeError("worker failed")
    outer.__cause__ = raised_by_get(raised_by_get(UserError("data: gone")))
    assert str(user_error(outer)) == "data: gone"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (WorkerCrashedError(), "the process of a task died, and so did its retries"),
        (OutOfMemoryError("9 GB used\nmany lines"), "its machine ran out of memory, and so were its retries"),
        (OutOfDiskError("no room\nmany lines"), "the object store of a machine is full, and so is the disk"),
    ],
)
def test_a_task_that_died_is_told_in_one_line_and_is_no_mistake_of_the_user(error: Exception, message: str) -> None:
    for seen in (error, raised_by_get(error)):
        said = str(user_error(seen))
        assert message in said
        assert "\n" not in said
        assert users_mistake(seen) is None


def test_an_error_of_ray_is_raised_as_what_people_are_told() -> None:
    with pytest.raises(UserError, match=r"^the object store of a machine is full") as caught, telling_people():
        raise raised_by_get(OutOfDiskError("no room"))
    assert caught.value.__suppress_context__
    with pytest.raises(ZeroDivisionError), telling_people():
        raise raised_by_get(ZeroDivisionError("bug"))
    with pytest.raises(KeyError), telling_people():
        raise KeyError("not of Ray")


def test_a_bug_stays_a_bug() -> None:
    looped = RuntimeError("bug")
    looped.__cause__ = ValueError("below")
    looped.__cause__.__cause__ = looped
    assert user_error(looped) is None
    assert user_error(raised_by_get(ZeroDivisionError("bug"))) is None
