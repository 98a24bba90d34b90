import torch
import torch.distributed as dist
from torch import Tensor

from passreid_ray import distributed
from tests.ranks import run_on_ranks


def rank_and_size() -> tuple[int, int, bool]:
    return distributed.rank(), distributed.world_size(), distributed.is_active()


def sum_and_mean(rows_ND: Tensor) -> tuple[Tensor, Tensor]:
    own_ND = rows_ND.chunk(distributed.world_size())[distributed.rank()]
    return distributed.all_reduce_sum(own_ND), distributed.all_reduce_mean(own_ND)


def gradient_of_a_shared_loss(rows_ND: Tensor) -> Tensor:
    """Every rank computes the same loss from the mean over all rows; the gradient of its own rows."""
    own_ND = rows_ND.chunk(distributed.world_size())[distributed.rank()].clone().requires_grad_()
    mean_D = distributed.all_reduce_mean(own_ND.mean(0))
    (mean_D.pow(3).sum() / distributed.world_size()).backward()
    assert own_ND.grad is not None
    return own_ND.grad


def gathered(rows_ND: Tensor) -> tuple[Tensor, bool]:
    own_ND = rows_ND.chunk(distributed.world_size())[distributed.rank()].requires_grad_()
    rows_ND = distributed.all_gather(own_ND.t().contiguous().t())
    return rows_ND, rows_ND.requires_grad


def gathered_places() -> list[str]:
    return distributed.all_gather_objects(f"rank {distributed.rank()}")


def barrier_then_count() -> int:
    distributed.barrier()
    return dist.get_world_size()


def test_without_a_process_group_everything_is_the_identity() -> None:
    rows_ND = torch.randn(4, 3)
    assert rank_and_size() == (0, 1, False)
    assert torch.equal(distributed.all_reduce_sum(rows_ND), rows_ND)
    assert torch.equal(distributed.all_reduce_mean(rows_ND), rows_ND)
    assert torch.equal(distributed.all_gather(rows_ND), rows_ND)
    distributed.barrier()


def test_one_rank_alone_needs_no_collectives() -> None:
    assert run_on_ranks(rank_and_size, world_size=1) == [(0, 1, False)]


def test_ranks_know_their_place() -> None:
    assert run_on_ranks(rank_and_size) == [(0, 2, True), (1, 2, True)]


def test_sum_and_mean_are_those_over_all_ranks() -> None:
    rows_ND = torch.randn(4, 3)
    for total, mean in run_on_ranks(sum_and_mean, rows_ND):
        torch.testing.assert_close(total, rows_ND[:2] + rows_ND[2:])
        torch.testing.assert_close(mean, (rows_ND[:2] + rows_ND[2:]) / 2)


def test_the_gradient_through_a_mean_over_ranks_is_that_of_one_process() -> None:
    rows_ND = torch.randn(4, 3, dtype=torch.float64)
    whole_ND = rows_ND.clone().requires_grad_()
    whole_ND.mean(0).pow(3).sum().backward()
    torch.testing.assert_close(torch.cat(run_on_ranks(gradient_of_a_shared_loss, rows_ND)), whole_ND.grad)


def test_rows_are_gathered_in_rank_order_without_gradient() -> None:
    rows_ND = torch.randn(6, 3)
    for got_ND, requires_grad in run_on_ranks(gathered, rows_ND):
        assert torch.equal(got_ND, rows_ND)
        assert not requires_grad


def test_objects_are_gathered_in_rank_order() -> None:
    assert run_on_ranks(gathered_places) == [["rank 0", "rank 1"]] * 2
    assert gathered_places() == ["rank 0"]


def agreed_places(failing: int | None) -> list[str]:
    def work() -> str:
        if distributed.rank() == failing:
            raise OSError(28, "No space left on device")
        return f"rank {distributed.rank()}"

    try:
        return distributed.agreed(work)
    except OSError as error:
        return [str(error)]


def test_what_fails_on_one_rank_fails_on_all_and_none_waits() -> None:
    assert run_on_ranks(agreed_places, None) == [["rank 0", "rank 1"]] * 2
    assert run_on_ranks(agreed_places, 1) == [["[Errno 28] No space left on device"]] * 2
    assert agreed_places(None) == ["rank 0"]
    assert agreed_places(0) == ["[Errno 28] No space left on device"]


def test_ranks_meet_at_a_barrier() -> None:
    assert run_on_ranks(barrier_then_count) == [2, 2]
