from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from passreid_ray.distributed import all_reduce_mean, rank, world_size
from passreid_ray.errors import UserError
from passreid_ray.losses import (
    centered_targets,
    logit_chunks,
    part_distillation_loss,
    sinkhorn_targets,
    updated_centers,
)
from passreid_ray.losses.sharded_prototypes import (
    shard_rows,
    sharded_centers,
    sharded_cross_entropy,
    sharded_sinkhorn,
    sharded_targets,
)
from tests.ranks import run_on_ranks
from tests.reference.literal_pass_loss import literal_pass_loss

# Shape letters: V views, G global views, I images of all ranks, B of one, D width, K prototypes, S of one rank.

STUDENT_TEMP, TEACHER_TEMP, MOMENTUM = 0.1, 0.04, 0.9
NUM_IMAGES, NUM_PROTOTYPES, WIDTH = 8, 36, 6
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
BF16_TOLERANCE = 1e-2
CHUNK_ROWS = 11
"""Of 40: the last chunk is smaller, and chunks lie across views and ranks."""

Case = dict[str, Tensor]


def case_of(dtype: torch.dtype, num_global: int = 2, num_local: int = 3) -> Case:
    """Inputs of a backbone of one matrix, the prototypes and the teacher, for the images of all ranks."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "inputs_VID": normal(num_global + num_local, NUM_IMAGES, WIDTH),
        "weight_DD": normal(WIDTH, WIDTH),
        "prototypes_KD": F.normalize(normal(NUM_PROTOTYPES, WIDTH), dim=-1),
        "teacher_GID": F.normalize(normal(num_global, NUM_IMAGES, WIDTH), dim=-1),
        "teacher_prototypes_KD": F.normalize(normal(NUM_PROTOTYPES, WIDTH), dim=-1),
        "center_K": normal(NUM_PROTOTYPES) / 10,
    }


class Backbone(nn.Module):
    def __init__(self, weight_DD: Tensor) -> None:
        super().__init__()
        self.weight_DD = nn.Parameter(weight_DD.clone())

    def forward(self, inputs_VBD: Tensor) -> Tensor:
        return F.normalize(inputs_VBD @ self.weight_DD, dim=-1)


def unsharded(case: Case) -> Case:
    """The same of one process, by the published loops over all logits."""
    backbone, prototypes_KD = Backbone(case["weight_DD"]), case["prototypes_KD"].clone().requires_grad_()
    teacher_GIK, centers_1K = case["teacher_GID"] @ case["teacher_prototypes_KD"].T, case["center_K"][None]
    logits_VIK = backbone(case["inputs_VID"]) @ prototypes_KD.T
    logits, teacher = [logits_VIK.flatten(0, 1)], [teacher_GIK.flatten(0, 1)]
    loss = literal_pass_loss(logits, teacher, centers_1K, NUM_IMAGES, STUDENT_TEMP, TEACHER_TEMP)
    loss.backward()
    return {
        "loss": loss.detach(),
        "backbone": gradient_of(backbone.weight_DD),
        "prototypes": gradient_of(prototypes_KD),
        "targets": centered_targets([teacher_GIK], centers_1K, TEACHER_TEMP)[0],
        "sinkhorn": sinkhorn_targets([teacher_GIK], TEACHER_TEMP)[0],
        "centers": updated_centers(centers_1K, [teacher_GIK], MOMENTUM)[0],
    }


def sharded(case: Case, autocast: bool = False) -> Case:
    """What a rank gets from its images and its prototypes; the backbone's gradient is averaged as DDP does."""
    own_images = shard_rows(NUM_IMAGES, rank(), world_size())
    own_columns = shard_rows(NUM_PROTOTYPES, rank(), world_size())
    backbone = Backbone(case["weight_DD"])
    prototypes_SD = case["prototypes_KD"][own_columns].clone().requires_grad_()
    teacher = case["teacher_GID"][:, own_images], case["teacher_prototypes_KD"][own_columns]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        targets_GIS = sharded_targets(*teacher, case["center_K"][own_columns], TEACHER_TEMP)
        features_VBD = backbone(case["inputs_VID"][:, own_images])
        temps = {"student_temp": STUDENT_TEMP}
        loss = sharded_cross_entropy(features_VBD, prototypes_SD, targets_GIS, chunk_rows=CHUNK_ROWS, **temps)
    loss.backward()
    return {
        "loss": loss.detach(),
        "backbone": all_reduce_mean(gradient_of(backbone.weight_DD)),
        "prototypes": gradient_of(prototypes_SD),
        "targets": targets_GIS,
        "sinkhorn": sharded_sinkhorn(*teacher, TEACHER_TEMP),
        "centers": sharded_centers(case["center_K"][own_columns], *teacher, MOMENTUM),
    }


def gradient_of(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


CASES = {
    "float64": case_of(torch.float64),
    "float32": case_of(torch.float32),
    "three global views": case_of(torch.float64, 3, 2),
    "one global view": case_of(torch.float64, 1, 3),
    "no local views": case_of(torch.float64, 2, 0),
}


@contextmanager
def operations() -> Iterator[list[tuple[str, list[list[int]]]]]:
    """Names of the operations done inside, with the shapes of what they were given."""
    found: list[tuple[str, list[list[int]]]] = []
    with torch.profiler.profile(record_shapes=True) as profile:
        yield found
    found += [(event.name, event.input_shapes) for event in profile.events() or []]


def collectives_of_large_loss(chunk_rows: int) -> int:
    """Of a loss of 5 views of 32 images of each rank and its backward."""
    features_VBD, prototypes_SD = torch.randn(5, 32, 4), torch.randn(32, 4)
    targets_GIS = sharded_targets(features_VBD[:2], prototypes_SD, torch.zeros(32), TEACHER_TEMP)
    leaves = features_VBD.requires_grad_(), prototypes_SD.requires_grad_()
    with operations() as found:
        sharded_cross_entropy(*leaves, targets_GIS, student_temp=1.0, chunk_rows=chunk_rows).backward()
    return sum(name.startswith("c10d::") for name, _ in found)


def everything() -> dict[str, Any]:
    """All that a rank is asked: starting ranks takes longer than the answers."""
    results: dict[str, Any] = {name: sharded(case) for name, case in CASES.items()}
    results["bfloat16"] = sharded(CASES["float32"], autocast=True)
    if world_size() == 2:
        results["collectives"] = {chunk_rows: collectives_of_large_loss(chunk_rows) for chunk_rows in (60, 1000)}
    return results


@cache
def on_ranks(num_ranks: int) -> list[dict[str, Any]]:
    return run_on_ranks(everything, world_size=num_ranks)


@pytest.fixture(params=[1, 2, 4], ids=lambda num: f"{num} ranks")
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return on_ranks(request.param)


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("name", CASES)
def test_every_rank_gets_the_loss_of_one_process(ranks, name: str) -> None:
    expected = unsharded(CASES[name])["loss"]
    for own in ranks:
        assert torch.equal(own[name]["loss"], ranks[0][name]["loss"])
        assert_near(own[name]["loss"], expected, TOLERANCE[expected.dtype])


@pytest.mark.parametrize("name", CASES)
def test_the_mean_over_ranks_of_the_backbones_gradients_is_that_of_one_process(ranks, name: str) -> None:
    expected = unsharded(CASES[name])["backbone"]
    for own in ranks:
        assert_near(own[name]["backbone"], expected, TOLERANCE[expected.dtype])


@pytest.mark.parametrize("name", CASES)
def test_the_shards_get_their_rows_of_the_gradient_of_one_process(ranks, name: str) -> None:
    expected = unsharded(CASES[name])["prototypes"]
    found = torch.cat([own[name]["prototypes"] for own in ranks])
    assert_near(found, expected, TOLERANCE[expected.dtype])


@pytest.mark.parametrize("kind", ["targets", "sinkhorn", "centers"])
@pytest.mark.parametrize("name", ["float64", "float32"])
def test_the_shards_hold_the_columns_of_one_process(ranks, name: str, kind: str) -> None:
    expected = unsharded(CASES[name])[kind]
    assert_near(torch.cat([own[name][kind] for own in ranks], dim=-1), expected, TOLERANCE[expected.dtype])


def test_autocast_changes_the_results_by_bfloat16s_rounding_only(ranks) -> None:
    expected = unsharded(CASES["float32"])
    for own in ranks:
        assert own["bfloat16"]["loss"].dtype == torch.float32
        assert_near(own["bfloat16"]["loss"], expected["loss"], BF16_TOLERANCE)
        assert_near(own["bfloat16"]["backbone"], expected["backbone"], 4 * BF16_TOLERANCE)
    gradient = torch.cat([own["bfloat16"]["prototypes"] for own in ranks])
    assert_near(gradient, expected["prototypes"], 4 * BF16_TOLERANCE)


def test_each_chunk_takes_one_collective_and_the_features_two() -> None:
    for own in on_ranks(2):
        assert own["collectives"] == {60: 2 + 6, 1000: 2 + 1}


def test_logits_exist_for_the_rows_of_a_chunk_only() -> None:
    features_VBD, prototypes_SD, targets_GIS = one_process_case(num_local=9, batch=4, num_prototypes=33)
    for chunk_rows in (7, 44):
        with operations() as found:
            loss = sharded_cross_entropy(
                features_VBD, prototypes_SD, targets_GIS, student_temp=STUDENT_TEMP, chunk_rows=chunk_rows
            )
            loss.backward()
        rows = [shape[0] for _, shapes in found for shape in shapes if len(shape) == 2 and shape[1] == 33]
        assert max(rows) == max(chunk_rows, 8)  # 8 are the rows of W, transposed


def test_prototypes_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(UserError, match="num_prototypes: 7 cannot be shared out equally over 2 workers"):
        shard_rows(7, 0, 2)


@given(share=st.integers(0, 9), num_ranks=st.integers(1, 9))
def test_the_shares_follow_each_other_and_cover_all_prototypes(share: int, num_ranks: int) -> None:
    rows = list(range(share * num_ranks))
    shares = [rows[shard_rows(len(rows), own, num_ranks)] for own in range(num_ranks)]
    assert [row for own in shares for row in own] == rows
    assert {len(own) for own in shares} == {share}


def one_process_case(num_local: int = 3, batch: int = 4, num_prototypes: int = 33) -> tuple[Tensor, Tensor, Tensor]:
    """Features and prototypes that need a gradient, and targets."""
    generator = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, 8, generator=generator, dtype=torch.float64), dim=-1)

    features_VBD, prototypes_SD = unit(2 + num_local, batch), unit(num_prototypes)
    targets_GIS = F.softmax(unit(2, batch) @ prototypes_SD.T / TEACHER_TEMP, dim=-1)
    return features_VBD.requires_grad_(), prototypes_SD.requires_grad_(), targets_GIS


def assert_same_value_and_gradients(found: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    for own, wanted in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert_near(own, wanted, 1e-10)


@settings(deadline=None)  # the machine may be busy
@given(num_local=st.integers(0, 4), batch=st.integers(1, 5), chunk_rows=st.integers(1, 40), block=st.integers(1, 9))
def test_chunks_and_blocks_of_any_size_change_nothing(num_local: int, batch: int, chunk_rows: int, block: int) -> None:
    features_VBD, prototypes_SD, targets_GIS = one_process_case(num_local, batch)
    block_bytes = block * len(prototypes_SD) * prototypes_SD.element_size()
    with patch.object(logit_chunks, "BLOCK_BYTES", block_bytes):
        arguments = features_VBD, prototypes_SD, targets_GIS
        found = sharded_cross_entropy(*arguments, student_temp=STUDENT_TEMP, chunk_rows=chunk_rows)
    logits_VIK = features_VBD @ prototypes_SD.T
    # Logarithms of the targets are logits that give them.
    teacher, no_center = [targets_GIS.log()], torch.zeros(1, len(prototypes_SD))
    expected = part_distillation_loss([logits_VIK], teacher, no_center, student_temp=STUDENT_TEMP, teacher_temp=1.0)
    assert_same_value_and_gradients(found, expected, [features_VBD, prototypes_SD])


def test_rows_of_targets_that_do_not_sum_to_one_count_by_their_sum() -> None:
    features_VBD, prototypes_SD, targets_GIS = one_process_case()
    targets_GIS = targets_GIS * torch.rand(2, 4, 1, dtype=torch.float64)
    log_prob_VIS = F.log_softmax(features_VBD @ prototypes_SD.T / STUDENT_TEMP, dim=-1)
    pairs = [-(targets_GIS[g] * log_prob_VIS[v]).sum(-1).mean() for g in range(2) for v in range(5) if v != g]
    found = sharded_cross_entropy(features_VBD, prototypes_SD, targets_GIS, student_temp=STUDENT_TEMP)
    assert_same_value_and_gradients(found, torch.stack(pairs).mean(), [features_VBD, prototypes_SD])


@pytest.mark.parametrize("factor", [-3.0, 65536.0])
def test_an_incoming_gradient_scales_the_gradients(factor: float) -> None:
    features_VBD, prototypes_SD, targets_GIS = one_process_case()
    leaves = [features_VBD, prototypes_SD]
    losses = [
        sharded_cross_entropy(features_VBD, prototypes_SD, targets_GIS, student_temp=STUDENT_TEMP) for _ in range(2)
    ]
    once, scaled = torch.autograd.grad(losses[0], leaves), torch.autograd.grad(losses[1] * factor, leaves)
    for own, wanted in zip(scaled, once, strict=True):
        torch.testing.assert_close(own, factor * wanted)


def test_a_second_backward_is_refused() -> None:
    features_VBD, prototypes_SD, targets_GIS = one_process_case()
    loss = sharded_cross_entropy(features_VBD, prototypes_SD, targets_GIS, student_temp=STUDENT_TEMP)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


@pytest.mark.parametrize("needs_gradient", [(False, False), (True, False), (False, True), (True, True)])
def test_only_the_wanted_gradients_are_computed(needs_gradient: tuple[bool, bool]) -> None:
    features_VBD, prototypes_SD, targets_GIS = one_process_case()
    expected = sharded_cross_entropy(features_VBD, prototypes_SD, targets_GIS, student_temp=STUDENT_TEMP)
    for leaf, needs in zip((features_VBD, prototypes_SD), needs_gradient, strict=True):
        leaf.requires_grad_(needs)
    with operations() as done:
        found = sharded_cross_entropy(features_VBD, prototypes_SD, targets_GIS, student_temp=STUDENT_TEMP)
    assert sum(name in ("aten::mm", "aten::addmm_") for name, _ in done) == 1 + sum(needs_gradient)
    assert found.requires_grad == any(needs_gradient)
    assert torch.equal(found, expected)


def test_logits_far_beyond_exps_range_give_finite_results() -> None:
    features_VBD, prototypes_SD, targets_GIS = one_process_case()
    far_VBD, near_SD = (features_VBD.detach().float() * 1e4).requires_grad_(), prototypes_SD.detach().float()
    loss = sharded_cross_entropy(far_VBD, near_SD, targets_GIS.float(), student_temp=STUDENT_TEMP)
    assert bool(loss.isfinite() & torch.autograd.grad(loss, far_VBD)[0].isfinite().all())
    far_targets_GIS = sharded_targets(far_VBD[:2], near_SD, torch.zeros(33), TEACHER_TEMP)
    torch.testing.assert_close(far_targets_GIS.sum(-1), torch.ones(2, 4))


def test_the_inputs_stay_as_they_are_and_the_teacher_gets_no_gradient() -> None:
    features_VBD, prototypes_SD, targets_GIS = one_process_case()
    center_S = torch.zeros(33, dtype=torch.float64, requires_grad=True)
    tensors = [features_VBD, prototypes_SD, targets_GIS, center_S]
    before = [tensor.detach().clone() for tensor in tensors]
    teacher = features_VBD[:2], prototypes_SD
    results = [
        sharded_targets(*teacher, center_S, TEACHER_TEMP),
        sharded_sinkhorn(*teacher, TEACHER_TEMP),
        sharded_centers(center_S, *teacher, MOMENTUM),
    ]
    sharded_cross_entropy(features_VBD, prototypes_SD, targets_GIS, student_temp=STUDENT_TEMP).backward()
    assert not any(result.requires_grad for result in results)
    assert all(torch.equal(tensor, saved) for tensor, saved in zip(tensors, before, strict=True))


@pytest.mark.parametrize(
    ("features", "prototypes", "targets", "chunk_rows", "message"),
    [
        ((5, 4, 8), (9, 7), (2, 4, 9), 8, "do not fit"),
        ((5, 4, 8), (9, 8), (2, 4, 1), 8, "do not fit"),
        ((5, 4, 8), (9, 8), (2, 8, 9), 8, "do not fit"),
        ((5, 4, 8), (9, 8), (4, 9), 8, "do not fit"),
        ((1, 4, 8), (9, 8), (2, 4, 9), 8, "do not fit"),
        ((20, 8), (9, 8), (2, 4, 9), 8, "do not fit"),
        ((1, 4, 8), (9, 8), (1, 4, 9), 8, "no pair"),
        ((5, 4, 8), (9, 8), (2, 4, 9), 0, "chunk_rows"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(features, prototypes, targets, chunk_rows, message) -> None:
    tensors = torch.zeros(features), torch.zeros(prototypes), torch.zeros(targets)
    with pytest.raises(ValueError, match=message):
        sharded_cross_entropy(*tensors, student_temp=STUDENT_TEMP, chunk_rows=chunk_rows)


@pytest.mark.parametrize("num_columns", [1, 8])
def test_a_center_of_other_prototypes_is_refused(num_columns: int) -> None:
    teacher = torch.zeros(2, 4, 8), torch.zeros(9, 8)
    with pytest.raises(ValueError, match="does not fit"):
        sharded_targets(*teacher, torch.zeros(num_columns), TEACHER_TEMP)
    with pytest.raises(ValueError, match="does not fit"):
        sharded_centers(torch.zeros(num_columns), *teacher, MOMENTUM)
