import pytest
import torch
from torch import Tensor

from passreid_ray.losses import updated_centers
from tests.ranks import run_on_ranks


def center_of_shard(teacher_TGBK: Tensor) -> Tensor:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return updated_centers(torch.zeros(3, 8), list(teacher_TGBK.chunk(world_size, dim=2)[rank]), 0.9)


def test_from_zero_a_tenth_of_the_batch_mean_is_taken() -> None:
    teacher_TGBK = torch.randn(3, 2, 5, 8)
    found_TK = updated_centers(torch.zeros(3, 8), list(teacher_TGBK), 0.9)
    torch.testing.assert_close(found_TK, 0.1 * teacher_TGBK.flatten(1, 2).mean(1))


@pytest.mark.parametrize("world_size", [2, 3])
def test_centers_are_the_mean_over_all_ranks_and_equal_on_each(world_size: int) -> None:
    teacher_TGBK = torch.randn(3, 2, 6, 8)
    found = run_on_ranks(center_of_shard, teacher_TGBK, world_size=world_size)
    for found_TK in found:
        torch.testing.assert_close(found_TK, 0.1 * teacher_TGBK.flatten(1, 2).mean(1), rtol=1e-6, atol=1e-7)
        assert torch.equal(found_TK, found[0])


def test_old_centers_are_kept_by_momentum_and_not_changed_in_place() -> None:
    centers_TK = torch.randn(1, 8)
    before = centers_TK.clone()
    found_TK = updated_centers(centers_TK, [torch.zeros(2, 4, 8)], 0.75)
    torch.testing.assert_close(found_TK, 0.75 * before)
    assert torch.equal(centers_TK, before)


def test_half_precision_logits_are_averaged_in_the_centers_precision() -> None:
    logits = (torch.rand(2, 64, 8) + 5).bfloat16().requires_grad_()
    found_TK = updated_centers(torch.zeros(1, 8), [logits], 0.0)
    assert found_TK.dtype == torch.float32
    assert not found_TK.requires_grad
    torch.testing.assert_close(found_TK[0].double(), logits.double().mean((0, 1)).detach(), rtol=1e-6, atol=0)


def test_another_number_of_prototypes_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        updated_centers(torch.zeros(1, 1), [torch.zeros(2, 4, 8)], 0.9)
