import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from passreid_ray.losses.am_softmax import am_softmax_loss
from tests.losses import golden_classifier as facts


@pytest.mark.parametrize("name", ["transreid_amsoftmax/s30_m0.3", "transreid_cosface/s30_m0.3"])
def test_loss_and_gradients_equal_the_reference_implementation(name: str) -> None:
    facts.assert_golden(partial(am_softmax_loss, margin=0.3), name)


def test_without_a_margin_it_is_the_cross_entropy_of_scaled_cosines() -> None:
    features_ND, weights_CD, ids_N = facts.batch(0)
    expected = facts.cross_entropy(30 * facts.cosines(features_ND, weights_CD), ids_N)
    torch.testing.assert_close(am_softmax_loss(features_ND, weights_CD, ids_N, margin=0.0), expected)


def test_the_margin_is_taken_from_the_own_cosine_only() -> None:
    features_ND, weights_CD, ids_N = facts.batch(1)
    logits_NC = 12 * facts.cosines(features_ND, weights_CD)
    for row, own in enumerate(ids_N.tolist()):
        logits_NC[row, own] -= 12 * 0.2
    expected = facts.cross_entropy(logits_NC, ids_N)
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
    features_ND, weights_CD, ids_N = facts.batch(2)
    expected = am_softmax_loss(features_ND, weights_CD, ids_N)
    torch.testing.assert_close(am_softmax_loss(features_ND * 10, weights_CD * 0.1, ids_N), expected)


def test_a_larger_margin_costs_more_at_any_margin() -> None:
    features_ND, weights_CD, ids_N = facts.batch(3)
    losses = [am_softmax_loss(features_ND, weights_CD, ids_N, margin=step / 20).item() for step in range(12)]
    assert all(lower < higher for lower, higher in pairwise(losses))


def test_the_gradient_is_that_of_finite_differences() -> None:
    facts.assert_gradient_is_that_of_finite_differences(am_softmax_loss)


def test_rows_in_any_order_give_the_same_loss() -> None:
    facts.assert_rows_in_any_order_give_the_same_loss(am_softmax_loss)


def test_two_ranks_equal_one() -> None:
    facts.assert_two_ranks_equal_one(am_softmax_loss)


def test_half_precision_features_have_a_float32_loss_under_autocast() -> None:
    facts.assert_autocast_changes_nothing(am_softmax_loss)


def test_float64_weights_keep_the_loss_in_float64() -> None:
    features_ND, weights_CD, ids_N = facts.batch(4)
    loss = am_softmax_loss(features_ND.float(), weights_CD, ids_N)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, am_softmax_loss(features_ND.float().double(), weights_CD, ids_N))


def test_input_that_does_not_fit_is_refused() -> None:
    facts.assert_ids_that_do_not_fit_are_refused(am_softmax_loss)
    facts.assert_shapes_and_settings_that_do_not_fit_are_refused(am_softmax_loss, margin_end=math.inf)
