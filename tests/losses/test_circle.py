import math
from functools import partial

import pytest
import torch
from torch import Tensor

from passreid_ray.losses.circle import circle_loss
from tests.losses.classifier_batch import batch, cosines, cross_entropy, gradients


def literal_weights(cosine_NC: Tensor, ids_N: Tensor, margin: float) -> Tensor:
    weights = [
        [max(1 + margin - cosine, 0) if person == own else max(cosine + margin, 0) for person, cosine in enumerate(row)]
        for row, own in zip(cosine_NC.tolist(), ids_N.tolist(), strict=True)
    ]
    return torch.tensor(weights, dtype=cosine_NC.dtype)


def loss_with_given_weights(
    features_ND: Tensor, weights_CD: Tensor, ids_N: Tensor, weight_NC: Tensor, scale: float, margin: float
) -> Tensor:
    boundary_NC = torch.full_like(weight_NC, margin)
    boundary_NC[range(len(ids_N)), ids_N.tolist()] = 1 - margin
    return cross_entropy(scale * weight_NC * (cosines(features_ND, weights_CD) - boundary_NC), ids_N)


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_that_of_finite_differences_with_the_weights_held(seed: int) -> None:
    features_ND, weights_CD, ids_N = batch(seed)
    weight_NC = literal_weights(cosines(features_ND, weights_CD), ids_N, 0.25)

    def held(features_ND: Tensor, weights_CD: Tensor) -> Tensor:
        return loss_with_given_weights(features_ND, weights_CD, ids_N, weight_NC, 16.0, 0.25)

    loss, *found = gradients(partial(circle_loss, scale=16.0), features_ND, weights_CD, ids_N)
    torch.testing.assert_close(loss, held(features_ND, weights_CD))
    flat = torch.cat([features_ND.flatten(), weights_CD.flatten()])
    for entry, slope in enumerate(torch.cat([gradient.flatten() for gradient in found]).tolist()):
        step = torch.zeros_like(flat)
        step[entry] = 1e-6
        ahead, behind = (
            held(moved[: features_ND.numel()].view_as(features_ND), moved[features_ND.numel() :].view_as(weights_CD))
            for moved in (flat + step, flat - step)
        )
        assert slope == pytest.approx((ahead - behind).item() / 2e-6, rel=1e-4, abs=1e-7)


def test_features_on_orthogonal_weights_win_by_twice_the_squared_margin() -> None:
    loss = circle_loss(torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64), torch.arange(4))
    assert loss.item() == pytest.approx(math.log1p(3 * math.exp(-2 * 64 * 0.25**2)), rel=1e-9)


def test_classes_farther_than_the_margin_behind_a_right_angle_are_left_alone() -> None:
    weights_CD = torch.tensor([[1.0, 0.0, 0.0], [0.2, 1.0, 0.0], [-0.3, 0.0, 0.5], [-0.1, 0.0, 0.5]])
    _, _, gradient_CD = gradients(circle_loss, torch.tensor([[1.0, 0.0, 0.0]]), weights_CD, torch.tensor([0]))
    assert gradient_CD[2].tolist() == [0.0, 0.0, 0.0]  # cosine -0.51
    assert gradient_CD[3].abs().sum() > 0  # cosine -0.20
