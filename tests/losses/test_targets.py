import pytest
import torch
from torch import Tensor

from passreid_ray.losses import become_centered_targets, centered_targets, sinkhorn_targets
from tests.ranks import run_on_ranks


def literal_sinkhorn(logits_GBK: Tensor, temp: float) -> Tensor:
    """SwAV's algorithm as its paper writes it: a K x N matrix, rows to 1/K, columns to 1/N, three times."""
    mass_KN = torch.exp(logits_GBK.flatten(0, 1).T / temp)
    mass_KN = mass_KN / mass_KN.sum(dim=0)  # the scale of an image does not matter in the limit; start as ours does
    num_prototypes, num_images = mass_KN.shape
    for _ in range(3):
        for prototype in range(num_prototypes):
            mass_KN[prototype] = mass_KN[prototype] / mass_KN[prototype].sum() / num_prototypes
        for image in range(num_images):
            mass_KN[:, image] = mass_KN[:, image] / mass_KN[:, image].sum() / num_images
    return (mass_KN * num_images).T.unflatten(0, logits_GBK.shape[:2])


def test_sinkhorn_is_the_literal_algorithm() -> None:
    logits = torch.randn(2, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(sinkhorn_targets([logits], 0.3)[0], literal_sinkhorn(logits, 0.3))


def test_sinkhorn_targets_are_distributions_that_use_prototypes_alike() -> None:
    logits = torch.randn(2, 512, 16) + 3 * torch.arange(16) / 16  # a strong common preference
    target = sinkhorn_targets([logits], 0.5)[0]
    torch.testing.assert_close(target.sum(-1), torch.ones(2, 512))
    used_K, plain_K = target.mean((0, 1)) * 16, torch.softmax(logits / 0.5, -1).mean((0, 1)) * 16
    assert float((used_K - 1).abs().max()) < 0.1
    assert float((plain_K - 1).abs().max()) > 1.5


def test_equal_images_get_equal_shares_of_every_prototype() -> None:
    target = sinkhorn_targets([torch.randn(8).expand(2, 3, 8)], 0.04)[0]
    torch.testing.assert_close(target, torch.full((2, 3, 8), 1 / 8))


def test_sharp_sinkhorn_targets_stay_finite() -> None:
    logits = torch.nn.functional.normalize(torch.randn(2, 4, 1000), dim=-1) * 20
    assert bool(sinkhorn_targets([logits], 0.01)[0].isfinite().all())


def sinkhorn_of_shard(logits: Tensor) -> Tensor:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return sinkhorn_targets([logits.chunk(world_size, dim=1)[rank]], 0.1)[0]


def test_two_ranks_give_the_sinkhorn_targets_of_one() -> None:
    logits = torch.randn(2, 6, 8, dtype=torch.float64)
    found = torch.cat(run_on_ranks(sinkhorn_of_shard, logits), dim=1)
    torch.testing.assert_close(found, sinkhorn_targets([logits], 0.1)[0], rtol=1e-12, atol=0)


def test_no_gradient_reaches_the_teacher_or_the_centers() -> None:
    logits, centers_TK = torch.randn(2, 3, 8, requires_grad=True), torch.zeros(1, 8, requires_grad=True)
    assert not centered_targets([logits], centers_TK, 0.04)[0].requires_grad
    assert not sinkhorn_targets([logits], 0.04)[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_centered_targets_are_the_softmax_of_centered_sharpened_logits(dtype: torch.dtype) -> None:
    logits, centers_TK = torch.randn(2, 3, 5000, dtype=dtype), torch.randn(1, 5000, dtype=dtype)
    before = logits.clone()
    exps = ((logits.double() - centers_TK[0].double()) / 0.3).exp()
    target = centered_targets([logits], centers_TK, 0.3)[0]
    torch.testing.assert_close(target, (exps / exps.sum(-1, keepdim=True)).to(dtype))
    assert torch.equal(logits, before)
    in_place = become_centered_targets(logits, centers_TK[0], 0.3)
    assert torch.equal(in_place, target)
    assert in_place.data_ptr() == logits.data_ptr()


def test_sinkhorn_leaves_the_logits_as_they_are() -> None:
    logits = torch.randn(2, 3, 8)
    before = logits.clone()
    sinkhorn_targets([logits], 0.1)
    assert torch.equal(logits, before)


def test_centers_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit centers"):
        centered_targets([torch.zeros(2, 3, 8)], torch.zeros(1, 9), 0.04)
