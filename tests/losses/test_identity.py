import math

import pytest
import torch

from passreid_ray.errors import UserError
from passreid_ray.losses.identity import identity_loss
from tests.losses.classifier_batch import batch


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_the_loss_equals_its_formula_written_out(label_smoothing: float) -> None:
    features_ND, weights_CD, ids_N = batch(0)
    logits = (features_ND @ weights_CD.T).tolist()
    num_classes, total = len(weights_CD), 0.0
    for row, own in zip(logits, ids_N.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(logit) for logit in row))
        for person, logit in enumerate(row):
            target = (1 - label_smoothing) * (person == own) + label_smoothing / num_classes
            total -= target * (logit - log_sum) / len(logits)
    found = identity_loss(features_ND @ weights_CD.T, ids_N, label_smoothing=label_smoothing)
    assert found.item() == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_equal_logits_cost_the_log_of_the_number_of_classes(label_smoothing: float) -> None:
    loss = identity_loss(torch.full((3, 751), 2.0), torch.tensor([0, 5, 750]), label_smoothing=label_smoothing)
    assert loss.item() == pytest.approx(math.log(751), rel=1e-6)


def test_with_smoothing_more_certainty_ends_up_costing_more() -> None:
    own_logits = (0.0, 2.0, 50.0)
    plain, smooth = (
        [
            identity_loss(torch.tensor([[logit, 0.0, 0.0]]), torch.tensor([0]), label_smoothing=smoothing).item()
            for logit in own_logits
        ]
        for smoothing in (0.0, 0.1)
    )
    assert plain[0] > plain[1] > plain[2]
    assert smooth[1] < smooth[0] < smooth[2]


def test_half_precision_logits_have_a_float32_loss_under_autocast() -> None:
    logits_NC, ids_N = torch.randn(6, 9).bfloat16(), torch.arange(6)
    expected = identity_loss(logits_NC.float(), ids_N, label_smoothing=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = identity_loss(logits_NC, ids_N, label_smoothing=0.1)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("shape", [(2,), (2, 3, 1), (0, 3), (2, 0)])
def test_logits_that_are_not_rows_by_classes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"give \(N, C\), both above 0"):
        identity_loss(torch.zeros(shape), torch.tensor([0, 1]))


@pytest.mark.parametrize("label_smoothing", [-0.1, 1.1, math.nan])
def test_smoothing_that_is_no_fraction_is_refused(label_smoothing: float) -> None:
    with pytest.raises(UserError, match="label_smoothing"):
        identity_loss(torch.zeros(1, 2), torch.tensor([0]), label_smoothing=label_smoothing)
