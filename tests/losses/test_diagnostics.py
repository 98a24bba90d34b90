import math

import pytest
import torch
from torch import Tensor

from passreid_ray.losses import (
    DistillationDiagnostics,
    centered_targets,
    collapse,
    distillation_diagnostics,
    feature_spread,
)
from tests.ranks import run_on_ranks


def diagnostics(student: Tensor, teacher: Tensor, centers_TK: Tensor) -> DistillationDiagnostics:
    return distillation_diagnostics([student], centered_targets([teacher], centers_TK, 0.04), student_temp=0.1)


def diagnostics_of_shard(student: Tensor, teacher: Tensor, features_ND: Tensor) -> tuple[Tensor, ...]:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    student, teacher = (logits.chunk(world_size, dim=1)[rank] for logits in (student, teacher))
    found = diagnostics(student, teacher, torch.zeros(1, 8))
    return *found, feature_spread(features_ND.chunk(world_size)[rank])


def test_entropy_and_divergence_are_those_of_torch_distributions() -> None:
    student, teacher, centers_TK = torch.randn(5, 3, 8) / 5, torch.randn(2, 3, 8) / 5, torch.randn(1, 8) / 5
    found = diagnostics(student, teacher, centers_TK)
    target = torch.distributions.Categorical(logits=(teacher - centers_TK[0]) / 0.04)
    prediction = torch.distributions.Categorical(logits=student[:2].flip(0) / 0.1)
    torch.testing.assert_close(found.teacher_entropy_T, target.entropy().mean()[None])
    expected = torch.distributions.kl_divergence(target, prediction).mean()[None]
    torch.testing.assert_close(found.divergence_T, expected)


def test_local_views_do_not_count() -> None:
    student, teacher = torch.randn(5, 3, 8), torch.randn(2, 3, 8)
    all_views = diagnostics(student, teacher, torch.zeros(1, 8))
    global_views = diagnostics(student[:2], teacher, torch.zeros(1, 8))
    assert torch.equal(all_views.divergence_T, global_views.divergence_T)


def test_two_ranks_give_the_numbers_of_one() -> None:
    student, teacher, features_ND = torch.randn(4, 6, 8), torch.randn(2, 6, 8), torch.randn(10, 16)
    expected = (
        *diagnostics(student, teacher, torch.zeros(1, 8)),
        feature_spread(features_ND),
    )
    for found in run_on_ranks(diagnostics_of_shard, student, teacher, features_ND):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_spread_is_one_on_the_sphere_and_zero_at_a_point() -> None:
    features_ND = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    assert math.isclose(feature_spread(features_ND).item(), 1, abs_tol=0.01)
    assert math.isclose(feature_spread(7 * features_ND).item(), feature_spread(features_ND).item(), rel_tol=1e-5)
    assert feature_spread(features_ND[:1].expand(50, -1)).item() < 1e-6


@pytest.mark.parametrize(
    ("entropy", "name"),
    [(0.0, "one prototype"), (0.01, "one prototype"), (2.0, None), (7.0, None), (8.3, "uniform"), (8.318, "uniform")],
)
def test_collapse_is_named_by_the_entropy(entropy: float, name: str | None) -> None:
    assert collapse(entropy, 4096) == name


def test_logits_of_each_collapse_are_recognised() -> None:
    one_prototype = torch.zeros(2, 4, 64)
    one_prototype[..., 3] = 1
    for logits, name in [(one_prototype, "one prototype"), (torch.zeros(2, 4, 64), "uniform")]:
        entropy_T, divergence_T = diagnostics(logits, logits, torch.zeros(1, 64))
        assert collapse(entropy_T.item(), 64) == name
        assert divergence_T.item() < 0.01
