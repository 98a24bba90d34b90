import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from passreid_ray.losses import become_centered_targets, masked_patch_entropy, masked_patch_loss, sinkhorn_targets
from passreid_ray.losses.centers import updated_centers
from tests.ranks import run_on_ranks
from tests.reference.literal_masked_patches import literal_masked_patch_loss

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.05
PATCHES_OF_VIEWS = (5, 1, 12, 3)
WIDTH, NUM_PROTOTYPES = 8, 33


def random_tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=dtype)


Case = tuple[list[Tensor], Tensor, Tensor]
"""Features, ``weight_v`` and ``weight_g``, which need a gradient; the teacher's logits; its center."""


def random_case(dtype: torch.dtype = torch.float64) -> Case:
    rows = sum(PATCHES_OF_VIEWS)
    features_MD = F.normalize(random_tensor(rows, WIDTH, dtype=dtype), dim=-1)
    weight_v_KD = random_tensor(NUM_PROTOTYPES, WIDTH, dtype=dtype)
    weight_g_K1 = 0.5 + random_tensor(NUM_PROTOTYPES, 1, dtype=dtype).abs()
    leaves = [own.requires_grad_() for own in (features_MD, weight_v_KD, weight_g_K1)]
    center_K = 0.3 * random_tensor(NUM_PROTOTYPES, dtype=dtype)
    return leaves, 0.3 * random_tensor(rows, NUM_PROTOTYPES, seed=1, dtype=dtype), center_K


def weights_of(patches_of_views: tuple[int, ...]) -> Tensor:
    weights = [1 / (patches * len(PATCHES_OF_VIEWS)) for patches in patches_of_views for _ in range(patches)]
    return torch.tensor(weights, dtype=torch.float64)


def literal(case: Case) -> Tensor:
    (features_MD, weight_v_KD, weight_g_K1), teacher_MK, center_K = case
    prototypes_KD = weight_g_K1 * weight_v_KD / weight_v_KD.square().sum(dim=1, keepdim=True).sqrt()
    student, teacher = (own.split(PATCHES_OF_VIEWS) for own in (features_MD @ prototypes_KD.T, teacher_MK))
    return literal_masked_patch_loss(student, teacher, center_K, STUDENT_TEMP, TEACHER_TEMP)


def ours(case: Case, chunk_rows: int = 128) -> Tensor:
    leaves, teacher_MK, center_K = case
    targets_MK = become_centered_targets(teacher_MK.clone(), center_K, TEACHER_TEMP)
    weights_M = weights_of(PATCHES_OF_VIEWS)
    features_MD, weight_v_KD, weight_g_K1 = leaves
    return masked_patch_loss(
        features_MD,
        weight_v_KD,
        weight_g_K1,
        targets_MK,
        weights_M,
        student_temp=STUDENT_TEMP,
        chunk_rows=chunk_rows,
    )


def assert_same(found: Tensor, expected: Tensor, leaves: list[Tensor], tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    for own, wanted in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert (own - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("chunk_rows", [1, 4, 7, 128])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_value_and_gradients_are_those_of_the_loops(chunk_rows: int, dtype: torch.dtype, tolerance: float) -> None:
    case = random_case(dtype)
    found = ours(case, chunk_rows)
    assert found.dtype == dtype
    assert_same(found, literal(case), case[0], tolerance)


def test_without_lengths_prototypes_have_length_one() -> None:
    (features_MD, weight_v_KD, weight_g_K1), teacher_MK, center_K = random_case()
    with torch.no_grad():
        weight_g_K1.fill_(1)
    targets_MK = become_centered_targets(teacher_MK.clone(), center_K, TEACHER_TEMP)
    weights_M = weights_of(PATCHES_OF_VIEWS)
    found = masked_patch_loss(features_MD, weight_v_KD, None, targets_MK, weights_M, student_temp=STUDENT_TEMP)
    expected = literal(([features_MD, weight_v_KD, weight_g_K1], teacher_MK, center_K))
    assert_same(found, expected, [features_MD, weight_v_KD], 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float32(dtype: torch.dtype) -> None:
    case = random_case(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        found = ours(case)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, literal(case), rtol=2e-3, atol=0)
    wanted = torch.autograd.grad(literal(case), case[0])
    for own, exact in zip(torch.autograd.grad(found, case[0]), wanted, strict=True):
        assert (own - exact).norm() < 0.03 * exact.norm()


def no_rows() -> tuple[Tensor, list[Tensor]]:
    _, weight_v_KD, weight_g_K1 = random_case()[0]
    leaves = [torch.zeros(0, WIDTH, dtype=torch.float64, requires_grad=True), weight_v_KD, weight_g_K1]
    targets_MK = torch.zeros(0, NUM_PROTOTYPES, dtype=torch.float64)
    loss = masked_patch_loss(leaves[0], leaves[1], leaves[2], targets_MK, torch.zeros(0), student_temp=STUDENT_TEMP)
    return loss, leaves


def test_without_masked_patches_the_loss_and_every_gradient_are_zero_not_missing() -> None:
    loss, leaves = no_rows()
    assert float(loss.detach()) == 0
    gradients = torch.autograd.grad(loss, leaves)
    assert [tuple(own.shape) for own in gradients] == [(0, WIDTH), (NUM_PROTOTYPES, WIDTH), (NUM_PROTOTYPES, 1)]
    assert not any(own.any() for own in gradients)


SPLITS = {"2 + 2 views": (2, 2), "1 + 3 views": (1, 3), "none + all views": (0, 4)}


def shard(rows: Tensor, views: tuple[int, int], rank: int) -> Tensor:
    first = sum(views[:rank])
    patches = [sum(PATCHES_OF_VIEWS[:first]), sum(PATCHES_OF_VIEWS[first : first + views[rank]])]
    return rows[patches[0] : patches[0] + patches[1]]


def of_a_rank(views: tuple[int, int], centering: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, mean gradient of the prototypes, new centers and entropy, from this rank's views."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    (features_MD, weight_v_KD, weight_g_K1), teacher_MK, center_K = random_case()
    own_MK = shard(teacher_MK, views, rank)
    share_11K = own_MK.sum(dim=0)[None, None] * world_size / len(teacher_MK)
    new_center_1K = updated_centers(center_K[None], [share_11K], 0.9)
    weights_M = shard(weights_of(PATCHES_OF_VIEWS), views, rank) * world_size
    targets_MK = targets_of(own_MK, center_K, centering)
    own_MD = shard(features_MD.detach(), views, rank)
    loss = masked_patch_loss(own_MD, weight_v_KD, weight_g_K1, targets_MK, weights_M, student_temp=STUDENT_TEMP)
    loss.backward()
    assert weight_v_KD.grad is not None
    loss = loss.detach()
    for own in (loss, weight_v_KD.grad):
        torch.distributed.all_reduce(own)
        own /= world_size
    return loss, weight_v_KD.grad, new_center_1K, masked_patch_entropy(targets_MK, weights_M) / world_size


def targets_of(logits_MK: Tensor, center_K: Tensor, centering: str) -> Tensor:
    if centering == "sinkhorn":
        return sinkhorn_targets([logits_MK[None]], TEACHER_TEMP)[0][0]
    return become_centered_targets(logits_MK.clone(), center_K, TEACHER_TEMP)


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
@pytest.mark.parametrize("views", SPLITS.values(), ids=SPLITS.keys())
def test_two_ranks_with_different_numbers_of_patches_give_what_one_gives(
    views: tuple[int, int], centering: str
) -> None:
    (features_MD, weight_v_KD, weight_g_K1), teacher_MK, center_K = random_case()
    targets_MK, weights_M = targets_of(teacher_MK, center_K, centering), weights_of(PATCHES_OF_VIEWS)
    loss = masked_patch_loss(features_MD, weight_v_KD, weight_g_K1, targets_MK, weights_M, student_temp=STUDENT_TEMP)
    (gradient,) = torch.autograd.grad(loss, weight_v_KD)
    entropy = -(targets_MK * targets_MK.log()).sum(-1) @ weights_M
    new_center_1K = 0.9 * center_K + 0.1 * teacher_MK.mean(0)
    for found in run_on_ranks(of_a_rank, views, centering):
        expected = loss.detach(), gradient, new_center_1K[None], entropy
        for own, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(own, wanted, rtol=1e-10, atol=1e-13)


def test_uniform_targets_and_predictions_give_the_logarithm_of_the_number_of_prototypes() -> None:
    targets_MK = torch.full((4, 9), 1 / 9)
    weight_v_KD = torch.ones(9, 3)
    loss = masked_patch_loss(
        torch.ones(4, 3), weight_v_KD, None, targets_MK, torch.full((4,), 0.25), student_temp=STUDENT_TEMP
    )
    assert float(loss) == pytest.approx(math.log(9))
    assert float(masked_patch_entropy(targets_MK, torch.full((4,), 0.25))) == pytest.approx(math.log(9))


@pytest.mark.parametrize(
    ("features", "prototypes", "lengths", "targets", "weights", "chunk_rows", "message"),
    [
        ((4, 8), (9, 7), (9, 1), (4, 9), (4,), 8, "do not fit"),
        ((4, 8), (9, 8), (9,), (4, 9), (4,), 8, "do not fit"),
        ((4, 8), (9, 8), (9, 1), (4, 8), (4,), 8, "do not fit"),
        ((4, 8), (9, 8), (9, 1), (3, 9), (4,), 8, "do not fit"),
        ((4, 8), (9, 8), (9, 1), (4, 9), (3,), 8, "do not fit"),
        ((4, 8), (9, 8), (9, 1), (4, 9), (4,), 0, "chunk_rows"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    features, prototypes, lengths, targets, weights, chunk_rows, message
) -> None:
    tensors = [torch.zeros(shape) for shape in (features, prototypes, lengths, targets, weights)]
    with pytest.raises(ValueError, match=message):
        masked_patch_loss(*tensors, student_temp=STUDENT_TEMP, chunk_rows=chunk_rows)
