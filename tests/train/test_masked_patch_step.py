"""Steps with the masked-patch loss: the same for any number of workers, and nothing without it."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from passreid_ray import distributed
from passreid_ray.errors import UserError
from passreid_ray.models.part_vit import PartViT, Stem
from passreid_ray.train.ema import Centering
from passreid_ray.train.pass_state import PassState
from passreid_ray.train.pass_step import StepSettings, Views, train_step
from passreid_ray.train.patch_masks import MaskedPatchConfig, draw_patch_masks
from passreid_ray.train.precision import Precision
from passreid_ray.train.sharing import Strategy, average_gradients
from tests.ranks import run_on_ranks
from tests.reference.literal_masked_patches import literal_masked_patch_loss
from tests.train.pass_fixtures import RATES, random_views, rank_slice, tiny_state

PATCH_PROTOTYPES = 20
ON = StepSettings(masked_patch=MaskedPatchConfig(weight=1.0, num_prototypes=PATCH_PROTOTYPES))
FEW = replace(ON, masked_patch=ON.masked_patch.model_copy(update={"share": 0.07}))
"""One masked view of sixteen: most workers and micro-batches have none."""


def patch_state(**settings: Any) -> PassState:
    return tiny_state(patch_prototypes=PATCH_PROTOTYPES, **settings)


Run = tuple[list[list[float]], dict[str, np.ndarray]]
"""Losses of each step, and the state at the end."""


@dataclass(frozen=True)
class Variant:
    """What a training run of a test is made of."""

    settings: StepSettings = ON
    stem: Stem = "patch"
    strategy: Strategy = "copies"

    def train(self, steps: int) -> Run:
        """Losses and state after some steps of a global batch of 8, by as many workers as there are ranks."""
        state = patch_state(stem=self.stem, strategy=self.strategy)
        rank, world_size = distributed.rank(), distributed.world_size()
        state.forward = average_gradients(state.forward)
        losses = []
        for step in range(steps):
            views = rank_slice(random_views(8, seed=step), rank, world_size)
            metrics = train_step(state, views, RATES, self.settings, diagnose=step == 0)
            losses.append([float(value) for name, value in metrics.items() if "loss" in name or "patches" in name])
        return losses, {name: distributed.gathered(value).detach().numpy() for name, value in state.tensors().items()}


def _assert_equal(variant: Variant, losses: list[list[float]], expected: dict[str, np.ndarray]) -> None:
    found, tensors = variant.train(steps=len(losses))
    for own, wanted in zip(found, losses, strict=True):
        np.testing.assert_allclose(own, wanted, rtol=1e-9, atol=1e-12)
    assert tensors.keys() == expected.keys()
    for name, value in tensors.items():
        difference = np.abs(value - expected[name])
        if name.endswith("attn.qkv.bias") and not name.startswith("optimizer.step"):
            difference[24:48] = 0  # the K third has no gradient but rounding, which Adam turns into steps
        assert float(difference.max()) <= 1e-9, name


VARIANTS = {
    "mean": Variant(),
    "sinkhorn": Variant(replace(ON, centering="sinkhorn")),
    "no mask on a worker": Variant(FEW),
    "no mask on a worker, sinkhorn": Variant(replace(FEW, centering="sinkhorn")),
    "micro-batches": Variant(replace(FEW, num_micro_batches=2)),
    "ics": Variant(stem="ics"),
    "sharded prototypes": Variant(strategy="sharded_prototypes"),
}


def _assert_all_equal(runs: dict[str, Run]) -> None:
    for name, run in runs.items():
        _assert_equal(VARIANTS[name], *run)


def test_two_workers_equal_one_with_the_doubled_batch() -> None:
    # One start of the ranks for all of them: it takes longer than the steps.
    runs = {name: variant.train(steps=4) for name, variant in VARIANTS.items()}
    run_on_ranks(_assert_all_equal, runs)


@pytest.mark.parametrize("settings", [ON, FEW, replace(ON, centering="sinkhorn")], ids=["on", "few", "sinkhorn"])
def test_micro_batches_equal_the_whole_batch(settings: StepSettings) -> None:
    losses, tensors = Variant(settings).train(steps=3)
    _assert_equal(Variant(replace(settings, num_micro_batches=4)), losses, tensors)


def patches_of(backbone: PartViT, images_BCHW: Tensor, hidden_M: Tensor | None, mask_token: Tensor) -> Tensor:
    """All patches out of the trunk, ``(B * L, D)``, block by block; some of them hidden."""
    patches_BLD = backbone.patch_embed(images_BCHW).flatten(1, 2).flatten(0, 1)
    rows = [mask_token[0] if hidden_M is not None and n in hidden_M else own for n, own in enumerate(patches_BLD)]
    patches_BLD = torch.stack(rows).unflatten(0, (len(images_BCHW), -1)) + backbone.pos_embed
    tokens_BND = torch.cat([backbone._prefix(len(images_BCHW), None), patches_BLD], dim=1)
    for block in backbone.blocks:
        tokens_BND = block(tokens_BND)
    return backbone.norm(tokens_BND)[:, backbone.num_tokens :].flatten(0, 1)


@pytest.mark.parametrize("settings", [ON, replace(ON, num_micro_batches=2)], ids=["whole", "micro-batches"])
def test_the_loss_and_the_centers_are_those_of_the_loops(settings: StepSettings) -> None:
    state, views = patch_state(drop_path=0.0), random_views(4, seed=0)
    student, teacher = state.student, state.teacher
    assert student.patches is not None
    assert teacher.patches is not None
    assert state.patch_centers_1K is not None
    with torch.no_grad():
        student.patches.mask_token.normal_()
        teacher.patches.head.get_parameter("mlp_cls.0.weight").add_(0.3)
        state.patch_centers_1K.normal_(std=0.1)
        old_center_K = state.patch_centers_1K[0].clone()
        masks = draw_patch_masks(
            settings.masked_patch,
            (4, 2),
            seed=settings.seed,
            step=0,
            batch=4,
            num_global=2,
            num_micro_batches=1,
            device=state.device,
        )
        patches_M = masks.micro_batches[0].patches_M
        images_BCHW = views.global_BGCHW.transpose(0, 1).flatten(0, 1)
        logits = []
        for model, hidden_M in ((student, patches_M), (teacher, None)):
            assert model.patches is not None
            rows_MD = patches_of(model.backbone, images_BCHW, hidden_M, student.patches.mask_token)[patches_M]
            logits.append(model.patches.head([rows_MD])[0])
        _, patches_of_views = torch.unique_consecutive(patches_M // 8, return_counts=True)
        of_student, of_teacher = (own_MK.split(patches_of_views.tolist()) for own_MK in logits)
        expected = literal_masked_patch_loss(
            of_student, of_teacher, old_center_K, settings.student_temp, RATES.teacher_temp
        )
    metrics = train_step(state, views, RATES, settings)
    assert float(metrics["loss/patches"]) == pytest.approx(float(expected), rel=1e-10)
    torch.testing.assert_close(state.patch_centers_1K[0], 0.9 * old_center_K + 0.1 * logits[1].mean(0))


def test_the_weight_scales_the_gradient_of_the_patch_head_and_the_loss_stays_that_of_tokens() -> None:
    gradients, losses = [], []
    for weight in (1.0, 3.0):
        state = patch_state()
        assert state.student.patches is not None
        prototypes = state.student.patches.prototypes().weight_v
        kept: list[Tensor] = []
        prototypes.register_post_accumulate_grad_hook(lambda own, kept=kept: kept.append(own.grad.clone()))
        masked_patch = ON.masked_patch.model_copy(update={"weight": weight})
        metrics = train_step(state, random_views(4, seed=0), RATES, replace(ON, masked_patch=masked_patch))
        gradients += kept
        losses.append([float(metrics[name]) for name in ("loss", "loss/cls", "loss/patches")])
        tokens = [float(metrics[f"loss/{name}"]) for name in ("cls", "part0", "part1", "part2")]
        assert min(tokens) < losses[-1][0] < max(tokens)
    torch.testing.assert_close(gradients[1], 3 * gradients[0])
    assert losses[0] == losses[1]


def test_without_weight_there_is_no_trace_of_it() -> None:
    state = tiny_state()
    metrics = train_step(state, random_views(4, seed=0), RATES, StepSettings(), diagnose=True)
    assert not [name for name in (*metrics, *state.tensors()) if "patch" in name and "patch_embed" not in name]


def test_the_state_has_the_patch_head_of_both_its_centers_and_its_optimiser() -> None:
    state = patch_state()
    train_step(state, random_views(4, seed=0), RATES, ON)
    plain = tiny_state()
    train_step(plain, random_views(4, seed=0), RATES, StepSettings())
    names = state.tensors().keys() - plain.tensors().keys()
    assert "patch_centers" in names
    for prefix in ("student", "teacher", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
        assert f"{prefix}.patches.mask_token" in names
        assert f"{prefix}.patches.head.last_layer_cls.weight_v" in names
    assert all("patches." in name for name in names - {"patch_centers"})


def test_a_state_that_is_put_back_takes_the_same_steps() -> None:
    state, again = patch_state(), patch_state()
    train_step(state, random_views(4, seed=0), RATES, ON)
    again.load({name: own.clone() for name, own in state.tensors().items()}, state.meta(), "run/step_1")
    for own in (state, again):
        train_step(own, random_views(4, seed=1), RATES, ON)
    expected = again.tensors()
    assert all(torch.equal(value, expected[name]) for name, value in state.tensors().items())


def test_a_checkpoint_without_a_patch_head_is_not_taken_for_one_with() -> None:
    plain = tiny_state()
    with pytest.raises(UserError, match=r"no tensor 'patches\.head.*another run name"):
        patch_state().load(plain.tensors(), plain.meta(), "run/step_1")


def test_the_teachers_patch_head_is_the_moving_average_and_its_mask_token_too() -> None:
    state = patch_state()
    assert state.teacher.patches is not None
    assert state.student.patches is not None
    old = [parameter.clone() for parameter in state.teacher.patches.parameters()]
    train_step(state, random_views(4, seed=0), RATES, ON)
    pairs = zip(state.teacher.patches.parameters(), old, state.student.patches.parameters(), strict=True)
    for teacher, before, student in pairs:
        assert not teacher.requires_grad
        torch.testing.assert_close(teacher, 0.99 * before + 0.01 * student, rtol=0, atol=1e-12)
    assert bool(state.student.patches.mask_token.any())


def test_a_frozen_last_layer_is_that_of_the_patches_too() -> None:
    state = patch_state()
    frozen = [parameter.clone() for parameter in state.student.last_layer_parameters()]
    train_step(state, random_views(4, seed=0), replace(RATES, is_last_layer_frozen=True), ON)
    assert len(frozen) == 10
    assert all(map(torch.equal, frozen, state.student.last_layer_parameters()))


def with_a_nan(views: Views) -> Views:
    views.global_BGCHW[0, 0, 0, 0, 0] = math.nan
    return views


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    state = patch_state()
    train_step(state, random_views(4, seed=0), RATES, ON)
    before = {name: value.clone() for name, value in state.tensors().items()}
    train_step(state, with_a_nan(random_views(4, seed=1)), RATES, ON)
    assert state.refused_steps == 1
    assert all(torch.equal(value, before[name]) for name, value in state.tensors().items())


def test_diagnosis_splits_the_loss_into_entropy_and_divergence() -> None:
    metrics = train_step(patch_state(), random_views(4, seed=0), RATES, replace(ON, num_micro_batches=2), diagnose=True)
    assert 0 < metrics["teacher_entropy/patches"] <= math.log(PATCH_PROTOTYPES) + 1e-6
    assert metrics["kl/patches"] >= 0
    total = metrics["teacher_entropy/patches"] + metrics["kl/patches"]
    assert float(total) == pytest.approx(float(metrics["loss/patches"]))


def test_recomputed_activations_take_the_same_step() -> None:
    states = [patch_state(), patch_state()]
    states[0].student.backbone.use_activation_checkpointing(True)
    for state in states:
        train_step(state, random_views(4, seed=0), RATES, ON)
    kept, recomputed = (state.tensors() for state in states)
    for name, value in kept.items():
        torch.testing.assert_close(recomputed[name], value, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_follows_the_losses_of_fp32(precision: Precision, centering: Centering) -> None:
    def losses(precision: Precision) -> list[float]:
        state = patch_state(dtype=torch.float32)
        settings = replace(ON, precision=precision, centering=centering)
        steps = (train_step(state, random_views(4, step, torch.float32), RATES, settings) for step in range(4))
        found = [float(metrics["loss/patches"]) for metrics in steps]
        assert state.refused_steps == 0
        assert all(value.dtype in (torch.float32, torch.long) for value in state.tensors().values())
        return found

    got, exact = losses(precision), losses("fp32")
    assert got != exact
    np.testing.assert_allclose(got, exact, rtol=0.05)


def test_the_student_learns_to_predict_hidden_patches() -> None:
    state, views = patch_state(dtype=torch.float32, drop_path=0.0), random_views(4, 0, torch.float32)
    with torch.no_grad():
        assert state.teacher.patches is not None
        # A teacher that stays, and tells patches apart.
        state.teacher.patches.head.get_parameter("mlp_cls.0.weight").normal_()
    rates = replace(RATES, teacher_momentum=1.0, lr=3e-3)
    settings = replace(ON, center_momentum=1.0)
    divergences = [float(train_step(state, views, rates, settings, diagnose=True)["kl/patches"]) for _ in range(60)]
    assert np.mean(divergences[-5:]) < 0.6 * np.mean(divergences[:5])
