from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from passreid_ray import distributed
from passreid_ray.errors import UserError
from passreid_ray.losses.class_centers import ClassCenters
from tests.ranks import run_on_ranks

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "losses.npz", allow_pickle=False)
UNEVEN_IDS_N = torch.tensor([5, 0, 0, 2, 0, 2, 2, 0])


def centers_at(centers_CD: Tensor, momentum: float = 0.5) -> ClassCenters:
    num_classes, width = centers_CD.shape
    centers = ClassCenters(num_classes, width, momentum).to(centers_CD.dtype)
    centers.load_state_dict({"centers_CD": centers_CD})
    return centers


def test_value_and_gradient_equal_the_reference_implementation() -> None:
    features_ND = torch.from_numpy(GOLDEN["x"]).requires_grad_()
    loss = centers_at(torch.from_numpy(GOLDEN["W_CxD"])).loss(features_ND, torch.from_numpy(GOLDEN["y_cls"]))
    loss.backward()
    assert features_ND.grad is not None
    expected_ND = GOLDEN["center_transreid/grad_x"]
    assert loss.item() == pytest.approx(float(GOLDEN["center_transreid/loss"]), rel=1e-5)
    np.testing.assert_allclose(features_ND.grad.numpy(), expected_ND, rtol=0, atol=1e-5 * np.abs(expected_ND).max())


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_an_update_equals_the_rule_center_by_center(momentum: float) -> None:
    start_CD, features_ND = torch.randn(6, 4, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64)
    centers = centers_at(start_CD, momentum)
    centers.update(features_ND, UNEVEN_IDS_N)
    for person, (center_D, start_D) in enumerate(zip(centers.centers_CD, start_CD, strict=True)):
        own = [features_ND[row] for row, other in enumerate(UNEVEN_IDS_N.tolist()) if other == person]
        delta_D = sum((start_D - feature_D for feature_D in own), torch.zeros(4)) / (1 + len(own))
        torch.testing.assert_close(center_D, start_D - (1 - momentum) * delta_D, rtol=1e-12, atol=1e-12)
        assert torch.equal(center_D, start_D) == (person not in (0, 2, 5))


def test_two_features_move_a_center_by_two_thirds_of_the_way_without_momentum() -> None:
    centers = ClassCenters(2, 1, momentum=0.0)
    centers.update(torch.tensor([[2.0], [4.0]]), torch.tensor([1, 1]))
    torch.testing.assert_close(centers.centers_CD, torch.tensor([[0.0], [2.0]]))


def test_updates_alone_bring_centers_to_the_means() -> None:
    centers, features_ND = ClassCenters(6, 4), torch.randn(8, 4)
    before = centers.loss(features_ND, UNEVEN_IDS_N)
    for _ in range(60):
        centers.update(features_ND, UNEVEN_IDS_N)
    for person in (0, 2, 5):
        own_N = UNEVEN_IDS_N.eq(person)
        torch.testing.assert_close(centers.centers_CD[person], features_ND[own_N].mean(dim=0))
    assert centers.loss(features_ND, UNEVEN_IDS_N) < before


def test_the_order_of_the_rows_does_not_matter() -> None:
    features_ND, order_N = torch.randn(8, 4), torch.randperm(8)
    centers, shuffled = centers_at(torch.ones(6, 4)), centers_at(torch.ones(6, 4))
    expected = centers.loss(features_ND, UNEVEN_IDS_N)
    torch.testing.assert_close(shuffled.loss(features_ND[order_N], UNEVEN_IDS_N[order_N]), expected)
    centers.update(features_ND, UNEVEN_IDS_N)
    shuffled.update(features_ND[order_N], UNEVEN_IDS_N[order_N])
    torch.testing.assert_close(shuffled.centers_CD, centers.centers_CD)


def test_centers_are_a_saved_buffer_outside_autograd() -> None:
    centers = ClassCenters(6, 4)
    centers.update(torch.randn(8, 4, requires_grad=True), UNEVEN_IDS_N)
    assert list(centers.parameters()) == []
    assert not centers.centers_CD.requires_grad
    other = ClassCenters(6, 4)
    other.load_state_dict(centers.state_dict())
    assert torch.equal(other.centers_CD, centers.centers_CD)
    assert bool(other.centers_CD.any())


def step_on_a_shard(
    inputs_ND: Tensor, weight_DD: Tensor, ids_N: Tensor, centers_CD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss on this rank, the gradient that DDP would set, and the centers after the update."""
    world_size, rank = distributed.world_size(), distributed.rank()
    centers, leaf_DD = centers_at(centers_CD), weight_DD.clone().requires_grad_()
    rows_ND, own_N = inputs_ND.chunk(world_size)[rank] @ leaf_DD, ids_N.chunk(world_size)[rank]
    loss = centers.loss(rows_ND, own_N)
    loss.backward()
    centers.update(rows_ND, own_N)
    assert leaf_DD.grad is not None
    return loss.detach(), distributed.all_reduce_mean(leaf_DD.grad), centers.centers_CD


def test_two_ranks_that_share_identities_unevenly_equal_one() -> None:
    batch = (torch.randn(8, 5), torch.randn(5, 4), UNEVEN_IDS_N, torch.randn(6, 4))
    expected = step_on_a_shard(*batch)
    for found in run_on_ranks(step_on_a_shard, *batch):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_half_precision_is_computed_in_float32_and_double_stays() -> None:
    centers, features_ND = centers_at(torch.ones(6, 4)), torch.randn(8, 4).bfloat16()
    expected = centers.loss(features_ND.float(), UNEVEN_IDS_N)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = centers.loss(features_ND, UNEVEN_IDS_N)
        centers.update(features_ND, UNEVEN_IDS_N)
    without_autocast = centers_at(torch.ones(6, 4))
    without_autocast.update(features_ND.float(), UNEVEN_IDS_N)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert torch.equal(centers.centers_CD, without_autocast.centers_CD)
    assert centers.loss(features_ND.double(), UNEVEN_IDS_N).dtype == torch.float64


@pytest.mark.parametrize(
    ("features_ND", "ids_N", "message"),
    [
        (torch.ones(2, 5), torch.tensor([0, 1]), "centers have width 4"),
        (torch.ones(0, 4), torch.tensor([0, 1])[:0], "N above 0"),
        (torch.ones(2, 4), torch.tensor([0, 1, 2]), "one integer id per row"),
        (torch.ones(2, 4), torch.tensor([0.0, 1.0]), "one integer id per row"),
        (torch.ones(2, 4), torch.tensor([0, 6]), "id 6 with 6 classes"),
        (torch.ones(2, 4), torch.tensor([0, -1]), "id -1 with 6 classes"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_and_changes_nothing(
    features_ND: Tensor, ids_N: Tensor, message: str
) -> None:
    centers = ClassCenters(6, 4)
    with pytest.raises(UserError, match=message):
        centers.loss(features_ND, ids_N)
    with pytest.raises(UserError, match=message):
        centers.update(features_ND, ids_N)
    assert not centers.centers_CD.any()


def test_settings_without_meaning_are_refused() -> None:
    with pytest.raises(UserError, match="0 classes of width 4"):
        ClassCenters(0, 4)
    with pytest.raises(UserError, match="momentum: 1"):
        ClassCenters(6, 4, momentum=1)
