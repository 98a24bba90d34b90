import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from passreid_ray import products
from passreid_ray.losses import centered_targets, logit_chunks, part_distillation_loss, prototype_distillation
from passreid_ray.losses.prototype_distillation import prototype_cross_entropy
from tests.reference.literal_pass_loss import literal_pass_loss

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04
PRODUCTS = "aten::mm", "aten::addmm", "mkldnn::_linear_pointwise"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


Weights = tuple[Tensor, Tensor]
"""``weight_v`` and ``weight_g``."""


def random_case(
    num_global: int = 2,
    num_local: int = 3,
    batch: int = 4,
    num_prototypes: int = 33,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Weights, Tensor]:
    """Features and weights of prototypes that need a gradient, and the teacher's logits."""
    generator = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, 8, generator=generator, dtype=dtype), dim=-1)

    teacher_GBK = unit(num_global, batch) @ unit(num_prototypes).T
    features_VBD = unit(num_global + num_local, batch).requires_grad_()
    weight_v_KD = torch.randn(num_prototypes, 8, generator=generator, dtype=dtype).requires_grad_()
    weight_g_K1 = (0.5 + torch.rand(num_prototypes, 1, generator=generator, dtype=dtype)).requires_grad_()
    return features_VBD, (weight_v_KD, weight_g_K1), teacher_GBK


def targets_of(teacher_GBK: Tensor) -> Tensor:
    return centered_targets([teacher_GBK], no_centers(teacher_GBK), TEACHER_TEMP)[0]


def no_centers(teacher_GBK: Tensor) -> Tensor:
    return teacher_GBK.new_zeros(1, teacher_GBK.shape[-1])


def prototypes_of(weights: Weights) -> Tensor:
    weight_v_KD, weight_g_K1 = weights
    return weight_g_K1 * weight_v_KD / weight_v_KD.square().sum(dim=1, keepdim=True).sqrt()


def loss_of_logits(features_VBD: Tensor, weights: Weights, teacher_GBK: Tensor) -> Tensor:
    logits_VBK = F.linear(features_VBD, prototypes_of(weights))
    temps = {"student_temp": STUDENT_TEMP, "teacher_temp": TEACHER_TEMP}
    return part_distillation_loss([logits_VBK], [teacher_GBK], no_centers(teacher_GBK), **temps)


def loss_of_loops(features_VBD: Tensor, weights: Weights, teacher_GBK: Tensor) -> Tensor:
    logits_NK, batch = (features_VBD @ prototypes_of(weights).T).flatten(0, 1), features_VBD.shape[1]
    args = [logits_NK], [teacher_GBK.flatten(0, 1)], no_centers(teacher_GBK), batch
    return literal_pass_loss(*args, STUDENT_TEMP, TEACHER_TEMP)


def assert_same_value_and_gradients(
    found: Tensor, expected: Tensor, leaves: list[Tensor], tolerance: float = 1e-10
) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=0)
    for own, wanted in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert own.shape == wanted.shape
        assert own.dtype == wanted.dtype
        assert (own - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reference", [loss_of_logits, loss_of_loops])
@pytest.mark.parametrize(("num_global", "num_local"), [(2, 0), (2, 3), (2, 9), (3, 2)])
def test_value_and_gradients_equal_the_loss_of_the_logits(reference, num_global, num_local, dtype) -> None:
    features_VBD, weights, teacher_GBK = random_case(num_global, num_local, dtype=dtype)
    found = prototype_cross_entropy(features_VBD, *weights, targets_of(teacher_GBK), student_temp=STUDENT_TEMP)
    assert found.dtype == dtype
    expected = reference(features_VBD, weights, teacher_GBK)
    assert_same_value_and_gradients(found, expected, [features_VBD, *weights], TOLERANCE[dtype])


def test_a_single_global_view_teaches_the_local_views_only() -> None:
    features_VBD, weights, teacher_GBK = random_case(num_global=1)
    found = prototype_cross_entropy(features_VBD, *weights, targets_of(teacher_GBK), student_temp=STUDENT_TEMP)
    expected = loss_of_loops(features_VBD, weights, teacher_GBK)
    assert_same_value_and_gradients(found, expected, [features_VBD, *weights])
    (gradient_VBD,) = torch.autograd.grad(loss_of_loops(features_VBD, weights, teacher_GBK), features_VBD)
    assert [bool(own_BD.any()) for own_BD in gradient_VBD] == [False, True, True, True]


@settings(deadline=None)  # the machine may be busy
@given(
    num_local=st.integers(0, 4), batch=st.integers(1, 5), chunk_rows=st.integers(1, 40), block_rows=st.integers(1, 9)
)
def test_chunks_and_blocks_of_any_size_change_nothing(
    num_local: int, batch: int, chunk_rows: int, block_rows: int
) -> None:
    features_VBD, weights, teacher_GBK = random_case(num_local=num_local, batch=batch)
    block_bytes = block_rows * len(weights[0]) * weights[0].element_size()
    with (
        patch.object(logit_chunks, "BLOCK_BYTES", block_bytes),
        patch.object(prototype_distillation, "BLOCK_BYTES", block_bytes),
    ):
        found = prototype_cross_entropy(
            features_VBD, *weights, targets_of(teacher_GBK), student_temp=STUDENT_TEMP, chunk_rows=chunk_rows
        )
    expected = loss_of_loops(features_VBD, weights, teacher_GBK)
    assert_same_value_and_gradients(found, expected, [features_VBD, *weights])


def rounded_leaves(exact: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """In float32."""
    features_VBD, weight_v_KD, weight_g_K1 = (leaf.detach().float().requires_grad_() for leaf in exact)
    return features_VBD, weight_v_KD, weight_g_K1


@pytest.mark.parametrize("has_onednn", [False, True])
def test_either_library_of_products_gives_the_gradients_of_float64(has_onednn: bool) -> None:
    if has_onednn and not products.HAS_ONEDNN:
        pytest.skip("this torch has no oneDNN")
    features_VBD, weights, teacher_GBK = random_case(num_prototypes=3000)
    exact = features_VBD, *weights
    rounded = rounded_leaves(exact)
    targets_GBK = targets_of(teacher_GBK)
    with (
        patch.object(products, "HAS_ONEDNN", has_onednn),
        patch.object(prototype_distillation, "BLOCK_BYTES", 2**14),
        products_counted() as counted,
    ):
        found = prototype_cross_entropy(*rounded, targets_GBK.float(), student_temp=STUDENT_TEMP, chunk_rows=7)
    assert ("mkldnn::_linear_pointwise" in counted) == has_onednn
    expected = loss_of_loops(features_VBD, weights, teacher_GBK)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    pairs = zip(torch.autograd.grad(found, rounded), torch.autograd.grad(expected, exact), strict=True)
    assert all((own - wanted).norm() < 2e-6 * wanted.norm() for own, wanted in pairs)


def test_logits_far_from_zero_neither_overflow_nor_lose_the_loss() -> None:
    features_VBD, (weight_v_KD, weight_g_K1), teacher_GBK = random_case()
    weights = weight_v_KD, (weight_g_K1.detach() * 300).requires_grad_()
    leaves, targets_GBK = (features_VBD, *weights), targets_of(teacher_GBK)
    rounded = rounded_leaves(leaves)
    found = prototype_cross_entropy(*rounded, targets_GBK.float(), student_temp=STUDENT_TEMP)
    expected = loss_of_loops(features_VBD, weights, teacher_GBK)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    pairs = zip(torch.autograd.grad(found, rounded), torch.autograd.grad(expected, leaves), strict=True)
    assert all((own - wanted).norm() < 1e-3 * wanted.norm() for own, wanted in pairs)


def test_rows_of_targets_that_do_not_sum_to_one_count_by_their_sum() -> None:
    features_VBD, weights, teacher_GBK = random_case()
    targets_GBK = targets_of(teacher_GBK) * torch.rand(*teacher_GBK.shape[:2], 1, dtype=torch.float64)
    log_prob_VBK = F.log_softmax(features_VBD @ prototypes_of(weights).T / STUDENT_TEMP, dim=-1)
    pairs = [
        -(targets_GBK[g] * log_prob_VBK[v]).sum(-1).mean()
        for g in range(len(targets_GBK))
        for v in range(len(features_VBD))
        if v != g
    ]
    found = prototype_cross_entropy(features_VBD, *weights, targets_GBK, student_temp=STUDENT_TEMP)
    assert_same_value_and_gradients(found, torch.stack(pairs).mean(), [features_VBD, *weights])


def test_finite_differences_agree_with_the_gradients() -> None:
    features_VBD, weights, teacher_GBK = random_case(num_local=1, batch=2, num_prototypes=5)
    leaves, targets_GBK, step = [features_VBD, *weights], targets_of(teacher_GBK), 1e-5

    def loss(own: list[Tensor]) -> Tensor:
        return prototype_cross_entropy(own[0], own[1], own[2], targets_GBK, student_temp=STUDENT_TEMP, chunk_rows=4)

    gradients = torch.autograd.grad(loss(leaves), leaves)
    for index, gradient in enumerate(gradients):
        for place in range(gradient.numel()):
            ends = []
            for sign in (-1, 1):
                moved = [leaf.detach().clone() for leaf in leaves]
                moved[index].view(-1)[place] += sign * step
                ends.append(loss(moved))
            assert float((ends[1] - ends[0]) / (2 * step)) == pytest.approx(float(gradient.view(-1)[place]), abs=1e-7)


@pytest.mark.parametrize("factor", [-3.0, 65536.0])
def test_an_incoming_gradient_scales_the_gradients(factor: float) -> None:
    features_VBD, weights, teacher_GBK = random_case()
    leaves, targets_GBK = [features_VBD, *weights], targets_of(teacher_GBK)

    def gradients(factor: float) -> tuple[Tensor, ...]:
        loss = prototype_cross_entropy(features_VBD, *weights, targets_GBK, student_temp=STUDENT_TEMP)
        return torch.autograd.grad(loss * factor, leaves)

    for own, wanted in zip(gradients(factor), gradients(1.0), strict=True):
        torch.testing.assert_close(own, wanted * factor)


def test_a_second_backward_is_refused() -> None:
    features_VBD, weights, teacher_GBK = random_case()
    loss = prototype_cross_entropy(features_VBD, *weights, targets_of(teacher_GBK), student_temp=STUDENT_TEMP)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_gradients_of_several_losses_add_up() -> None:
    features_VBD, weights, teacher_GBK = random_case()
    targets_GBK, leaves = targets_of(teacher_GBK), [features_VBD, *weights]
    for _ in range(2):
        prototype_cross_entropy(features_VBD, *weights, targets_GBK, student_temp=STUDENT_TEMP).backward()
    wanted = torch.autograd.grad(loss_of_loops(features_VBD, weights, teacher_GBK), leaves)
    for leaf, once in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * once)


def test_without_lengths_prototypes_have_length_one() -> None:
    features_VBD, (weight_v_KD, _), teacher_GBK = random_case()
    targets_GBK, leaves = targets_of(teacher_GBK), [features_VBD, weight_v_KD]
    ones_K1 = torch.ones(len(weight_v_KD), 1, dtype=torch.float64)
    found = prototype_cross_entropy(features_VBD, weight_v_KD, None, targets_GBK, student_temp=STUDENT_TEMP)
    assert_same_value_and_gradients(found, loss_of_loops(features_VBD, (weight_v_KD, ones_K1), teacher_GBK), leaves)


def test_a_prototype_of_length_zero_still_gets_a_gradient_of_its_length() -> None:
    features_VBD, weights, teacher_GBK = random_case()
    with torch.no_grad():
        weights[1][3] = 0
    found = prototype_cross_entropy(features_VBD, *weights, targets_of(teacher_GBK), student_temp=STUDENT_TEMP)
    expected = loss_of_loops(features_VBD, weights, teacher_GBK)
    (gradient_K1,) = torch.autograd.grad(expected, weights[1], retain_graph=True)
    assert gradient_K1[3] != 0
    assert_same_value_and_gradients(found, expected, [features_VBD, *weights])


@contextmanager
def products_counted() -> Iterator[list[str]]:
    """Names of the matmuls done inside."""
    names: list[str] = []
    with torch.profiler.profile() as profile:
        yield names
    names += [event.name for event in profile.events() or [] if event.name in PRODUCTS]


@pytest.mark.parametrize("needs_gradient", list(itertools.product([False, True], repeat=3)))
def test_only_the_wanted_gradients_are_computed(needs_gradient: tuple[bool, bool, bool]) -> None:
    features_VBD, weights, teacher_GBK = random_case()
    leaves = [features_VBD, *weights]
    for leaf, is_wanted in zip(leaves, needs_gradient, strict=True):
        leaf.requires_grad_(is_wanted)
    with products_counted() as products:
        found = prototype_cross_entropy(features_VBD, *weights, targets_of(teacher_GBK), student_temp=STUDENT_TEMP)
    of_features, *of_weights = needs_gradient
    assert len(products) == 1 + of_features + any(of_weights)
    assert found.requires_grad == any(needs_gradient)
    expected = loss_of_loops(features_VBD, weights, teacher_GBK)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if wanted:
        assert_same_value_and_gradients(found, expected, wanted)
    else:
        torch.testing.assert_close(found, expected)


def test_without_grad_mode_the_value_is_the_same_and_no_gradient_is_computed() -> None:
    features_VBD, weights, teacher_GBK = random_case()
    arguments = features_VBD, *weights, targets_of(teacher_GBK)
    with torch.no_grad(), products_counted() as products:
        found = prototype_cross_entropy(*arguments, student_temp=STUDENT_TEMP)
    assert len(products) == 1
    assert not found.requires_grad
    assert torch.equal(found, prototype_cross_entropy(*arguments, student_temp=STUDENT_TEMP))


def test_targets_get_no_gradient_and_stay_as_they_are() -> None:
    features_VBD, weights, teacher_GBK = random_case()
    targets_GBK = targets_of(teacher_GBK)
    before = targets_GBK.clone()
    targets_GBK.requires_grad_()
    loss = prototype_cross_entropy(features_VBD, *weights, targets_GBK, student_temp=STUDENT_TEMP)
    assert torch.autograd.grad(loss, [features_VBD, targets_GBK], allow_unused=True)[1] is None
    assert torch.equal(targets_GBK, before)


def test_targets_made_in_inference_mode_are_accepted() -> None:
    features_VBD, weights, teacher_GBK = random_case()
    with torch.inference_mode():
        targets_GBK = targets_of(teacher_GBK)
    found = prototype_cross_entropy(features_VBD, *weights, targets_GBK, student_temp=STUDENT_TEMP)
    expected = loss_of_loops(features_VBD, weights, teacher_GBK)
    assert_same_value_and_gradients(found, expected, [features_VBD, *weights])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_as_close_to_float32_as_the_loss_of_the_logits(dtype: torch.dtype) -> None:
    features_VBD, weights, teacher_GBK = random_case(num_prototypes=4096, dtype=torch.float32)
    leaves, targets_GBK = [features_VBD, *weights], targets_of(teacher_GBK)
    exact = torch.autograd.grad(loss_of_logits(features_VBD, weights, teacher_GBK), leaves)
    with torch.autocast("cpu", dtype=dtype):
        found = prototype_cross_entropy(features_VBD, *weights, targets_GBK, student_temp=STUDENT_TEMP, chunk_rows=7)
        of_logits = loss_of_logits(features_VBD, weights, teacher_GBK)
    assert found.dtype == torch.float32
    # The direction is rounded, not the prototype of the right length: another rounding, no worse.
    torch.testing.assert_close(found, of_logits, rtol=2e-4, atol=0)
    gradients = torch.autograd.grad(found, leaves), torch.autograd.grad(of_logits, leaves), exact
    for own, other, wanted in zip(*gradients, strict=True):
        assert own.dtype == torch.float32
        assert (own - wanted).norm() < 1.1 * (other - wanted).norm() < 0.03 * wanted.norm()


def test_float64_is_kept_under_autocast() -> None:
    features_VBD, weights, teacher_GBK = random_case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = prototype_cross_entropy(features_VBD, *weights, targets_of(teacher_GBK), student_temp=STUDENT_TEMP)
    expected = loss_of_loops(features_VBD, weights, teacher_GBK)
    assert_same_value_and_gradients(found, expected, [features_VBD, *weights])


@pytest.mark.parametrize(
    ("features", "prototypes", "lengths", "targets", "chunk_rows", "message"),
    [
        ((5, 4, 8), (9, 7), (9, 1), (2, 4, 9), 8, "do not fit"),
        ((5, 4, 8), (9, 8), (9, 1), (2, 4, 1), 8, "do not fit"),
        ((5, 4, 8), (9, 8), (9, 1), (2, 1, 9), 8, "do not fit"),
        ((1, 4, 8), (9, 8), (9, 1), (2, 4, 9), 8, "do not fit"),
        ((5, 4, 8), (9, 8), (9,), (2, 4, 9), 8, "do not fit"),
        ((20, 8), (9, 8), (9, 1), (2, 4, 9), 8, "do not fit"),
        ((1, 4, 8), (9, 8), (9, 1), (1, 4, 9), 8, "no pair"),
        ((5, 4, 8), (9, 8), (9, 1), (2, 4, 9), 0, "chunk_rows"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(features, prototypes, lengths, targets, chunk_rows, message) -> None:
    tensors = torch.zeros(features), torch.zeros(prototypes), torch.zeros(lengths), torch.zeros(targets)
    with pytest.raises(ValueError, match=message):
        prototype_cross_entropy(*tensors, student_temp=STUDENT_TEMP, chunk_rows=chunk_rows)
