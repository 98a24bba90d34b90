import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from passreid_ray.losses import (
    centered_targets,
    mean_over_pairs,
    part_distillation_loss,
    part_distillation_terms,
    updated_centers,
)
from tests.losses import golden_loss
from tests.ranks import run_on_ranks
from tests.reference.official_loss import literal_loss, literal_pairs

TEMPS = {"student_temp": 0.1, "teacher_temp": 0.04}


def terms(student: Sequence[Tensor], teacher: Sequence[Tensor], centers_TK: Tensor) -> tuple[Tensor, list[int]]:
    return part_distillation_terms(student, centered_targets(teacher, centers_TK, 0.04), student_temp=0.1)


def random_case(
    num_parts: int = 3, local_views: int = 3, batch: int = 4, num_prototypes: int = 16, seed: int = 0
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Student, teacher and centers of two global views, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def logits(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1

    num_views = [2 + num_parts * local_views] + num_parts * [2 + local_views]
    student = [logits(views, batch, num_prototypes).requires_grad_() for views in num_views]
    teacher = [logits(2, batch, num_prototypes) for _ in num_views]
    return student, teacher, logits(1 + num_parts, num_prototypes)


@pytest.mark.parametrize("step", [0, 1])
def test_value_gradients_and_centers_equal_the_reference(step: int) -> None:
    golden = golden_loss.load("pass_dino_loss")
    student = [views.requires_grad_() for views in golden_loss.student_views(golden, step)]
    teacher, centers_TK = golden_loss.teacher_views(golden, step), golden_loss.centers(golden, step - 1)
    loss = part_distillation_loss(
        student,
        teacher,
        centers_TK,
        student_temp=golden_loss.STUDENT_TEMP,
        teacher_temp=float(golden[f"step{step}/temp"]),
    )
    loss.backward()
    torch.testing.assert_close(loss.item(), float(golden[f"step{step}/loss"]), rtol=1e-6, atol=0)
    for views, expected in zip(student, golden_loss.student_views(golden, step, "student_grad"), strict=True):
        torch.testing.assert_close(views.grad, expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(
        updated_centers(centers_TK, teacher, golden_loss.CENTER_MOMENTUM),
        golden_loss.centers(golden, step),
        rtol=1e-5,
        atol=1e-7,
    )


def split_step() -> tuple[list[float], list[Tensor]]:
    """Losses and centers of two steps on this rank's half of the golden batch."""
    golden = golden_loss.load("pass_dino_loss")
    rows = slice(2 * torch.distributed.get_rank(), 2 * torch.distributed.get_rank() + 2)
    centers_TK, losses, centers = golden_loss.centers(golden, -1), [], []
    for step in (0, 1):
        teacher = [views[:, rows] for views in golden_loss.teacher_views(golden, step)]
        student = [views[:, rows] for views in golden_loss.student_views(golden, step)]
        temp = float(golden[f"step{step}/temp"])
        loss = part_distillation_loss(student, teacher, centers_TK, student_temp=0.1, teacher_temp=temp)
        losses.append(loss.item())
        centers_TK = updated_centers(centers_TK, teacher, golden_loss.CENTER_MOMENTUM)
        centers.append(centers_TK)
    return losses, centers


def test_two_ranks_equal_the_reference_on_two_ranks() -> None:
    golden = golden_loss.load("pass_dino_loss_world2")
    for rank, (losses, centers) in enumerate(run_on_ranks(split_step)):
        for step in (0, 1):
            assert math.isclose(losses[step], golden[f"step{step}/loss_rank{rank}"], rel_tol=1e-6)
            torch.testing.assert_close(centers[step], golden_loss.centers(golden, step), rtol=1e-5, atol=1e-7)


@settings(deadline=None)  # the machine may be busy
@given(
    num_parts=st.integers(0, 4),
    local_views=st.integers(0, 3),
    batch=st.integers(1, 3),
    num_prototypes=st.integers(2, 9),
    seed=st.integers(0, 1000),
)
def test_value_and_gradients_equal_the_literal_double_loop(
    num_parts: int, local_views: int, batch: int, num_prototypes: int, seed: int
) -> None:
    student, teacher, centers_TK = random_case(num_parts, local_views, batch, num_prototypes, seed)
    loss = part_distillation_loss(student, teacher, centers_TK, **TEMPS)
    expected = literal_loss(student, teacher, centers_TK, 0.1, 0.04)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(loss, student)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, student), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_more_than_two_global_views_are_paired_like_two() -> None:
    student = [torch.randn(5, 2, 7, dtype=torch.float64)]
    teacher = [torch.randn(3, 2, 7, dtype=torch.float64)]
    centers_TK = torch.zeros(1, 7, dtype=torch.float64)
    torch.testing.assert_close(
        part_distillation_loss(student, teacher, centers_TK, **TEMPS),
        literal_loss(student, teacher, centers_TK, 0.1, 0.04),
    )


def test_official_views_make_44_pairs_of_which_20_are_cls() -> None:
    student, teacher, centers_TK = random_case()
    loss_T, num_pairs = terms(student, teacher, centers_TK)
    assert num_pairs == [20, 8, 8, 8]
    for token, loss in enumerate(loss_T):
        pairs = literal_pairs(student[token], teacher[token], centers_TK[token], 0.1, 0.04)
        assert len(pairs) == num_pairs[token]
        torch.testing.assert_close(loss, torch.stack(pairs).mean())
    # Doubling one part's terms adds its mean times 8/44.
    doubled = mean_over_pairs(loss_T * torch.tensor([1, 1, 2, 1]), num_pairs)
    torch.testing.assert_close(doubled - mean_over_pairs(loss_T, num_pairs), loss_T[2] * 8 / 44)


@pytest.mark.parametrize("num_prototypes", [64, 65536])
def test_uniform_logits_give_the_logarithm_of_the_number_of_prototypes(num_prototypes: int) -> None:
    student, teacher = [torch.zeros(5, 2, num_prototypes)], [torch.full((2, 2, num_prototypes), 3.0)]
    loss = part_distillation_loss(student, teacher, torch.zeros(1, num_prototypes), **TEMPS)
    assert math.isclose(loss.item(), math.log(num_prototypes), rel_tol=1e-6)


def test_a_part_learns_from_its_own_views_only_and_the_teacher_from_none() -> None:
    student, teacher, centers_TK = random_case()
    teacher = [views.requires_grad_() for views in teacher]
    centers_TK.requires_grad_()
    loss_T, _ = terms(student, teacher, centers_TK)
    gradients = torch.autograd.grad(loss_T[2], [*student, *teacher, centers_TK], allow_unused=True)
    reached = [gradient is not None and bool(gradient.any()) for gradient in gradients]
    assert reached == [False, False, True, False] + 5 * [False]


def test_a_student_view_does_not_learn_from_the_same_teacher_view() -> None:
    student, teacher, centers_TK = random_case(local_views=0, num_parts=0)
    before = terms(student, teacher, centers_TK)[0]
    first_only = [student[0][:1].detach().requires_grad_(), student[0][1:].detach()]
    changed = [torch.stack([torch.randn_like(teacher[0][0]), teacher[0][1]])]
    # Student view 0 is taught by teacher view 1 alone, so its gradient does not see a change of teacher view 0.
    gradients = [
        torch.autograd.grad(
            part_distillation_loss([torch.cat(first_only)], taught_by, centers_TK, **TEMPS), first_only[0]
        )[0]
        for taught_by in (teacher, changed)
    ]
    assert torch.equal(*gradients)
    assert not torch.equal(before, terms(student, changed, centers_TK)[0])


def test_the_loss_is_not_below_the_entropy_of_the_targets() -> None:
    _, teacher, centers_TK = random_case(num_parts=0, local_views=0)
    teacher = [teacher[0][:1].expand(2, -1, -1)]
    target = torch.softmax((teacher[0] - centers_TK[0]) / 0.04, dim=-1)
    best_student = [(teacher[0] - centers_TK[0]) * 0.1 / 0.04]
    loss = part_distillation_loss(best_student, teacher, centers_TK, **TEMPS)
    torch.testing.assert_close(loss, torch.special.entr(target).sum(-1).mean())


def test_half_precision_logits_are_computed_in_float32_even_under_autocast() -> None:
    student, teacher, centers_TK = random_case(num_prototypes=512)
    student = [views.detach().bfloat16() for views in student]
    teacher = [views.bfloat16() for views in teacher]
    expected = literal_loss([s.double() for s in student], [t.double() for t in teacher], centers_TK, 0.1, 0.04)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = part_distillation_loss(student, teacher, centers_TK.float(), **TEMPS)
    assert loss.dtype == torch.float32
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-6)


@pytest.mark.parametrize(
    ("student_shape", "teacher_shape"),
    [((5, 4, 8), (2, 1, 8)), ((5, 4, 8), (2, 4, 1)), ((1, 4, 8), (2, 4, 8)), ((1, 4, 8), (1, 4, 8))],
)
def test_logits_that_do_not_fit_are_refused(student_shape: tuple[int, ...], teacher_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"do not fit|no pair"):
        part_distillation_loss([torch.zeros(student_shape)], [torch.zeros(teacher_shape)], torch.zeros(1, 8), **TEMPS)
