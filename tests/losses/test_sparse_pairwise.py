import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from passreid_ray import distributed
from passreid_ray.errors import UserError
from passreid_ray.losses.sparse_pairwise import SparsePositive, sparse_pairwise_loss
from tests.ranks import run_on_ranks
from tests.reference.literal_metric_losses import literal_sparse_pairwise

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "losses.npz", allow_pickle=False)
POSITIVES: tuple[SparsePositive, ...] = get_args(SparsePositive)
GOLDEN_NAMES = {"adaptive": "adasp", "hard": "sp-h", "least_hard": "sp-lh"}
UNEVEN_IDS = [5, 0, 0, 2, 0, 2, 2, 0]  # 5 is alone; of the first four rows two are of id 0, one of id 2
FOUR_IDS_N = torch.arange(4).repeat_interleave(4)


@pytest.mark.parametrize("temp", [0.04, 0.1])
@pytest.mark.parametrize("positive", POSITIVES)
def test_value_and_gradient_equal_the_reference_implementation(positive: SparsePositive, temp: float) -> None:
    golden_name = f"adasp/{GOLDEN_NAMES[positive]}_T{temp}"
    features_ND = torch.from_numpy(GOLDEN["x"]).double().requires_grad_()
    loss = sparse_pairwise_loss(features_ND, torch.from_numpy(GOLDEN["y"]), positive, temp)
    loss.backward()
    assert features_ND.grad is not None
    expected_ND = GOLDEN[f"{golden_name}/grad_x"]
    assert loss.item() == pytest.approx(float(GOLDEN[f"{golden_name}/loss"]), rel=1e-6)
    np.testing.assert_allclose(features_ND.grad.numpy(), expected_ND, rtol=0, atol=1e-5 * np.abs(expected_ND).max())


@pytest.mark.parametrize("positive", POSITIVES)
def test_the_order_of_the_rows_does_not_matter(positive: SparsePositive) -> None:
    # The reference code counts identities only: on this shuffled batch it gives 12.27 in place of 3.85.
    order_N = torch.from_numpy(GOLDEN["shuffle_perm"])
    features_ND, ids_N = torch.from_numpy(GOLDEN["x"]).double(), torch.from_numpy(GOLDEN["y"])
    loss = sparse_pairwise_loss(features_ND[order_N], ids_N[order_N], positive)
    expected = float(GOLDEN[f"adasp/{GOLDEN_NAMES[positive]}_T0.04/loss"])
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert expected != pytest.approx(float(GOLDEN["adasp/adasp_T0.04_shuffled_batch/loss(order-dependent!)"]))


@pytest.mark.parametrize("positive", POSITIVES)
@pytest.mark.parametrize("ids", [UNEVEN_IDS, [0, 1, 2, 3, 4, 5, 6, 7], [1, 1, 1, 1, 1, 1, 1, 0]])
@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_any_grouping_equals_the_definition_pair_by_pair(
    ids: list[int], positive: SparsePositive, shift: float
) -> None:
    # The shift makes all features alike: hardest positives are above 0 then, and alpha takes part. Alpha is a plain
    # number in the definition, so that equal gradients say that none goes through it.
    features_ND = (torch.randn(8, 5, dtype=torch.float64) + shift).requires_grad_()
    loss = sparse_pairwise_loss(features_ND, torch.tensor(ids), positive, 0.1)
    expected = literal_sparse_pairwise(features_ND, ids, positive, 0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(loss, features_ND), torch.autograd.grad(expected, features_ND), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("positive", ["hard", "least_hard"])
def test_the_gradient_is_that_of_finite_differences(positive: SparsePositive) -> None:
    features_ND = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda rows_ND: sparse_pairwise_loss(rows_ND, torch.tensor(UNEVEN_IDS), positive, 0.1), features_ND
    )


def test_no_gradient_goes_through_alpha() -> None:
    features_ND = (torch.randn(6, 5, dtype=torch.float64) * 0.3 + 1).requires_grad_()
    ids_N = torch.tensor([0, 0, 0, 1, 1, 1])
    (gradient_ND,) = torch.autograd.grad(sparse_pairwise_loss(features_ND, ids_N, temp=0.1), features_ND)

    def loss_at(step: float) -> float:
        return sparse_pairwise_loss((features_ND - step * gradient_ND).detach(), ids_N, temp=0.1).item()

    # The slope that the loss has with alpha free is another one.
    slope = (loss_at(-1e-6) - loss_at(1e-6)) / 2e-6
    assert slope != pytest.approx(gradient_ND.square().sum().item(), rel=1e-3)


@pytest.mark.parametrize(("positive", "expected"), [("hard", 6.6451), ("least_hard", 3.8918), ("adaptive", 6.4825)])
def test_the_loss_of_equal_features_is_that_of_counting_pairs(positive: SparsePositive, expected: float) -> None:
    features_ND = torch.randn(1, 8).repeat(16, 1).requires_grad_()
    loss = sparse_pairwise_loss(features_ND, FOUR_IDS_N, positive)
    loss.backward()
    assert features_ND.grad is not None
    assert loss.item() == pytest.approx(expected, abs=1e-4)
    assert bool(features_ND.grad.isfinite().all())
    match positive:
        case "hard":
            assert loss.item() == pytest.approx(math.log1p(3 * 4**4), rel=1e-6)
        case "least_hard":
            assert loss.item() == pytest.approx(math.log1p(3 * 4**2), rel=1e-6)
        case "adaptive":
            hard = 1 - 0.04 * math.log(16)
            alpha = 2 * hard / (hard + 1)  # S_lh is 1
            assert loss.item() == pytest.approx(math.log1p(3 * 4**2 * 16**alpha), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("positive", "expected"), [("hard", 1.0666e-8), ("least_hard", 6.666e-10)])
def test_collapsed_orthogonal_identities_keep_their_tiny_loss(
    positive: SparsePositive, expected: float, dtype: torch.dtype
) -> None:
    loss = sparse_pairwise_loss(torch.eye(4, dtype=dtype)[FOUR_IDS_N], FOUR_IDS_N, positive)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_the_positive_of_collapsed_orthogonal_identities_is_the_known_one() -> None:
    features_ND = torch.eye(4, dtype=torch.float64)[FOUR_IDS_N]
    log_negatives = math.log(3 * 4 * 4)  # pairs of cosine 0

    def positive_of(positive: SparsePositive) -> float:
        return 0.04 * (log_negatives - math.log(math.expm1(sparse_pairwise_loss(features_ND, FOUR_IDS_N, positive))))

    hard, least_hard, adaptive = (positive_of(positive) for positive in ("hard", "least_hard", "adaptive"))
    assert hard == pytest.approx(0.88910, abs=5e-6)
    assert least_hard == pytest.approx(1.0, abs=1e-9)
    assert (least_hard - adaptive) / (least_hard - hard) == pytest.approx(0.9413, abs=5e-5)  # alpha


@pytest.mark.parametrize("positive", POSITIVES)
def test_without_a_second_identity_loss_and_gradient_are_zero(positive: SparsePositive) -> None:
    features_ND = torch.randn(4, 3, requires_grad=True)
    loss = sparse_pairwise_loss(features_ND, torch.zeros(4, dtype=torch.int64), positive)
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        loss.backward()
    assert features_ND.grad is not None
    assert loss.item() == 0
    assert torch.equal(features_ND.grad, torch.zeros(4, 3))


@pytest.mark.parametrize("positive", POSITIVES)
def test_opposite_positives_and_a_small_temp_stay_finite(positive: SparsePositive) -> None:
    features_ND = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], requires_grad=True)
    loss = sparse_pairwise_loss(features_ND, torch.tensor([0, 0, 1, 1]), positive, temp=1e-3)
    loss.backward()
    assert features_ND.grad is not None
    assert bool(loss.isfinite() & features_ND.grad.isfinite().all())
    assert loss > 1


def losses_and_mean_gradients(inputs_ND: Tensor, weight_DD: Tensor, ids_N: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Loss on this rank and the gradient that DDP would set, per positive."""
    world_size, rank = distributed.world_size(), distributed.rank()
    found = []
    for positive in POSITIVES:
        leaf_DD = weight_DD.clone().requires_grad_()
        rows_ND = inputs_ND.chunk(world_size)[rank] @ leaf_DD
        loss = sparse_pairwise_loss(rows_ND, ids_N.chunk(world_size)[rank], positive)
        loss.backward()
        assert leaf_DD.grad is not None
        found.append((loss.detach(), distributed.all_reduce_mean(leaf_DD.grad)))
    return found


def test_two_ranks_that_share_identities_unevenly_equal_one() -> None:
    batch = (torch.randn(8, 5), torch.randn(5, 5), torch.tensor(UNEVEN_IDS))
    expected = losses_and_mean_gradients(*batch)
    for found in run_on_ranks(losses_and_mean_gradients, *batch):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_half_precision_is_computed_in_float32_and_double_stays() -> None:
    features_ND, ids_N = torch.randn(8, 5).bfloat16(), torch.tensor(UNEVEN_IDS)
    expected = sparse_pairwise_loss(features_ND.float(), ids_N)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = sparse_pairwise_loss(features_ND, ids_N)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert sparse_pairwise_loss(features_ND.double(), ids_N).dtype == torch.float64


def test_batches_and_settings_without_meaning_are_refused() -> None:
    features_ND, ids_N = torch.ones(2, 3), torch.tensor([0, 1])
    with pytest.raises(UserError, match=r"features of shape \(2, 3, 1\)"):
        sparse_pairwise_loss(features_ND[..., None], ids_N)
    with pytest.raises(UserError, match="both above 0"):
        sparse_pairwise_loss(features_ND[:0], ids_N[:0])
    with pytest.raises(UserError, match="one integer id per feature"):
        sparse_pairwise_loss(features_ND, torch.tensor([0, 1, 2]))
    with pytest.raises(UserError, match="one integer id per feature"):
        sparse_pairwise_loss(features_ND, torch.tensor([0.0, 1.0]))
    with pytest.raises(UserError, match="temp: 0"):
        sparse_pairwise_loss(features_ND, ids_N, temp=0)
    with pytest.raises(UserError, match="choose one of adaptive, hard, least_hard"):
        sparse_pairwise_loss(features_ND, ids_N, "easy")  # pyright: ignore[reportArgumentType]
