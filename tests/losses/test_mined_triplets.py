import pytest
import torch
from torch import Tensor

from passreid_ray.errors import UserError
from passreid_ray.losses.mined_triplets import ranking_loss


def literal_ranking(query_ND: Tensor, positive_ND: Tensor, negative_ND: Tensor, margin: float) -> Tensor:
    """By cosines: for unit vectors |u - v|^2 = 2 - 2 cos."""
    losses = []
    for query_D, positive_D, negative_D in zip(query_ND, positive_ND, negative_ND, strict=True):
        to_positive = query_D @ positive_D / query_D.norm() / positive_D.norm()
        to_negative = query_D @ negative_D / query_D.norm() / negative_D.norm()
        losses.append((margin / 2 - to_positive + to_negative).clamp(min=0))
    return torch.stack(losses).mean()


def triplets() -> Tensor:
    """Query, positive and negative ``(3, 6, 5)``."""
    return torch.randn(3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def loss_of(triplets_3ND: Tensor, margin: float = 0.1) -> Tensor:
    query_ND, positive_ND, negative_ND = triplets_3ND
    return ranking_loss(query_ND, positive_ND, negative_ND, margin)


@pytest.mark.parametrize("margin", [0.0, 0.1, 1.0])
def test_value_and_gradients_equal_the_definition_row_by_row(margin: float) -> None:
    triplets_3ND = triplets().requires_grad_()
    query_ND, positive_ND, negative_ND = triplets_3ND
    loss, expected = (f(query_ND, positive_ND, negative_ND, margin) for f in (ranking_loss, literal_ranking))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(loss, triplets_3ND), torch.autograd.grad(expected, triplets_3ND), rtol=1e-9, atol=1e-12
    )
    assert loss > 0


def test_equal_features_cost_half_the_margin() -> None:
    features_ND = torch.randn(1, 8).repeat(4, 1)
    assert ranking_loss(features_ND, features_ND, features_ND).item() == pytest.approx(0.05)
    assert ranking_loss(features_ND, 3 * features_ND, features_ND / 7, margin=0.4).item() == pytest.approx(0.2)


def test_a_triplet_beyond_its_margin_has_neither_loss_nor_gradient() -> None:
    query_ND, positive_ND = torch.tensor([[1.0, 0.0]], requires_grad=True), torch.tensor([[2.0, 0.1]])
    loss = ranking_loss(query_ND, positive_ND, torch.tensor([[0.0, 1.0]]))
    loss.backward()
    assert query_ND.grad is not None
    assert loss.item() == 0
    assert not query_ND.grad.any()
    assert ranking_loss(query_ND, torch.tensor([[0.0, 1.0]]), positive_ND).item() > 0.9


def test_six_triplets_one_by_one_accumulate_the_gradient_of_the_batch() -> None:
    triplets_3ND, weight_DD = triplets(), torch.randn(5, 5, dtype=torch.float64)
    batched_DD, accumulated_DD = weight_DD.clone().requires_grad_(), weight_DD.clone().requires_grad_()
    loss_of(triplets_3ND @ batched_DD).backward()
    for triplet_31D in triplets_3ND.split(1, dim=1):
        (loss_of(triplet_31D @ accumulated_DD) / 6).backward()
    assert batched_DD.grad is not None
    assert accumulated_DD.grad is not None
    torch.testing.assert_close(accumulated_DD.grad, batched_DD.grad, rtol=0, atol=1e-15)
    assert bool(batched_DD.grad.any())


def test_the_order_of_the_triplets_does_not_matter() -> None:
    triplets_3ND, order_N = triplets(), torch.randperm(6)
    torch.testing.assert_close(loss_of(triplets_3ND[:, order_N]), loss_of(triplets_3ND))


def test_half_precision_is_computed_in_float32_and_double_stays() -> None:
    triplets_3ND = triplets().bfloat16()
    expected = loss_of(triplets_3ND.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(triplets_3ND)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert loss_of(triplets()).dtype == torch.float64


def test_triplets_and_margins_without_meaning_are_refused() -> None:
    features_ND = torch.ones(2, 3)
    with pytest.raises(UserError, match=r"shapes \(2, 3\), \(1, 3\), \(2, 3\)"):
        ranking_loss(features_ND, features_ND[:1], features_ND)
    with pytest.raises(UserError, match="three times the same"):
        ranking_loss(features_ND[0], features_ND[0], features_ND[0])
    with pytest.raises(UserError, match="both above 0"):
        ranking_loss(features_ND[:0], features_ND[:0], features_ND[:0])
    with pytest.raises(UserError, match="margin: -1"):
        ranking_loss(features_ND, features_ND, features_ND, margin=-1)
