import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from passreid_ray import distributed
from passreid_ray.losses import centered_targets, distillation_diagnostics
from passreid_ray.models import PartViT, PrototypeHead
from passreid_ray.models.part_vit import Stem
from passreid_ray.models.pass_model import PassModel
from passreid_ray.train.ema import Centering
from passreid_ray.train.optimizer import clip_gradients
from passreid_ray.train.pass_rates import PassRates
from passreid_ray.train.pass_state import PassState, new_state
from passreid_ray.train.pass_step import StepSettings, Views, train_step
from passreid_ray.train.precision import Precision
from passreid_ray.train.sharing import Strategy, average_gradients
from passreid_ray.views import PixelStatistics, normalize
from tests.ranks import run_on_ranks
from tests.train.pass_fixtures import RATES, random_views, rank_slice, tiny_state

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "pass_train_steps.npz")
META = json.loads(str(GOLDEN["meta"]))
STEPS = ("step0", "step1")
TOKENS = ("cls", "pt1", "pt2", "pt3")


def golden_model() -> PassModel:
    backbone = PartViT(
        "vit_tiny_patch16_224",
        image_size=tuple(META["img"]),
        official_pos_resize=True,
        embed_dim=META["embed_dim"],
        depth=META["depth"],
        num_heads=META["heads"],
    )
    head = PrototypeHead(META["embed_dim"], META["out_dim"], META["head_hidden"], META["bottleneck"])
    model = PassModel(backbone, head)
    model.load_state_dict({key: torch.from_numpy(GOLDEN[f"student_sd0/{key}"]) for key in model.state_dict()})
    return model


def golden_state() -> PassState:
    student, teacher = golden_model(), golden_model()
    return new_state(student, teacher, META["out_dim"], torch.device("cpu"), fp16=False)


def golden_views(step: str) -> Views:
    crops = [normalize(torch.from_numpy(GOLDEN[f"{step}/crop_u8/{view:02d}"]), PixelStatistics()) for view in range(11)]
    return Views(torch.stack(crops[:2], dim=1), torch.stack(crops[2:], dim=1).unflatten(1, (3, 3)))


def golden_rates(step: str) -> PassRates:
    epoch = int(GOLDEN[f"{step}/epoch"])
    temps = np.linspace(META["warmup_teacher_temp"], META["teacher_temp"], META["warmup_teacher_temp_epochs"])
    return PassRates(
        lr=float(GOLDEN[f"{step}/lr"]),
        weight_decay=float(GOLDEN[f"{step}/wd"]),
        teacher_momentum=float(GOLDEN[f"{step}/momentum"]),
        teacher_temp=float(temps[epoch]),
        is_last_layer_frozen=epoch < META["freeze_last_layer"],
    )


def test_two_steps_of_the_reference_are_reproduced(monkeypatch: pytest.MonkeyPatch) -> None:
    state = golden_state()
    grads: dict[str, torch.Tensor] = {}

    def remember_then_clip(*arguments: Any) -> None:
        named = state.student.named_parameters()
        grads.update({name: own.grad.clone() for name, own in named if own.grad is not None})
        clip_gradients(*arguments)

    monkeypatch.setattr("passreid_ray.train.pass_step.clip_gradients", remember_then_clip)
    for step in STEPS:
        grads.clear()
        settings = StepSettings(clip_norm=float(GOLDEN[f"{step}/clip"]))
        metrics = train_step(state, golden_views(step), golden_rates(step), settings)

        assert float(metrics["loss"]) == pytest.approx(float(GOLDEN[f"{step}/loss"]), rel=1e-5)
        norms = dict(zip(GOLDEN[f"{step}/grad_norm_names"], GOLDEN[f"{step}/grad_norms_preclip"], strict=True))
        assert set(grads) == {name for name, norm in norms.items() if not math.isnan(norm)}
        for name, grad in grads.items():
            assert float(grad.norm()) == pytest.approx(norms[name], rel=1e-4)
        stored = [key for key in GOLDEN.files if key.startswith(f"{step}/grad/")]
        assert len(stored) == 10
        for key in stored:
            expected = torch.from_numpy(GOLDEN[key])
            difference = (grads[key.removeprefix(f"{step}/grad/")] - expected).norm() / expected.norm()
            assert difference < 1e-4, key
        for token, center_K in zip(TOKENS, state.centers_TK, strict=True):
            np.testing.assert_allclose(center_K.numpy(), GOLDEN[f"{step}/center_{token}"][0], atol=1e-6)

    width = META["embed_dim"]
    for name, model in (("student", state.student), ("teacher", state.teacher)):
        for key, value in model.state_dict().items():
            difference = (value - torch.from_numpy(GOLDEN[f"{name}_sd2/{key}"])).abs()
            if key.endswith("attn.qkv.bias"):
                # The gradient of its K third is zero but for rounding, which Adam turns into whole steps.
                difference[width : 2 * width] = 0
            assert float(difference.max()) < 1e-6, (name, key)


def test_the_reference_decays_and_exempts_the_same_parameters() -> None:
    state = golden_state()
    names = {parameter: name for name, parameter in state.student.named_parameters()}
    decayed, exempt = ({names[p] for p in group["params"]} for group in state.optimizer.param_groups)
    assert decayed == set(GOLDEN["group0_regularized"]) - {name for name in names.values() if "weight_g" in name}
    assert exempt == set(GOLDEN["group1_not_regularized"])


PLAIN = StepSettings()
BALANCED_IN_PARTS = StepSettings(centering="sinkhorn", clip="global", clip_norm=0.1, num_micro_batches=2)


@dataclass(frozen=True)
class Variant:
    """What a training run of a test is made of."""

    dtype: torch.dtype = torch.float64
    stem: Stem = "patch"
    head_batch_norm: bool = False
    settings: StepSettings = PLAIN
    strategy: Strategy = "copies"

    def train(self, steps: int) -> tuple[list[float], dict[str, np.ndarray]]:
        """Losses and state after some steps of a global batch of 8, by as many workers as there are ranks."""
        state = tiny_state(
            stem=self.stem, dtype=self.dtype, head_batch_norm=self.head_batch_norm, strategy=self.strategy
        )
        rank, world_size = distributed.rank(), distributed.world_size()
        state.forward = average_gradients(state.forward)
        losses = []
        for step in range(steps):
            views = rank_slice(random_views(8, seed=step, dtype=self.dtype), rank, world_size)
            losses.append(float(train_step(state, views, RATES, self.settings)["loss"]))
        return losses, {name: distributed.gathered(value).detach().numpy() for name, value in state.tensors().items()}


def _assert_equal_to_one_worker(
    variant: Variant, tolerance: float, losses: list[float], expected: dict[str, np.ndarray]
) -> None:
    got_losses, tensors = variant.train(steps=len(losses))
    np.testing.assert_allclose(got_losses, losses, rtol=tolerance)
    assert tensors.keys() == expected.keys()
    for name, value in tensors.items():
        difference = np.abs(value - expected[name])
        if name.endswith("attn.qkv.bias") and not name.startswith("optimizer.step"):
            difference[24:48] = 0  # the K third, see above
        assert float(difference.max()) <= tolerance, name


@pytest.mark.parametrize(
    ("variant", "tolerance"),
    [
        (Variant(), 1e-9),
        (Variant(stem="ics"), 1e-9),
        (Variant(head_batch_norm=True, settings=StepSettings(centering="sinkhorn", koleo_weight=0.1)), 1e-9),
        (Variant(dtype=torch.float32), 1e-5),
        (Variant(strategy="sharded_prototypes"), 1e-9),
        (Variant(strategy="fsdp", stem="ics"), 1e-9),
        (Variant(strategy="fsdp", settings=BALANCED_IN_PARTS), 1e-9),
    ],
    ids=[
        "float64",
        "float64-ics-stem",
        "float64-sinkhorn-koleo-head-batch-norm",
        "float32",
        "float64-sharded-prototypes",
        "float64-fsdp-ics-stem",
        "float64-fsdp-sinkhorn-global-clip-micro-batches",
    ],
)
def test_two_workers_equal_one_with_the_doubled_batch_over_20_steps(variant: Variant, tolerance: float) -> None:
    losses, tensors = variant.train(steps=20)
    assert losses[0] != losses[-1]
    run_on_ranks(_assert_equal_to_one_worker, variant, tolerance, losses, tensors, world_size=2)


def test_a_token_counts_as_its_weight_says() -> None:
    views = random_views(4, seed=0, dtype=torch.float64)
    metrics = train_step(
        tiny_state(dtype=torch.float64), views, RATES, StepSettings(token_weights=(2.0, 1.0, 0.0, 1.0))
    )
    terms_T = np.array([float(metrics[f"loss/{token}"]) for token in ("cls", "part0", "part1", "part2")])
    share_T = np.array([2.0, 1.0, 0.0, 1.0]) * views.pairs_per_token
    assert float(metrics["loss"]) == pytest.approx(float(terms_T @ share_T / share_T.sum()), rel=1e-12)


def test_weights_that_are_all_the_same_change_nothing() -> None:
    losses, tensors = Variant().train(steps=3)
    same_losses, same = Variant(settings=StepSettings(token_weights=(2.0,) * 4)).train(steps=3)
    np.testing.assert_allclose(same_losses, losses, rtol=1e-12)
    for name, value in same.items():
        np.testing.assert_allclose(value, tensors[name], rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_micro_batches_equal_the_whole_batch(centering: Centering) -> None:
    whole_losses, whole = Variant(settings=StepSettings(centering=centering)).train(steps=3)
    losses, parts = Variant(settings=StepSettings(centering=centering, num_micro_batches=4)).train(steps=3)
    np.testing.assert_allclose(losses, whole_losses, rtol=1e-12)
    for name, value in parts.items():
        np.testing.assert_allclose(value, whole[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("stem", ["patch", "ics"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(stem: Stem) -> None:
    state = tiny_state(stem=stem)
    train_step(state, random_views(4, seed=0), RATES, StepSettings())
    before = {name: value.clone() for name, value in state.tensors().items()}
    views = random_views(4, seed=1)
    views.global_BGCHW[0, 0, 0, 0, 0] = math.nan
    train_step(state, views, RATES, StepSettings())
    for name, value in state.tensors().items():
        assert torch.equal(value, before[name]), name
    assert (state.step, state.refused_in_a_row, state.refused_steps) == (2, 1, 1)
    train_step(state, random_views(4, seed=2), RATES, StepSettings())
    assert (state.step, state.refused_in_a_row, state.refused_steps) == (3, 0, 1)


def _assert_all_refuse_when_one_is_not_finite() -> None:
    state = tiny_state()
    state.forward = average_gradients(state.forward)
    before = {name: value.clone() for name, value in state.tensors().items()}
    views = random_views(2, seed=distributed.rank())
    if distributed.rank() == 1:
        views.local_BPLCHW[0, 0, 0, 0, 0, 0] = math.inf
    train_step(state, views, RATES, StepSettings())
    assert state.refused_steps == 1
    for name, value in state.tensors().items():
        assert torch.equal(value, before[name]), name


def test_a_step_that_is_not_finite_on_one_worker_is_refused_by_all() -> None:
    run_on_ranks(_assert_all_refuse_when_one_is_not_finite, world_size=2)


def test_a_frozen_last_layer_stays_while_the_rest_learns() -> None:
    state = tiny_state()
    frozen = [parameter.clone() for parameter in state.student.head.last_layer_parameters()]
    rest = state.student.backbone.cls_token.clone()
    rates = PassRates(lr=1e-3, weight_decay=0.1, teacher_momentum=0.9, teacher_temp=0.05, is_last_layer_frozen=True)
    train_step(state, random_views(4, seed=0), rates, StepSettings())
    assert all(map(torch.equal, frozen, state.student.head.last_layer_parameters()))
    assert not torch.equal(rest, state.student.backbone.cls_token)


def test_only_the_heads_learn_during_their_warm_up() -> None:
    state = tiny_state()
    backbone = {name: value.clone() for name, value in state.student.backbone.state_dict().items()}
    head = {name: value.clone() for name, value in state.student.head.state_dict().items()}
    settings = StepSettings(head_warmup_steps=1)
    train_step(state, random_views(4, seed=0), RATES, settings)
    assert all(torch.equal(value, backbone[name]) for name, value in state.student.backbone.state_dict().items())
    assert any(not torch.equal(value, head[name]) for name, value in state.student.head.state_dict().items())
    train_step(state, random_views(4, seed=1), RATES, settings)
    assert not torch.equal(state.student.backbone.cls_token, backbone["cls_token"])


def test_the_teacher_is_the_moving_average_of_the_student() -> None:
    state = tiny_state()
    old = [parameter.clone() for parameter in state.teacher.parameters()]
    train_step(state, random_views(4, seed=0), RATES, StepSettings())
    for teacher, before, student in zip(state.teacher.parameters(), old, state.student.parameters(), strict=True):
        torch.testing.assert_close(teacher, 0.99 * before + 0.01 * student, rtol=0, atol=1e-12)


def test_diagnosis_names_every_token() -> None:
    metrics = train_step(tiny_state(), random_views(4, seed=0), RATES, StepSettings(), diagnose=True)
    for token in ("cls", "part0", "part1", "part2"):
        assert 0 < metrics[f"teacher_entropy/{token}"] <= math.log(32) + 1e-6
        assert metrics[f"kl/{token}"] >= 0
        assert metrics[f"feature_std/{token}"] > 0


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_diagnosis_is_that_of_all_logits(num_micro_batches: int) -> None:
    state, views = tiny_state(drop_path=0.0), random_views(4, seed=0)
    with torch.no_grad():
        state.teacher.head.get_parameter("mlp_cls.0.weight").add_(0.3)
        student, _ = state.student(views.global_BGCHW.transpose(0, 1))
        teacher, _ = state.teacher(views.global_BGCHW.transpose(0, 1))
    targets = centered_targets(teacher, state.centers_TK, RATES.teacher_temp)
    expected = distillation_diagnostics(student, targets, student_temp=PLAIN.student_temp)
    settings = StepSettings(num_micro_batches=num_micro_batches)
    metrics = train_step(state, views, RATES, settings, diagnose=True)
    for token, name in enumerate(("cls", "part0", "part1", "part2")):
        torch.testing.assert_close(metrics[f"teacher_entropy/{name}"], expected.teacher_entropy_T[token])
        torch.testing.assert_close(metrics[f"kl/{name}"], expected.divergence_T[token])


def test_the_state_is_named_after_the_models_not_what_wraps_them() -> None:
    state = tiny_state()
    names = state.student.state_dict().keys()
    assert {name for name in state.tensors() if not name.startswith("optimizer.")} == {
        "centers",
        *(f"student.{name}" for name in names),
        *(f"teacher.{name}" for name in names),
    }
    train_step(state, random_views(2, seed=0), RATES, PLAIN)
    learnt = {name for name, own in state.student.named_parameters() if own.requires_grad}
    assert {name.removeprefix("optimizer.exp_avg.") for name in state.tensors() if ".exp_avg." in name} == learnt


def test_recomputed_activations_take_the_same_steps() -> None:
    states = [tiny_state(), tiny_state()]
    states[0].student.backbone.use_activation_checkpointing(True)
    for state in states:
        for step in range(2):
            train_step(state, random_views(4, seed=step), RATES, PLAIN)
    kept, recomputed = (state.tensors() for state in states)
    for name, value in kept.items():
        torch.testing.assert_close(recomputed[name], value, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_follows_the_losses_of_fp32(precision: Precision) -> None:
    def losses(precision: Precision) -> list[float]:
        state = tiny_state(dtype=torch.float32)
        settings = StepSettings(precision=precision)
        steps = (train_step(state, random_views(4, step, torch.float32), RATES, settings) for step in range(5))
        return [float(metrics["loss"]) for metrics in steps]

    got, exact = losses(precision), losses("fp32")
    assert got != exact
    np.testing.assert_allclose(got, exact, rtol=0.05)
