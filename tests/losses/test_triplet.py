import math

import pytest
import torch

from passreid_ray.errors import UserError
from passreid_ray.losses.triplet import TripletDistance, triplet_loss


@pytest.mark.parametrize(("margin", "expected"), [(None, math.log(2)), (0.3, 0.3), (0.0, 0.0)])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_equal_features_cost_the_margin_and_have_a_finite_gradient(
    margin: float | None, expected: float, distance: TripletDistance
) -> None:
    features_ND = (100 * torch.randn(1, 64)).repeat(4, 1).requires_grad_()
    loss = triplet_loss(features_ND, torch.tensor([0, 0, 1, 1]), margin, distance=distance)
    loss.backward()
    assert features_ND.grad is not None
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(features_ND.grad, torch.zeros(4, 64))


def test_near_features_are_told_apart() -> None:
    # Terms of a^2 + b^2 - 2ab are 1e6 here, which float32 holds to 0.06; the true distances are 0.001 and 0.002.
    point_D = torch.full((64,), 125.0)
    features_ND = torch.stack([point_D, point_D, point_D])
    features_ND[1, 0] += 2**-10
    features_ND[2, 0] += 2**-9
    # d_ap - d_an per anchor, in 2^-10: 1 - 2, 1 - 1, 0 - 1; then 2 - 1, 0 - 1, 2 - 1
    assert triplet_loss(features_ND, torch.tensor([0, 0, 1]), 0.0).item() == 0
    assert triplet_loss(features_ND, torch.tensor([0, 1, 0]), 0.0).item() == pytest.approx(2 / 3 * 2**-10)


def test_margins_and_distances_without_meaning_are_refused() -> None:
    features_ND, ids_N = torch.ones(2, 3), torch.tensor([0, 1])
    with pytest.raises(UserError, match=r"margin: -0\.1"):
        triplet_loss(features_ND, ids_N, -0.1)
    with pytest.raises(UserError, match="choose one of euclidean, cosine"):
        triplet_loss(features_ND, ids_N, distance="manhattan")  # pyright: ignore[reportArgumentType]
