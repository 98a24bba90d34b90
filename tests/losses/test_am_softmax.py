import math
from itertools import pairwise

import pytest
import torch

from passreid_ray.losses.am_softmax import am_softmax_loss
from tests.losses.classifier_batch import batch, cosines, cross_entropy


def test_without_a_margin_it_is_the_cross_entropy_of_scaled_cosines() -> None:
    features_ND, weights_CD, ids_N = batch(0)
    expected = cross_entropy(30 * cosines(features_ND, weights_CD), ids_N)
    torch.testing.assert_close(am_softmax_loss(features_ND, weights_CD, ids_N, margin=0.0), expected)


def test_the_margin_is_taken_from_the_own_cosine_only() -> None:
    features_ND, weights_CD, ids_N = batch(1)
    logits_NC = 12 * cosines(features_ND, weights_CD)
    for row, own in enumerate(ids_N.tolist()):
        logits_NC[row, own] -= 12 * 0.2
    expected = cross_entropy(logits_NC, ids_N)
    torch.testing.assert_close(am_softmax_loss(features_ND, weights_CD, ids_N, 12.0, 0.2), expected)


def test_features_on_four_orthogonal_weights_have_the_smallest_loss_there_is() -> None:
    loss = am_softmax_loss(2 * torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64), torch.arange(4))
    assert loss.item() == pytest.approx(1.019e-8, rel=1e-3)
    assert loss.item() == pytest.approx(math.log1p(3 * math.exp(-19.5)), rel=1e-6)


@pytest.mark.parametrize(("margin", "expected"), [(0.35, 17.1201), (0.0, 6.6214)])
def test_features_at_right_angles_to_751_classes_cost_what_the_margin_costs(margin: float, expected: float) -> None:
    features_ND = torch.tensor([[0.0, 0.0, 3.0], [0.0, 0.0, -1.0]])
    weights_CD = torch.cat([torch.randn(751, 2), torch.zeros(751, 1)], dim=1)
    loss = am_softmax_loss(features_ND, weights_CD, torch.tensor([0, 750]), margin=margin)
    assert loss.item() == pytest.approx(expected, abs=1e-4)


def test_the_lengths_of_features_and_weights_do_not_matter() -> None:
    features_ND, weights_CD, ids_N = batch(2)
    expected = am_softmax_loss(features_ND, weights_CD, ids_N)
    torch.testing.assert_close(am_softmax_loss(features_ND * 10, weights_CD * 0.1, ids_N), expected)


def test_a_larger_margin_costs_more_at_any_margin() -> None:
    features_ND, weights_CD, ids_N = batch(3)
    losses = [am_softmax_loss(features_ND, weights_CD, ids_N, margin=step / 20).item() for step in range(12)]
    assert all(lower < higher for lower, higher in pairwise(losses))
