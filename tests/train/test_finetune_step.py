"""A step of supervised tuning: two workers equal one, refused steps change nothing, and it learns."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from passreid_ray import distributed
from passreid_ray.models import PartViT
from passreid_ray.models.config import NeckConfig
from passreid_ray.train.finetune_optimizer import FinetuneOptimizerConfig
from passreid_ray.train.finetune_state import (
    FinetuneNetwork,
    FinetuneState,
    average_of,
    published_tensors,
    update_average,
)
from passreid_ray.train.finetune_step import FinetuneStepSettings, LabelledBatch, finetune_step
from passreid_ray.train.state_files import load_state, save_state
from passreid_ray.train.supervised_losses import LossesConfig, SupervisedLosses
from tests.ranks import run_on_ranks

IDS_B = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
IDENTITIES, LR, STEPS = 4, 0.01, 3
SETTINGS = FinetuneStepSettings(seed=5, average_decay=0.75)

OFF = {"identity": {"weight": 0}, "triplet": {"weight": 0}}
ALL = {
    "identity": {"weight": 1.0, "label_smoothing": 0.1},
    "am_softmax": {"weight": 0.1},
    "arcface": {"weight": 0.2},
    "cosface": {"weight": 0.05},
    "circle": {"weight": 0.05},
    "triplet": {"weight": 1.0},
    "sparse_pairwise": {"weight": 0.1},
    "average_k": {"weight": 0.5, "k": 2},
    "center": {"weight": 0.05},
}
CASES: dict[str, dict[str, Any]] = {
    "identity": OFF | {"identity": {"weight": 1.0}},
    "identity smoothed": OFF | {"identity": {"weight": 1.0, "label_smoothing": 0.2}},
    **{name: OFF | {name: {"weight": 1.0}} for name in ("am_softmax", "arcface", "cosface", "circle", "center")},
    "triplet soft": OFF | {"triplet": {"weight": 1.0, "margin": None}},
    "triplet 0.3": OFF | {"triplet": {"weight": 1.0, "margin": 0.3}},
    "triplet cosine": OFF | {"triplet": {"weight": 1.0, "margin": 0.3, "distance": "cosine"}},
    **{
        f"sparse_pairwise {positive}": OFF | {"sparse_pairwise": {"weight": 1.0, "positive": positive}}
        for positive in ("adaptive", "hard", "least_hard")
    },
    "average_k": OFF | {"average_k": {"weight": 1.0, "k": 2}},
    "all": ALL,
    "all, necks multi, mean": ALL,
    "all, nothing finite on rank 1": ALL,
}


def config_of(losses: dict[str, Any]) -> LossesConfig:
    """Settings as a preset with ``losses`` gives them: on top of the defaults of each loss."""
    return LossesConfig.model_validate(
        {name: own | losses.get(name, {}) for name, own in LossesConfig().model_dump().items()}
    )


def new_state(
    losses: dict[str, Any],
    *,
    neck: str = "single",
    fusion: str = "cat",
    drop_path: float = 0.3,
    keeps_average: bool = True,
    dtype: torch.dtype = torch.float64,  # so that rounding hides nothing
    **optimizer: Any,
) -> FinetuneState:
    torch.manual_seed(0)
    backbone = PartViT(
        "vit_tiny_patch16_224", image_size=(64, 32), embed_dim=24, depth=2, num_heads=2, drop_path=drop_path
    )
    model = NeckConfig.model_validate({"neck": neck, "fusion": fusion}).build(backbone)
    supervised = SupervisedLosses(config_of(losses), IDENTITIES, model.feature_width)
    network = FinetuneNetwork(model, supervised).to(dtype).train()
    config = FinetuneOptimizerConfig.model_validate({"lr": LR, "weight_decay": 1e-3, "layer_decay": 0.8} | optimizer)
    average = average_of(network.model) if keeps_average else None
    scaler = GradScaler("cpu", enabled=False)
    return FinetuneState(network, network, config.build(network, model.backbone), scaler, average=average)


def batch(step: int, dtype: torch.dtype = torch.float64) -> LabelledBatch:
    generator = torch.Generator().manual_seed(100 + step)
    images_BCHW = torch.randn(len(IDS_B), 3, 64, 32, dtype=torch.float64, generator=generator)
    return LabelledBatch((images_BCHW + IDS_B[:, None, None, None]).to(dtype), IDS_B)


def snapshot(state: FinetuneState) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.tensors().items()}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def options_of(case: str) -> dict[str, Any]:
    return {"neck": "multi", "fusion": "mean"} if "multi" in case else {}


def necks_of(case: str) -> list[str]:
    return ["bottleneck", *(f"bottleneck_pt{part}" for part in (1, 2, 3) if "multi" in case)]


Outcome = tuple[list[dict[str, float]], dict[str, Tensor], tuple[int, int]]


@cache
def outcome(case: str) -> Outcome:
    """Metrics of a few steps on this rank's share of the batches, then all tensors and the counts."""
    state = new_state(CASES[case], **options_of(case))
    if distributed.is_active():
        state.forward = DistributedDataParallel(state.network, forward_sync_buffers=False)
    share = len(IDS_B) // distributed.world_size()
    own = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    metrics = []
    for step in range(STEPS):
        whole = batch(step)
        if "rank 1" in case and step == 1:
            whole.images_BCHW[-1] = torch.nan
        found = finetune_step(state, LabelledBatch(whole.images_BCHW[own], IDS_B[own]), 2.0 * step, SETTINGS)
        metrics.append({name: float(value) for name, value in found.items()})
    return metrics, snapshot(state), (state.step, state.refused_steps)


def outcomes() -> dict[str, Outcome]:
    """Of every case, in one process group."""
    return {case: outcome(case) for case in CASES}


@pytest.fixture(scope="module")
def on_two_ranks() -> list[dict[str, Outcome]]:
    return run_on_ranks(outcomes)


def test_every_loss_of_the_settings_is_among_the_cases() -> None:
    assert ALL.keys() == LossesConfig.model_fields.keys()


@pytest.mark.parametrize("case", CASES)
def test_two_workers_equal_one(case: str, on_two_ranks: list[dict[str, Outcome]]) -> None:
    metrics, tensors, counts = outcome(case)
    assert counts == (STEPS, 1 if "rank 1" in case else 0)
    for of_rank in on_two_ranks:
        shared_metrics, shared, shared_counts = of_rank[case]
        assert shared_counts == counts
        torch.testing.assert_close(shared_metrics, metrics, rtol=1e-9, atol=1e-10, equal_nan="rank 1" in case)
        assert shared.keys() == tensors.keys()
        for name, value in tensors.items():
            torch.testing.assert_close(
                shared[name], value, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("case", CASES)
def test_steps_move_the_backbone_classifiers_centers_statistics_and_average(case: str) -> None:
    start, (_, end, _) = snapshot(new_state(CASES[case], **options_of(case))), outcome(case)
    still = {name for name, value in start.items() if torch.equal(value, end[name])}
    has_classifier = any(name.startswith("losses.classifiers.") for name in start)
    frozen = {f"{neck}.{own}" for neck in necks_of(case) for own in ("bias", "weight")[: 1 if has_classifier else 2]}
    assert still == {f"{side}.{name}" for side in ("model", "average") for name in frozen}


@pytest.mark.parametrize(("losses", "goal"), [({}, 0.3), (ALL, 0.7)], ids=["default", "all"])
def test_it_learns(losses: dict[str, Any], goal: float) -> None:
    state = new_state(losses, drop_path=0.0)
    found = [float(finetune_step(state, batch(0), 10.0, SETTINGS)["loss"]) for _ in range(15)]
    assert found[-1] < goal * found[0]


def test_metrics_are_the_weighted_terms_and_their_sum() -> None:
    state = new_state(ALL)
    metrics = finetune_step(state, batch(0), 10.0, SETTINGS)
    assert metrics.keys() == {"loss", "grad_norm"} | {f"loss/{name}" for name in ALL}
    total = sum(float(value) for name, value in metrics.items() if name.startswith("loss/"))
    assert float(metrics["loss"]) == pytest.approx(total, rel=1e-12)
    assert not any(value.requires_grad for value in metrics.values())


def test_the_epoch_decides_the_margins() -> None:
    found = [
        float(finetune_step(new_state(CASES["am_softmax"]), batch(0), epoch, SETTINGS)["loss"]) for epoch in (0, 5, 50)
    ]
    assert found[0] + 5 < found[1] == found[2]


def check_refused(state: FinetuneState, refused: LabelledBatch) -> None:
    before = snapshot(state)
    finetune_step(state, refused, 10.0, SETTINGS)
    assert (state.step, state.refused_in_a_row, state.refused_steps) == (2, 1, 1)
    assert all(parameter.grad is None for parameter in state.network.parameters())
    assert_same_bits(snapshot(state), before)
    finetune_step(state, batch(2), 10.0, SETTINGS)
    assert (state.step, state.refused_in_a_row, state.refused_steps) == (3, 0, 1)
    assert all(torch.isfinite(value).all() for value in state.tensors().values())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_step_whose_loss_is_not_finite_changes_nothing_but_the_counts(bad: float) -> None:
    state = new_state(ALL)
    finetune_step(state, batch(0), 10.0, SETTINGS)
    refused = batch(1)
    refused.images_BCHW[3, 0, 5, 5] = bad
    check_refused(state, refused)


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing_but_the_counts() -> None:
    state = new_state(ALL)
    finetune_step(state, batch(0), 10.0, SETTINGS)
    hook = state.network.model.backbone.cls_token.register_hook(lambda gradient: gradient * torch.inf)
    before = snapshot(state)
    metrics = finetune_step(state, batch(1), 10.0, SETTINGS)
    hook.remove()
    assert torch.isfinite(metrics["loss"])
    assert state.refused_steps == 1
    assert_same_bits(snapshot(state), before)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_saved_state_goes_on_to_the_bit(kind: str, tmp_path: Path) -> None:
    whole = new_state(ALL, kind=kind)
    for step in range(2):
        finetune_step(whole, batch(step), 10.0, SETTINGS)
    whole.best_mAP = 0.25
    save_state(tmp_path, whole.tensors(), whole.meta())
    again = new_state(ALL, kind=kind)
    again.load(*load_state(tmp_path), str(tmp_path))
    assert (again.step, again.best_mAP) == (2, 0.25)
    for step in range(2, 4):
        for state in (whole, again):
            finetune_step(state, batch(step), 10.0, SETTINGS)
    assert_same_bits(snapshot(again), snapshot(whole))


def test_the_average_is_the_weighted_sum_of_all_weights_so_far_with_the_necks_of_the_last() -> None:
    state = new_state(ALL, neck="multi")
    assert state.average is not None
    expected = {name: own.detach().clone() for name, own in state.network.model.named_parameters()}
    for step in range(3):
        finetune_step(state, batch(step), 10.0, SETTINGS)
        for name, own in state.network.model.named_parameters():
            expected[name] = 0.75 * expected[name] + 0.25 * own.detach()
    for name, own in state.average.named_parameters():
        torch.testing.assert_close(own, expected[name], rtol=1e-12, atol=1e-14)
        assert not own.requires_grad
    assert_same_bits(dict(state.average.named_buffers()), dict(state.network.model.named_buffers()))


def test_an_average_without_memory_is_the_model_and_one_that_keeps_all_has_its_first_weights() -> None:
    model, other = new_state({}).network.model, copy.deepcopy(new_state({}).network.model)
    average = average_of(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    update_average(average, other, 1.0)
    assert_same_bits(dict(average.named_parameters()), dict(model.named_parameters()))
    update_average(average, other, 0.0)
    assert_same_bits(average.state_dict(), other.state_dict())


def test_the_average_is_published_where_it_is_kept_and_the_model_elsewhere() -> None:
    averaged, plain = new_state({}), new_state({}, keeps_average=False)
    for state in (averaged, plain):
        finetune_step(state, batch(0), 10.0, SETTINGS)
    assert averaged.published is averaged.average
    assert plain.published is plain.network.model
    for state in (averaged, plain):
        assert_same_bits(published_tensors(state.tensors()), state.published.state_dict())
    assert published_tensors({"student.x": torch.ones(1)}) == {}


def test_clipping_bounds_the_length_of_a_step() -> None:
    options: dict[str, Any] = {
        "momentum": 0.0,
        "weight_decay": 0.0,
        "layer_decay": 1.0,
        "bias_lr_factor": 1.0,
        "clip_norm": 0.5,
    }
    config = FinetuneOptimizerConfig.model_validate({"lr": LR} | options)
    state = new_state(ALL, **options)
    before = [parameter.detach().clone() for parameter in state.network.parameters()]
    settings = FinetuneStepSettings(seed=5, clip_norm=config.clip_norm)
    norm = finetune_step(state, batch(0), 10.0, settings)["grad_norm"]
    moves = [new.detach() - old for new, old in zip(state.network.parameters(), before, strict=True)]
    assert float(norm) > 1
    assert float(torch.cat([move.ravel() for move in moves]).norm()) == pytest.approx(LR * 0.5, rel=1e-5)


def test_mixed_precision_computes_features_in_half_and_losses_in_whole() -> None:
    state = new_state(ALL, dtype=torch.float32)
    own, twin = batch(0, torch.float32), copy.deepcopy(state.network)
    with torch.autocast("cpu", torch.bfloat16):
        noise = torch.rand(2, 2, len(IDS_B), generator=torch.Generator().manual_seed(SETTINGS.seed << 32))
        features = twin(own.images_BCHW, noise)
    expected = twin.double().losses.terms(type(features)(*(side.double() for side in features)), IDS_B, 10.0)
    whole = finetune_step(new_state(ALL, dtype=torch.float32), own, 10.0, SETTINGS)
    metrics = finetune_step(state, own, 10.0, FinetuneStepSettings("bf16", SETTINGS.seed, None, 0.75))
    assert {value.dtype for value in metrics.values()} == {torch.float32}
    for name, value in expected.items():
        # bfloat16 has 8 bits: a loss in it would be wrong by 4e-3.
        assert float(metrics[f"loss/{name}"]) == pytest.approx(value.item(), rel=2e-5), name
        assert float(metrics[f"loss/{name}"]) == pytest.approx(float(whole[f"loss/{name}"]), rel=0.1), name
    assert float(metrics["loss"]) != float(whole["loss"])
    assert {value.dtype for value in state.tensors().values() if value.is_floating_point()} == {torch.float32}


def test_grids_keep_padding_out_of_the_step() -> None:
    grids_B2 = torch.tensor([[3, 2], [4, 1]] * 4)  # rows and columns of patches of 16 px
    clean, padded = batch(0), batch(0)
    padded.images_BCHW[0::2, :, 48:] = 7.0
    padded.images_BCHW[1::2, :, :, 16:] = -7.0
    found = []
    for own in (clean, padded):
        state = new_state(ALL)
        metrics = finetune_step(state, LabelledBatch(own.images_BCHW, IDS_B, grids_B2), 10.0, SETTINGS)
        found.append((metrics, snapshot(state)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-12, atol=1e-14)
    without = finetune_step(new_state(ALL), clean, 10.0, SETTINGS)["loss"]
    assert abs(float(without - found[0][0]["loss"])) > 1e-3
