"""The golden batch of the classification losses, and the facts that hold for every one of them.

A loss is given as a function of (features or inputs, classifier weights, ids); `identity_loss` gets its logits here.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from passreid_ray import distributed
from passreid_ray.errors import UserError
from tests.ranks import run_on_ranks

ClassifierLoss = Callable[[Tensor, Tensor, Tensor], Tensor]

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "losses.npz", allow_pickle=False)
TOLERANCE = 1e-5


def batch(
    seed: int, num_rows: int = 8, num_classes: int = 5, width: int = 6, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Features, weights, ids; two of three features lean towards their own class."""
    generator = torch.Generator().manual_seed(seed)
    weights_CD = torch.randn(num_classes, width, generator=generator, dtype=dtype)
    ids_N = torch.randint(num_classes, (num_rows,), generator=generator)
    lean_N1 = torch.randint(3, (num_rows, 1), generator=generator).clamp(max=1)
    return (
        torch.randn(num_rows, width, generator=generator, dtype=dtype) + lean_N1 * weights_CD[ids_N],
        weights_CD,
        ids_N,
    )


def cosines(features_ND: Tensor, weights_CD: Tensor) -> Tensor:
    return F.cosine_similarity(features_ND[:, None], weights_CD[None], dim=2)


def cross_entropy(logits_NC: Tensor, ids_N: Tensor) -> Tensor:
    """Row by row: the log of the sum of exponentials, less the own logit."""
    return torch.stack([row.logsumexp(0) - row[i] for row, i in zip(logits_NC, ids_N.tolist(), strict=True)]).mean()


def gradients(
    loss_of: ClassifierLoss, features_ND: Tensor, weights_CD: Tensor, ids_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its gradient to the features, its gradient to the weights."""
    features_ND, weights_CD = (tensor.detach().clone().requires_grad_() for tensor in (features_ND, weights_CD))
    loss = loss_of(features_ND, weights_CD, ids_N)
    loss.backward()
    assert features_ND.grad is not None
    assert weights_CD.grad is not None
    return loss.detach(), features_ND.grad, weights_CD.grad


def assert_golden(loss_of: ClassifierLoss, name: str) -> None:
    """Loss within 1e-5 of its value; gradients within 1e-5 of the largest golden entry."""
    features_ND, weights_CD, ids_N = (torch.from_numpy(GOLDEN[key]) for key in ("x", "W_CxD", "y_cls"))
    loss, features_grad_ND, weights_grad_CD = gradients(loss_of, features_ND, weights_CD, ids_N)
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(loss.item(), GOLDEN[f"{name}/loss"], rtol=TOLERANCE, atol=0)
    for found, key in ((features_grad_ND, "grad_x"), (weights_grad_CD, "grad_W")):
        expected = GOLDEN[f"{name}/{key}"]
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def assert_gradient_is_that_of_finite_differences(loss_of: ClassifierLoss) -> None:
    for seed in range(3):
        features_ND, weights_CD, ids_N = batch(seed)
        assert torch.autograd.gradcheck(
            lambda rows_ND, classes_CD, ids_N=ids_N: loss_of(rows_ND, classes_CD, ids_N),
            (features_ND.requires_grad_(), weights_CD.requires_grad_()),
        )


def assert_rows_in_any_order_give_the_same_loss(loss_of: ClassifierLoss) -> None:
    features_ND, weights_CD, ids_N = batch(3, num_rows=16)
    order_N = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    expected, features_grad_ND, weights_grad_CD = gradients(loss_of, features_ND, weights_CD, ids_N)
    found = gradients(loss_of, features_ND[order_N], weights_CD, ids_N[order_N])
    torch.testing.assert_close(found, (expected, features_grad_ND[order_N], weights_grad_CD))


def assert_autocast_changes_nothing(loss_of: ClassifierLoss) -> None:
    features_ND, weights_CD, ids_N = batch(4, dtype=torch.float32)
    half_ND = features_ND.bfloat16()
    expected = gradients(loss_of, half_ND.float(), weights_CD, ids_N)

    def under_autocast(features_ND: Tensor, weights_CD: Tensor, ids_N: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_of(features_ND, weights_CD, ids_N)

    loss, features_grad_ND, weights_grad_CD = gradients(under_autocast, half_ND, weights_CD, ids_N)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected[0])
    assert torch.equal(features_grad_ND, expected[1].bfloat16())
    assert torch.equal(weights_grad_CD, expected[2])


def gradients_on_a_shard(
    loss_of: ClassifierLoss, features_ND: Tensor, weights_CD: Tensor, ids_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of this rank's rows, as DDP averages them over ranks."""
    rank, world_size = distributed.rank(), distributed.world_size()
    loss, features_grad_ND, weights_grad_CD = gradients(
        loss_of, features_ND.chunk(world_size)[rank], weights_CD, ids_N.chunk(world_size)[rank]
    )
    return (
        distributed.all_reduce_mean(loss),
        distributed.all_gather(features_grad_ND) / world_size,
        distributed.all_reduce_mean(weights_grad_CD),
    )


def assert_two_ranks_equal_one(loss_of: ClassifierLoss) -> None:
    """``loss_of`` is pickled; the first rank has three identities, the second the two others."""
    features_ND, weights_CD, _ = batch(5, num_rows=12, dtype=torch.float32)
    ids_N = torch.tensor([0, 0, 0, 0, 1, 2, 3, 3, 3, 3, 3, 4])
    expected = gradients(loss_of, features_ND, weights_CD, ids_N)
    for found in run_on_ranks(gradients_on_a_shard, loss_of, features_ND, weights_CD, ids_N):
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def assert_ids_that_do_not_fit_are_refused(loss_of: ClassifierLoss) -> None:
    features_ND, weights_CD = torch.ones(2, 4), torch.eye(3, 4)
    for ids_N, message in (
        (torch.tensor([0, 3]), "id 3 with 3 classes; .* 0..2"),
        (torch.tensor([-1, 0]), "id -1 with 3 classes"),
        (torch.tensor([0, 1, 2]), r"ids of shape \(3,\) .* beside 2 rows"),
        (torch.tensor([[0], [1]]), "one integer id per row"),
        (torch.tensor([0.0, 1.0]), "one integer id per row"),
        (torch.tensor([False, True]), "one integer id per row"),
    ):
        with pytest.raises(UserError, match=message):
            loss_of(features_ND, weights_CD, ids_N)


def assert_shapes_and_settings_that_do_not_fit_are_refused(loss_of: Callable[..., Tensor], margin_end: float) -> None:
    ids_N = torch.tensor([0, 1])
    for features_ND, weights_CD, message in (
        (torch.ones(2, 4), torch.ones(3, 5), "width 4 beside weights of width 5"),
        (torch.ones(2, 4, 1), torch.ones(3, 4), r"features of shape \(2, 4, 1\)"),
        (torch.ones(2, 4), torch.ones(4), r"weights of shape \(4,\)"),
        (torch.ones(0, 4), torch.ones(3, 4), "all above 0"),
        (torch.ones(2, 4), torch.ones(0, 4), "all above 0"),
    ):
        with pytest.raises(UserError, match=message):
            loss_of(features_ND, weights_CD, ids_N)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"scale {scale}"):
            loss_of(torch.ones(2, 4), torch.ones(3, 4), ids_N, scale)
    for margin in (-0.1, margin_end, float("nan")):
        with pytest.raises(UserError, match=f"margin {margin}"):
            loss_of(torch.ones(2, 4), torch.ones(3, 4), ids_N, 1.0, margin)
