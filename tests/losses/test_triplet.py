import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from passreid_ray import distributed
from passreid_ray.errors import UserError
from passreid_ray.losses.triplet import TripletDistance, triplet_loss
from tests.ranks import run_on_ranks
from tests.reference.literal_metric_losses import literal_triplet

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "losses.npz", allow_pickle=False)
UNEVEN_IDS = [5, 0, 0, 2, 0, 2, 2, 0]  # 5 is alone; of the first four rows two are of id 0, one of id 2
SETTINGS: list[tuple[float | None, bool, TripletDistance]] = [
    (None, False, "euclidean"),
    (0.3, False, "euclidean"),
    (None, True, "euclidean"),
    (0.3, False, "cosine"),
    (None, False, "cosine"),
]


@pytest.mark.parametrize(
    ("golden_name", "margin", "normalize", "distance"),
    [
        ("triplet_transreid/marginNone_normFalse", None, False, "euclidean"),
        ("triplet_transreid/marginNone_normTrue", None, True, "euclidean"),
        ("triplet_transreid/margin0.3_normFalse", 0.3, False, "euclidean"),
        ("triplet_transreid/margin0.3_normTrue", 0.3, True, "euclidean"),
        ("triplet_fastreid/margin0.3_cosFalse_hardTrue", 0.3, False, "euclidean"),
        ("triplet_fastreid/margin0.3_cosTrue_hardTrue", 0.3, False, "cosine"),
        ("triplet_fastreid/margin0.0_cosFalse_hardTrue", None, False, "euclidean"),
        ("triplet_fastreid/margin0.0_cosTrue_hardTrue", None, False, "cosine"),
    ],
)
def test_value_and_gradient_equal_the_reference_implementations(
    golden_name: str, margin: float | None, normalize: bool, distance: TripletDistance
) -> None:
    features_ND = torch.from_numpy(GOLDEN["x"]).requires_grad_()
    loss = triplet_loss(features_ND, torch.from_numpy(GOLDEN["y"]), margin, normalize, distance=distance)
    loss.backward()
    assert features_ND.grad is not None
    expected_ND = GOLDEN[f"{golden_name}/grad_x"]
    assert loss.item() == pytest.approx(float(GOLDEN[f"{golden_name}/loss"]), rel=1e-5)
    np.testing.assert_allclose(features_ND.grad.numpy(), expected_ND, rtol=0, atol=1e-5 * np.abs(expected_ND).max())


@pytest.mark.parametrize(("margin", "normalize", "distance"), SETTINGS)
@pytest.mark.parametrize("ids", [UNEVEN_IDS, [0, 1, 2, 3, 4, 5, 6, 7], [1, 1, 1, 1, 1, 1, 1, 0]])
def test_any_grouping_equals_the_definition_anchor_by_anchor(
    ids: list[int], margin: float | None, normalize: bool, distance: TripletDistance
) -> None:
    features_ND = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    loss = triplet_loss(features_ND, torch.tensor(ids), margin, normalize, distance=distance)
    expected = literal_triplet(features_ND, ids, margin, normalize, distance == "cosine")
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(loss, features_ND), torch.autograd.grad(expected, features_ND), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_the_order_of_the_rows_does_not_matter(distance: TripletDistance) -> None:
    features_ND, ids_N = torch.randn(8, 5, dtype=torch.float64), torch.tensor(UNEVEN_IDS)
    order_N = torch.randperm(8)
    loss = triplet_loss(features_ND, ids_N, distance=distance)
    torch.testing.assert_close(triplet_loss(features_ND[order_N], ids_N[order_N], distance=distance), loss)
    assert loss > 0


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


def test_without_a_second_identity_loss_and_gradient_are_zero() -> None:
    for margin in (None, 0.3):
        features_ND = torch.randn(4, 3, requires_grad=True)
        loss = triplet_loss(features_ND, torch.zeros(4, dtype=torch.int64), margin)
        loss.backward()
        assert features_ND.grad is not None
        assert loss.item() == 0
        assert torch.equal(features_ND.grad, torch.zeros(4, 3))


def losses_and_mean_gradients(inputs_ND: Tensor, weight_DD: Tensor, ids_N: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Loss on this rank and the gradient that DDP would set, per setting."""
    world_size, rank = distributed.world_size(), distributed.rank()
    found = []
    for margin, normalize, distance in SETTINGS:
        leaf_DD = weight_DD.clone().requires_grad_()
        rows_ND = inputs_ND.chunk(world_size)[rank] @ leaf_DD
        loss = triplet_loss(rows_ND, ids_N.chunk(world_size)[rank], margin, normalize, distance=distance)
        loss.backward()
        assert leaf_DD.grad is not None
        found.append((loss.detach(), distributed.all_reduce_mean(leaf_DD.grad)))
    return found


def test_two_ranks_that_share_identities_unevenly_equal_one() -> None:
    batch = (torch.randn(8, 5), torch.randn(5, 5), torch.tensor(UNEVEN_IDS))
    expected = losses_and_mean_gradients(*batch)
    for found in run_on_ranks(losses_and_mean_gradients, *batch):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_half_precision_is_computed_in_float32_and_double_stays() -> None:
    features_ND, ids_N = torch.randn(8, 5).bfloat16(), torch.tensor(UNEVEN_IDS)
    expected = triplet_loss(features_ND.float(), ids_N)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = triplet_loss(features_ND, ids_N)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert triplet_loss(features_ND.double(), ids_N).dtype == torch.float64


def test_batches_and_settings_without_meaning_are_refused() -> None:
    features_ND, ids_N = torch.ones(2, 3), torch.tensor([0, 1])
    with pytest.raises(UserError, match=r"features of shape \(2, 3, 1\)"):
        triplet_loss(features_ND[..., None], ids_N)
    with pytest.raises(UserError, match="both above 0"):
        triplet_loss(features_ND[:0], ids_N[:0])
    with pytest.raises(UserError, match="one integer id per feature"):
        triplet_loss(features_ND, torch.tensor([0, 1, 2]))
    with pytest.raises(UserError, match="one integer id per feature"):
        triplet_loss(features_ND, torch.tensor([0.0, 1.0]))
    with pytest.raises(UserError, match=r"margin: -0\.1"):
        triplet_loss(features_ND, ids_N, -0.1)
    with pytest.raises(UserError, match="choose one of euclidean, cosine"):
        triplet_loss(features_ND, ids_N, distance="manhattan")  # pyright: ignore[reportArgumentType]
