import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_on_ranks


def rank_and_sum(number: int) -> tuple[int, int]:
    total = torch.tensor(number + dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def fail_on_last_rank() -> None:
    assert dist.get_rank() + 1 < dist.get_world_size(), "the last rank fails"


@pytest.mark.parametrize("world_size", [1, 3])
def test_results_come_in_rank_order(world_size: int) -> None:
    total = 10 * world_size + sum(range(world_size))
    assert run_on_ranks(rank_and_sum, 10, world_size=world_size) == [(rank, total) for rank in range(world_size)]


def test_an_error_on_one_rank_reaches_the_test() -> None:
    with pytest.raises(Exception, match="the last rank fails"):
        run_on_ranks(fail_on_last_rank)
