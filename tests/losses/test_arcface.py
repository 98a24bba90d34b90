import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from passreid_ray.errors import UserError
from passreid_ray.losses.arcface import arcface_loss, updated_curriculum
from tests.losses.classifier_batch import batch, cosines, gradients


def literal_arcface(
    features_ND: Tensor, weights_CD: Tensor, ids_N: Tensor, scale: float, margin: float, t: float | None = None
) -> float:
    """Angle by angle; with ``t`` CurricularFace's treatment of the negatives above the own logit."""
    total = 0.0
    for row, own in zip(cosines(features_ND, weights_CD).tolist(), ids_N.tolist(), strict=True):
        angle = math.acos(row[own])
        beyond = angle + margin > math.pi
        own_logit = row[own] - margin * math.sin(margin) if beyond else math.cos(angle + margin)
        logits = [c if t is None or c <= own_logit else c * (t + c) for c in row]
        logits[own] = own_logit
        total += math.log(sum(math.exp(scale * (logit - own_logit)) for logit in logits))
    return total / len(ids_N)


@pytest.mark.parametrize("t", [None, 0.0, 0.4])
@pytest.mark.parametrize("margin", [0.0, 0.5, 2.0])
def test_the_loss_equals_its_formula_written_out_angle_by_angle(margin: float, t: float | None) -> None:
    features_ND, weights_CD, ids_N = batch(0, num_rows=40)
    curriculum = None if t is None else torch.tensor(t)
    expected = literal_arcface(features_ND, weights_CD, ids_N, 8.0, margin, t)
    found = arcface_loss(features_ND, weights_CD, ids_N, 8.0, margin, curriculum=curriculum)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_the_loss_rises_with_the_angle_from_0_to_pi() -> None:
    weights_CD = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    losses = []
    for angle in torch.linspace(0, math.pi, 181, dtype=torch.float64):
        feature_1D = torch.stack([angle.cos(), angle.sin(), torch.zeros_like(angle)])[None]
        losses.append(arcface_loss(feature_1D, weights_CD, torch.tensor([0])).item())
    assert all(nearer < farther for nearer, farther in pairwise(losses))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("curriculum", [None, torch.tensor(0.3)])
def test_gradients_are_finite_where_a_feature_lies_on_its_class_or_opposite(
    dtype: torch.dtype, curriculum: Tensor | None
) -> None:
    _, weights_CD, _ = batch(1, num_classes=200, width=7, dtype=dtype)
    on_ND, ids_N = torch.cat([weights_CD, torch.eye(7, dtype=dtype)]), torch.arange(207)
    weights_CD = on_ND.clone()
    for sign, own_logit in ((1, math.cos(0.5)), (-1, -1 - 0.5 * math.sin(0.5))):
        loss, *grads = gradients(partial(arcface_loss, curriculum=curriculum), sign * on_ND, weights_CD, ids_N)
        assert loss.isfinite()
        assert all(bool(grad.isfinite().all()) for grad in grads)
        assert all(grad.norm(dim=1).max() < 1e3 for grad in grads)
        single = arcface_loss(sign * torch.eye(1, 2, dtype=dtype), torch.eye(2, dtype=dtype), torch.tensor([0]))
        assert single.item() == pytest.approx(math.log1p(math.exp(-30 * own_logit)), rel=1e-5, abs=1e-11)


def test_features_that_descend_the_loss_are_nearer_to_their_class_by_more_than_the_margin() -> None:
    features_ND, weights_CD, ids_N = batch(2, dtype=torch.float32)
    rows, own = range(len(ids_N)), ids_N.tolist()

    def angle_ahead_of_the_next_class(features_ND: Tensor) -> Tensor:
        angle_NC = cosines(features_ND, weights_CD).acos()
        own_N = angle_NC[rows, own]
        angle_NC[rows, own] = math.inf
        return angle_NC.amin(dim=1) - own_N

    features = torch.nn.Parameter(torch.nn.functional.normalize(features_ND, dim=1))
    assert angle_ahead_of_the_next_class(features.detach()).min() < 0
    optimizer = torch.optim.SGD([features], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        arcface_loss(features, weights_CD, ids_N, margin=0.3).backward()
        optimizer.step()
    assert angle_ahead_of_the_next_class(features.detach()).min() > 0.3


def test_a_curriculum_that_is_further_on_makes_hard_negatives_cost_more() -> None:
    features_ND, weights_CD, ids_N = batch(3)
    features_ND = weights_CD[(ids_N + 1) % 5] + 0.1 * features_ND  # every row is nearest to another's class
    losses = [
        arcface_loss(features_ND, weights_CD, ids_N, curriculum=torch.tensor(t)).item() for t in (0.0, 0.3, 0.6, 0.9)
    ]
    assert losses == sorted(set(losses))


def test_the_curriculum_takes_a_hundredth_of_the_mean_own_cosine() -> None:
    features_ND, weights_CD, ids_N = batch(4)
    own_N = cosines(features_ND, weights_CD)[range(len(ids_N)), ids_N.tolist()]
    first = updated_curriculum(torch.zeros(()), features_ND.requires_grad_(), weights_CD, ids_N)
    assert first.shape == ()
    assert first.dtype == torch.float32
    assert not first.requires_grad
    assert first.item() == pytest.approx(0.01 * own_N.mean().item(), rel=1e-5)
    second = updated_curriculum(first, features_ND, weights_CD, ids_N, momentum=0.5)
    assert second.item() == pytest.approx(0.5 * first.item() + 0.5 * own_N.mean().item(), rel=1e-5)


def test_the_curriculum_takes_no_gradient() -> None:
    features_ND, weights_CD, ids_N = batch(5)
    curriculum = torch.tensor(0.2, requires_grad=True)
    arcface_loss(features_ND.requires_grad_(), weights_CD, ids_N, curriculum=curriculum).backward()
    assert curriculum.grad is None


def test_the_curriculum_of_an_id_without_a_class_is_refused() -> None:
    with pytest.raises(UserError, match="id 3 with 3 classes"):
        updated_curriculum(torch.zeros(()), torch.ones(1, 4), torch.eye(3, 4), torch.tensor([3]))
