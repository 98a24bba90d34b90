import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from passreid_ray.losses import koleo_loss
from tests.ranks import run_on_ranks


def literal_koleo(features_ND: Tensor) -> Tensor:
    points = normalize(features_ND, dim=-1)
    nearest = [min((points[i] - points[j]).norm() for j in range(len(points)) if j != i) for i in range(len(points))]
    return -torch.stack(nearest).log().mean()


def test_the_loss_is_the_mean_log_distance_to_the_nearest_other_feature() -> None:
    features = torch.randn(9, 4)
    torch.testing.assert_close(koleo_loss(features), literal_koleo(features), rtol=1e-4, atol=1e-5)


def test_features_that_descend_the_loss_spread() -> None:
    features = nn.Parameter(torch.randn(16, 3) * 0.05 + torch.tensor([1.0, 0, 0]))
    optimizer = torch.optim.SGD([features], lr=0.3)
    before = normalize(features.detach(), dim=-1).std(0).mean()
    for _ in range(100):
        optimizer.zero_grad()
        koleo_loss(features).backward()
        optimizer.step()
    assert normalize(features.detach(), dim=-1).std(0).mean() > 3 * before


def test_equal_features_give_a_finite_loss_and_gradient() -> None:
    features = torch.ones(4, 3, requires_grad=True)
    loss = koleo_loss(features)
    loss.backward()
    assert features.grad is not None
    assert bool(loss.isfinite() & features.grad.isfinite().all())


def loss_and_mean_gradient(inputs_ND: Tensor, weight_DD: Tensor) -> tuple[Tensor, Tensor]:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    weight_DD = weight_DD.clone().requires_grad_()
    loss = koleo_loss(inputs_ND.chunk(world_size)[rank] @ weight_DD)
    loss.backward()
    assert weight_DD.grad is not None
    torch.distributed.all_reduce(weight_DD.grad)
    return loss.detach(), weight_DD.grad / world_size


def test_two_ranks_give_the_value_and_the_gradient_of_one() -> None:
    inputs_ND, weight_DD = torch.randn(8, 5), torch.randn(5, 5, requires_grad=True)
    expected = koleo_loss(inputs_ND @ weight_DD)
    expected.backward()
    for loss, gradient in run_on_ranks(loss_and_mean_gradient, inputs_ND, weight_DD.detach()):
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(gradient, weight_DD.grad, rtol=1e-4, atol=1e-6)
