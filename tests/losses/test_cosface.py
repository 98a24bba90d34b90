import math
from functools import partial

import pytest
import torch

from passreid_ray.losses.cosface import cosface_loss
from tests.losses import golden_classifier as facts


@pytest.mark.parametrize(
    ("name", "scale", "margin"),
    [("fastreid_CosSoftmax/s64_m0.35", 64.0, 0.35), ("transreid_cosface/s30_m0.3", 30.0, 0.3)],
)
def test_loss_and_gradients_equal_the_reference_implementation(name: str, scale: float, margin: float) -> None:
    facts.assert_golden(partial(cosface_loss, scale=scale, margin=margin), name)


def test_by_default_features_opposite_to_their_class_cost_64_times_1_and_the_margin() -> None:
    loss = cosface_loss(torch.eye(4, dtype=torch.float64), -torch.eye(4, dtype=torch.float64), torch.arange(4))
    assert loss.item() == pytest.approx(64 * 1.35 + math.log(3 + math.exp(-64 * 1.35)), rel=1e-12)


def test_the_gradient_is_that_of_finite_differences() -> None:
    facts.assert_gradient_is_that_of_finite_differences(cosface_loss)


def test_rows_in_any_order_give_the_same_loss() -> None:
    facts.assert_rows_in_any_order_give_the_same_loss(cosface_loss)


def test_two_ranks_equal_one() -> None:
    facts.assert_two_ranks_equal_one(cosface_loss)


def test_half_precision_features_have_a_float32_loss_under_autocast() -> None:
    facts.assert_autocast_changes_nothing(cosface_loss)


def test_input_that_does_not_fit_is_refused() -> None:
    facts.assert_ids_that_do_not_fit_are_refused(cosface_loss)
    facts.assert_shapes_and_settings_that_do_not_fit_are_refused(cosface_loss, margin_end=math.inf)
