"""What holds for every loss that compares features with each other; a loss's own facts are in the file of its name."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from passreid_ray import distributed
from passreid_ray.errors import UserError
from passreid_ray.losses.sparse_pairwise import SparsePositive, sparse_pairwise_loss
from passreid_ray.losses.triplet import TripletDistance, triplet_loss
from tests.ranks import run_on_ranks
from tests.reference.literal_metric_losses import literal_sparse_pairwise, literal_triplet

MetricLoss = Callable[[Tensor, Tensor], Tensor]

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "losses.npz", allow_pickle=False)
UNEVEN_IDS = [5, 0, 0, 2, 0, 2, 2, 0]  # 5 is alone; of the first four rows two are of id 0, one of id 2
TRIPLET_SETTINGS: list[tuple[float | None, bool, TripletDistance]] = [
    (None, False, "euclidean"),
    (0.3, False, "euclidean"),
    (None, True, "euclidean"),
    (0.3, False, "cosine"),
    (None, False, "cosine"),
]
POSITIVES: tuple[SparsePositive, ...] = get_args(SparsePositive)

LOSSES: dict[str, MetricLoss] = {
    f"triplet-{margin}-{normalize}-{distance}": partial(
        triplet_loss, margin=margin, normalize=normalize, distance=distance
    )
    for margin, normalize, distance in TRIPLET_SETTINGS
} | {f"sparse-{positive}": partial(sparse_pairwise_loss, positive=positive, temp=0.1) for positive in POSITIVES}
DEFINITIONS: dict[str, Callable[[Tensor, list[int]], Tensor]] = {
    f"triplet-{margin}-{normalize}-{distance}": partial(
        literal_triplet, margin=margin, normalize=normalize, cosine=distance == "cosine"
    )
    for margin, normalize, distance in TRIPLET_SETTINGS
} | {f"sparse-{positive}": partial(literal_sparse_pairwise, positive=positive, temp=0.1) for positive in POSITIVES}

over_all_losses = pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES)


def gradient(loss_of: MetricLoss, features_ND: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and its gradient to the features."""
    features_ND = features_ND.detach().clone().requires_grad_()
    loss = loss_of(features_ND, ids_N)
    return loss.detach(), torch.autograd.grad(loss, features_ND)[0]


@pytest.mark.parametrize(
    ("name", "loss_of"),
    [
        ("triplet_transreid/marginNone_normFalse", triplet_loss),
        ("triplet_transreid/marginNone_normTrue", partial(triplet_loss, normalize=True)),
        ("triplet_transreid/margin0.3_normFalse", partial(triplet_loss, margin=0.3)),
        ("triplet_transreid/margin0.3_normTrue", partial(triplet_loss, margin=0.3, normalize=True)),
        ("triplet_fastreid/margin0.3_cosFalse_hardTrue", partial(triplet_loss, margin=0.3)),
        ("triplet_fastreid/margin0.3_cosTrue_hardTrue", partial(triplet_loss, margin=0.3, distance="cosine")),
        ("triplet_fastreid/margin0.0_cosFalse_hardTrue", triplet_loss),
        ("triplet_fastreid/margin0.0_cosTrue_hardTrue", partial(triplet_loss, distance="cosine")),
        *(
            (f"adasp/{golden_name}_T{temp}", partial(sparse_pairwise_loss, positive=positive, temp=temp))
            for golden_name, positive in zip(("adasp", "sp-h", "sp-lh"), POSITIVES, strict=True)
            for temp in (0.04, 0.1)
        ),
    ],
)
def test_value_and_gradient_equal_the_reference_implementation(name: str, loss_of: MetricLoss) -> None:
    loss, found_ND = gradient(loss_of, torch.from_numpy(GOLDEN["x"]).double(), torch.from_numpy(GOLDEN["y"]))
    expected_ND = GOLDEN[f"{name}/grad_x"]
    assert loss.item() == pytest.approx(float(GOLDEN[f"{name}/loss"]), rel=1e-6)
    np.testing.assert_allclose(found_ND.numpy(), expected_ND, rtol=0, atol=1e-5 * np.abs(expected_ND).max())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("ids", [UNEVEN_IDS, [0, 1, 2, 3, 4, 5, 6, 7], [1, 1, 1, 1, 1, 1, 1, 0]])
def test_any_grouping_equals_the_definition_pair_by_pair(name: str, ids: list[int]) -> None:
    # The shift makes all features alike: hardest positives are above 0 then, and the alpha of AdaSP takes part. It is a
    # plain number in the definition, so that equal gradients say that none goes through it.
    for shift in (0.0, 2.0):
        features_ND = (torch.randn(8, 5, dtype=torch.float64) + shift).requires_grad_()
        loss, expected = LOSSES[name](features_ND, torch.tensor(ids)), DEFINITIONS[name](features_ND, ids)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            torch.autograd.grad(loss, features_ND), torch.autograd.grad(expected, features_ND), rtol=1e-9, atol=1e-12
        )


@over_all_losses
def test_the_order_of_the_rows_does_not_matter(loss_of: MetricLoss) -> None:
    features_ND, ids_N, order_N = torch.randn(8, 5, dtype=torch.float64), torch.tensor(UNEVEN_IDS), torch.randperm(8)
    loss = loss_of(features_ND, ids_N)
    torch.testing.assert_close(loss_of(features_ND[order_N], ids_N[order_N]), loss)
    assert loss > 0


@over_all_losses
def test_without_a_second_identity_loss_and_gradient_are_zero(loss_of: MetricLoss) -> None:
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        loss, gradient_ND = gradient(loss_of, torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))
    assert loss.item() == 0
    assert torch.equal(gradient_ND, torch.zeros(4, 3))


@over_all_losses
def test_half_precision_is_computed_in_float32_and_double_stays(loss_of: MetricLoss) -> None:
    features_ND, ids_N = torch.randn(8, 5).bfloat16(), torch.tensor(UNEVEN_IDS)
    expected = loss_of(features_ND.float(), ids_N)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(features_ND, ids_N)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert loss_of(features_ND.double(), ids_N).dtype == torch.float64


def losses_and_mean_gradients(inputs_ND: Tensor, weight_DD: Tensor, ids_N: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Per loss: its value on this rank and the gradient that DDP would set."""
    world_size, rank = distributed.world_size(), distributed.rank()
    own_ND, own_N = inputs_ND.chunk(world_size)[rank], ids_N.chunk(world_size)[rank]
    found = {}
    for name, loss_of in LOSSES.items():
        leaf_DD = weight_DD.clone().requires_grad_()
        loss = loss_of(own_ND @ leaf_DD, own_N)
        (gradient_DD,) = torch.autograd.grad(loss, leaf_DD)
        found[name] = (loss.detach(), distributed.all_reduce_mean(gradient_DD))
    return found


def test_two_ranks_that_share_identities_unevenly_equal_one() -> None:
    inputs_ND, weight_DD = torch.randn(8, 5, dtype=torch.float64), torch.randn(5, 5, dtype=torch.float64)
    batch = (inputs_ND, weight_DD, torch.tensor(UNEVEN_IDS))
    expected = losses_and_mean_gradients(*batch)
    for found in run_on_ranks(losses_and_mean_gradients, *batch):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss_of", [triplet_loss, sparse_pairwise_loss])
@pytest.mark.parametrize(
    ("features_ND", "ids_N", "message"),
    [
        (torch.ones(2, 3, 1), torch.tensor([0, 1]), r"features of shape \(2, 3, 1\)"),
        (torch.ones(0, 3), torch.tensor([0, 1])[:0], "both above 0"),
        (torch.ones(2, 3), torch.tensor([0, 1, 2]), "one integer id per row"),
        (torch.ones(2, 3), torch.tensor([0.0, 1.0]), "one integer id per row"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(
    loss_of: MetricLoss, features_ND: Tensor, ids_N: Tensor, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        loss_of(features_ND, ids_N)
