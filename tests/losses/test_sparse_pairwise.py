import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from passreid_ray.errors import UserError
from passreid_ray.losses.sparse_pairwise import SparsePositive, sparse_pairwise_loss

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "losses.npz", allow_pickle=False)
POSITIVES: tuple[SparsePositive, ...] = get_args(SparsePositive)
GOLDEN_NAMES = {"adaptive": "adasp", "hard": "sp-h", "least_hard": "sp-lh"}
UNEVEN_IDS = [5, 0, 0, 2, 0, 2, 2, 0]  # 5 is alone; of the first four rows two are of id 0, one of id 2
FOUR_IDS_N = torch.arange(4).repeat_interleave(4)


@pytest.mark.parametrize("positive", POSITIVES)
def test_shuffled_rows_keep_the_golden_loss(positive: SparsePositive) -> None:
    # The reference code counts identities only: on this shuffled batch it gives 12.27 in place of 3.85.
    order_N = torch.from_numpy(GOLDEN["shuffle_perm"])
    features_ND, ids_N = torch.from_numpy(GOLDEN["x"]).double(), torch.from_numpy(GOLDEN["y"])
    loss = sparse_pairwise_loss(features_ND[order_N], ids_N[order_N], positive)
    expected = float(GOLDEN[f"adasp/{GOLDEN_NAMES[positive]}_T0.04/loss"])
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert expected != pytest.approx(float(GOLDEN["adasp/adasp_T0.04_shuffled_batch/loss(order-dependent!)"]))


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
def test_opposite_positives_and_a_small_temp_stay_finite(positive: SparsePositive) -> None:
    features_ND = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], requires_grad=True)
    loss = sparse_pairwise_loss(features_ND, torch.tensor([0, 0, 1, 1]), positive, temp=1e-3)
    loss.backward()
    assert features_ND.grad is not None
    assert bool(loss.isfinite() & features_ND.grad.isfinite().all())
    assert loss > 1


def test_positives_and_temps_without_meaning_are_refused() -> None:
    features_ND, ids_N = torch.ones(2, 3), torch.tensor([0, 1])
    with pytest.raises(UserError, match="temp: 0"):
        sparse_pairwise_loss(features_ND, ids_N, temp=0)
    with pytest.raises(UserError, match="choose one of adaptive, hard, least_hard"):
        sparse_pairwise_loss(features_ND, ids_N, "easy")  # pyright: ignore[reportArgumentType]
