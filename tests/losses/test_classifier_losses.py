"""What holds for every loss of an identity classifier; what is a loss's own is in the file of its name."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from passreid_ray import distributed
from passreid_ray.errors import UserError
from passreid_ray.losses.am_softmax import am_softmax_loss
from passreid_ray.losses.arcface import arcface_loss, updated_curriculum
from passreid_ray.losses.circle import circle_loss
from passreid_ray.losses.cosface import cosface_loss
from passreid_ray.losses.identity import identity_loss
from tests.losses.classifier_batch import ClassifierLoss, batch, gradients
from tests.ranks import run_on_ranks

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "losses.npz", allow_pickle=False)


def linear_identity_loss(inputs_ND: Tensor, weights_CD: Tensor, ids_N: Tensor, label_smoothing: float = 0.1) -> Tensor:
    return identity_loss(inputs_ND @ weights_CD.T, ids_N, label_smoothing=label_smoothing)


MARGIN_LOSSES: dict[str, ClassifierLoss] = {
    "am_softmax": am_softmax_loss,
    "cosface": cosface_loss,
    "arcface": arcface_loss,
    "curricular": partial(arcface_loss, curriculum=torch.tensor(0.3)),
    "circle": circle_loss,
}
LOSSES: dict[str, ClassifierLoss] = {"identity": linear_identity_loss, **MARGIN_LOSSES}

over_all_losses = pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES)
over_margin_losses = pytest.mark.parametrize("loss_of", MARGIN_LOSSES.values(), ids=MARGIN_LOSSES)


@pytest.mark.parametrize(
    ("name", "loss_of"),
    [
        ("ce", partial(linear_identity_loss, label_smoothing=0.0)),
        ("ce_labelsmooth_transreid_e0.1", linear_identity_loss),
        ("ce_labelsmooth2_transreid_e0.1", linear_identity_loss),
        ("transreid_amsoftmax/s30_m0.3", partial(am_softmax_loss, margin=0.3)),
        ("transreid_cosface/s30_m0.3", partial(am_softmax_loss, margin=0.3)),
        ("transreid_cosface/s30_m0.3", partial(cosface_loss, scale=30.0, margin=0.3)),
        ("fastreid_CosSoftmax/s64_m0.35", cosface_loss),
        ("transreid_arcface/s30_m0.3", partial(arcface_loss, margin=0.3)),
        ("transreid_arcface/s30_m0.5", arcface_loss),
        ("fastreid_ArcSoftmax/s64_m0.5", partial(arcface_loss, scale=64.0)),
        ("transreid_circle/s256_m0.25", partial(circle_loss, scale=256.0)),
        ("transreid_circle/s64_m0.25", circle_loss),
        ("fastreid_CircleSoftmax/s64_m0.25", circle_loss),
    ],
)
def test_loss_and_gradients_equal_the_reference_implementation(name: str, loss_of: ClassifierLoss) -> None:
    features_ND, weights_CD, ids_N = (torch.from_numpy(GOLDEN[key]) for key in ("x", "W_CxD", "y_cls"))
    loss, *found = gradients(loss_of, features_ND, weights_CD, ids_N)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(float(GOLDEN[f"{name}/loss"]), rel=1e-5)
    for gradient, key in zip(found, ("grad_x", "grad_W"), strict=True):
        expected = GOLDEN[f"{name}/{key}"]
        np.testing.assert_allclose(gradient.numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# Circle loss takes no gradient through its weights: its own test holds them.
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "circle"])
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_that_of_finite_differences(name: str, seed: int) -> None:
    features_ND, weights_CD, ids_N = batch(seed)
    assert torch.autograd.gradcheck(
        lambda rows_ND, classes_CD: LOSSES[name](rows_ND, classes_CD, ids_N),
        (features_ND.requires_grad_(), weights_CD.requires_grad_()),
    )


@over_all_losses
def test_rows_in_any_order_give_the_same_loss(loss_of: ClassifierLoss) -> None:
    features_ND, weights_CD, ids_N = batch(3, num_rows=16)
    order_N = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    loss, features_grad_ND, weights_grad_CD = gradients(loss_of, features_ND, weights_CD, ids_N)
    found = gradients(loss_of, features_ND[order_N], weights_CD, ids_N[order_N])
    torch.testing.assert_close(found, (loss, features_grad_ND[order_N], weights_grad_CD))


@over_margin_losses
def test_half_precision_features_have_a_float32_loss_under_autocast(loss_of: ClassifierLoss) -> None:
    features_ND, weights_CD, ids_N = batch(4, dtype=torch.float32)
    half_ND = features_ND.bfloat16()
    expected, features_grad_ND, weights_grad_CD = gradients(loss_of, half_ND.float(), weights_CD, ids_N)

    def under_autocast(features_ND: Tensor, weights_CD: Tensor, ids_N: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_of(features_ND, weights_CD, ids_N)

    loss, *found = gradients(under_autocast, half_ND, weights_CD, ids_N)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert torch.equal(found[0], features_grad_ND.bfloat16())
    assert torch.equal(found[1], weights_grad_CD)


@over_margin_losses
def test_float64_weights_keep_the_loss_in_float64(loss_of: ClassifierLoss) -> None:
    features_ND, weights_CD, ids_N = batch(4)
    loss = loss_of(features_ND.float(), weights_CD, ids_N)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, loss_of(features_ND.float().double(), weights_CD, ids_N))


def results_of_all_ranks(features_ND: Tensor, weights_CD: Tensor, ids_N: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """Per loss: its value and its gradients from this rank's rows, as DDP averages them over ranks; the next t."""
    rank, world_size = distributed.rank(), distributed.world_size()
    own_ND, own_N = features_ND.chunk(world_size)[rank], ids_N.chunk(world_size)[rank]
    found: dict[str, tuple[Tensor, ...]] = {
        "t": (updated_curriculum(torch.tensor(0.1), own_ND, weights_CD, own_N, momentum=0.3),)
    }
    for name, loss_of in LOSSES.items():
        loss, features_grad_ND, weights_grad_CD = gradients(loss_of, own_ND, weights_CD, own_N)
        found[name] = (
            distributed.all_reduce_mean(loss),
            distributed.all_gather(features_grad_ND) / world_size,
            distributed.all_reduce_mean(weights_grad_CD),
        )
    return found


def test_losses_and_curriculum_of_two_ranks_equal_those_of_one() -> None:
    features_ND, weights_CD, _ = batch(5, num_rows=12)
    ids_N = torch.tensor([0, 0, 0, 0, 1, 2, 3, 3, 3, 3, 3, 4])  # three identities on the first rank, two on the second
    expected = results_of_all_ranks(features_ND, weights_CD, ids_N)
    for found in run_on_ranks(results_of_all_ranks, features_ND, weights_CD, ids_N):
        torch.testing.assert_close(found, expected)


@over_all_losses
def test_ids_that_do_not_fit_are_refused(loss_of: ClassifierLoss) -> None:
    for ids_N, message in (
        (torch.tensor([0, 3]), "id 3 with 3 classes; .* 0..2"),
        (torch.tensor([-1, 0]), "id -1 with 3 classes"),
        (torch.tensor([0, 1, 2]), r"ids of shape \(3,\) .* beside 2 rows"),
        (torch.tensor([[0], [1]]), "one integer id per row"),
        (torch.tensor([0.0, 1.0]), "one integer id per row"),
        (torch.tensor([False, True]), "one integer id per row"),
    ):
        with pytest.raises(UserError, match=message):
            loss_of(torch.ones(2, 4), torch.eye(3, 4), ids_N)


@over_margin_losses
def test_shapes_that_do_not_fit_are_refused(loss_of: ClassifierLoss) -> None:
    for features_ND, weights_CD, message in (
        (torch.ones(2, 4), torch.ones(3, 5), "width 4 beside weights of width 5"),
        (torch.ones(2, 4, 1), torch.ones(3, 4), r"features of shape \(2, 4, 1\)"),
        (torch.ones(2, 4), torch.ones(4), r"weights of shape \(4,\)"),
        (torch.ones(0, 4), torch.ones(3, 4), r"features of shape \(0, 4\).* both above 0"),
        (torch.ones(2, 4), torch.ones(0, 4), r"weights of shape \(0, 4\).* both above 0"),
    ):
        with pytest.raises(UserError, match=message):
            loss_of(features_ND, weights_CD, torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("loss_of", "margin_end"),
    [(am_softmax_loss, math.inf), (cosface_loss, math.inf), (arcface_loss, math.pi), (circle_loss, 1)],
)
def test_scales_and_margins_without_meaning_are_refused(loss_of: Callable[..., Tensor], margin_end: float) -> None:
    batch = (torch.ones(2, 4), torch.ones(3, 4), torch.tensor([0, 1]))
    for scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match=f"scale {scale}"):
            loss_of(*batch, scale)
    for margin in (-0.1, margin_end, math.nan):
        with pytest.raises(UserError, match=f"margin {margin}"):
            loss_of(*batch, 1.0, margin)
