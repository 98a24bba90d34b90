from typing import Any

import pytest
import ray

from passreid_ray.engines.row_blocks import RowBlocks
from passreid_ray.errors import UserError
from tests.engines.test_task_errors import raised_by_get


def blocks(num_rows: int) -> RowBlocks:
    return RowBlocks(num_rows, None, lambda *_: None)


def test_few_rows_are_one_block_in_this_process() -> None:
    assert blocks(5).collect("sum", lambda rows, values: sum(values[rows]), [1, 2, 3, 4, 5]) == [15]


@pytest.mark.parametrize("cause", [UserError("shard: damaged"), ZeroDivisionError("bug")])
def test_a_mistake_of_the_user_in_a_task_is_one_line_and_a_bug_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, cause: Exception
) -> None:
    error = raised_by_get(cause)

    def get(reference: Any) -> Any:
        raise error

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(type(cause)) as caught:
        blocks(5).read(ray.ObjectRef(bytes(28)))
    if isinstance(cause, UserError):
        assert str(caught.value) == "shard: damaged"
    else:
        assert "remote.py" in str(caught.value)
