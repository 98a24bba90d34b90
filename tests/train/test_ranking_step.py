"""A step of the ranking loss: micro-batches and workers change nothing, necks and classifiers stay."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from passreid_ray import distributed
from passreid_ray.losses import ranking_loss
from passreid_ray.models import PartViT
from passreid_ray.models.config import NeckConfig
from passreid_ray.train.finetune_state import FinetuneNetwork, FinetuneState, average_of
from passreid_ray.train.finetune_step import FinetuneStepSettings, LabelledBatch
from passreid_ray.train.ranking_step import RankingNetwork, RankingSettings, ranking_step
from passreid_ray.train.supervised_losses import LossesConfig, SupervisedLosses
from tests.ranks import run_on_ranks

TRIPLETS, STEPS = 6, 3
SETTINGS = FinetuneStepSettings(seed=5, average_decay=0.75)
WHOLE = RankingSettings(margin=0.2)
LOSSES = LossesConfig.model_validate({"average_k": {"weight": 1, "k": 2}, "center": {"weight": 1}})
GRIDS_32 = torch.tensor([[4, 2], [3, 2], [4, 1]])


def new_state(*, drop_path: float = 0.3, fusion: str = "cat") -> FinetuneState:
    torch.manual_seed(0)
    backbone = PartViT(
        "vit_tiny_patch16_224", image_size=(64, 32), embed_dim=24, depth=2, num_heads=2, drop_path=drop_path
    )
    model = NeckConfig.model_validate({"fusion": fusion}).build(backbone)
    network = FinetuneNetwork(model, SupervisedLosses(LOSSES, 4, model.feature_width))
    network.double().train()  # so that rounding hides nothing
    optimizer = SGD(backbone.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
    scaler = GradScaler("cpu", enabled=False)
    return FinetuneState(network, RankingNetwork(model), optimizer, scaler, average=average_of(model))


def batch(step: int, own: slice = slice(None), *, has_grids: bool = False) -> LabelledBatch:
    """Queries, positives near them and negatives, of the triplets ``own``."""
    generator = torch.Generator().manual_seed(100 + step)
    query, near, other = torch.randn(3, TRIPLETS, 3, 64, 32, dtype=torch.float64, generator=generator)
    images_3TCHW = torch.stack([query, query + near, other])[:, own]
    grids_3T2 = GRIDS_32[torch.arange(3 * TRIPLETS) % 3 - torch.arange(3 * TRIPLETS) // TRIPLETS].unflatten(0, (3, -1))
    grids_B2 = grids_3T2[:, own].flatten(0, 1) if has_grids else None
    return LabelledBatch(
        images_3TCHW.flatten(0, 1), torch.zeros(3 * images_3TCHW.shape[1], dtype=torch.int64), grids_B2
    )


def snapshot(state: FinetuneState) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.tensors().items()}


def steps(num_micro_batches: int, has_grids: bool = False) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Metrics of a few steps on this rank's triplets, and all tensors after them."""
    state = new_state()
    if distributed.is_active():
        state.forward = DistributedDataParallel(state.forward, forward_sync_buffers=False)
    share = TRIPLETS // distributed.world_size()
    own = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    ranking = RankingSettings(WHOLE.margin, num_micro_batches)
    metrics = [ranking_step(state, batch(step, own, has_grids=has_grids), SETTINGS, ranking) for step in range(STEPS)]
    return [{name: float(value) for name, value in found.items()} for found in metrics], snapshot(state)


def outcomes() -> dict[int, tuple[list[dict[str, float]], dict[str, Tensor]]]:
    """For every number of micro-batches, in one process group; 3 triplets are not 4 parts, but 3."""
    return {num: steps(num) for num in (1, 2, 3, 4)}


@pytest.fixture(scope="module")
def at_once() -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    return steps(1)


@pytest.fixture(scope="module")
def on_two_ranks() -> list[Any]:
    return run_on_ranks(outcomes)


@pytest.mark.parametrize("num", [1, 2, 3, 4, 6])
def test_micro_batches_give_the_gradient_of_the_batch(num: int) -> None:
    def gradients(num: int) -> dict[str, Tensor]:
        state, kept = new_state(), {}
        for name, parameter in state.network.model.backbone.named_parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda own, name=name: kept.__setitem__(name, own.grad.detach().clone())
            )
        ranking_step(state, batch(0), SETTINGS, RankingSettings(WHOLE.margin, num))
        return kept

    # The loss of the whole batch from its features, without the step.
    state = new_state()
    backbone = state.network.model.backbone
    shape = (backbone.depth, 2, 3, TRIPLETS)
    noise_L23T = torch.rand(shape, generator=torch.Generator().manual_seed(SETTINGS.seed << 32))
    query, positive, negative = state.forward(batch(0).images_BCHW, noise_L23T.flatten(-2), None).chunk(3)
    ranking_loss(query, positive, negative, WHOLE.margin).backward()
    found = gradients(num)
    for name, parameter in backbone.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("num", [2, 3, 4, 6])
def test_micro_batches_give_the_weights_of_the_batch(num: int, at_once: Any) -> None:
    torch.testing.assert_close(steps(num), at_once, rtol=1e-10, atol=1e-12)


def test_micro_batches_take_their_own_grids(at_once: Any) -> None:
    whole = steps(1, has_grids=True)
    torch.testing.assert_close(steps(3, has_grids=True), whole, rtol=1e-10, atol=1e-12)
    assert abs(whole[0][0]["loss"] - at_once[0][0]["loss"]) > 1e-4


@pytest.mark.parametrize("num", [1, 2, 3, 4])
def test_two_workers_equal_one(num: int, at_once: Any, on_two_ranks: list[Any]) -> None:
    for of_rank in on_two_ranks:
        torch.testing.assert_close(of_rank[num], at_once, rtol=1e-9, atol=1e-11)


def test_the_loss_is_that_of_the_features_before_the_neck() -> None:
    state = new_state(drop_path=0.0, fusion="mean")
    own = batch(0)
    query, positive, negative = state.network(own.images_BCHW, None).before_BD.detach().chunk(3)
    expected = ranking_loss(query, positive, negative, WHOLE.margin)
    metrics = ranking_step(state, own, SETTINGS, WHOLE)
    assert metrics.keys() == {"loss", "loss/ranking", "grad_norm"}
    assert float(metrics["loss"]) == float(metrics["loss/ranking"]) == pytest.approx(float(expected), rel=1e-12)


def test_it_learns() -> None:
    state = new_state(drop_path=0.0)
    losses = [float(ranking_step(state, batch(0), SETTINGS, WHOLE)["loss"]) for _ in range(15)]
    assert losses[-1] < 0.3 * losses[0]


def test_necks_classifiers_and_centers_stay_and_the_backbone_and_its_average_move() -> None:
    state = new_state()
    before = snapshot(state)
    ranking_step(state, batch(0), SETTINGS, WHOLE)
    changed = {
        name for name, value in snapshot(state).items() if name in before and not torch.equal(value, before[name])
    }
    backbone = {name for name, _ in state.network.model.backbone.named_parameters()}
    assert changed == {f"{side}.backbone.{name}" for side in ("model", "average") for name in backbone}
    name = "backbone.norm.weight"
    expected = 0.75 * before[f"average.{name}"] + 0.25 * state.network.model.get_parameter(name)
    torch.testing.assert_close(state.tensors()[f"average.{name}"], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("num", [1, 3])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(num: int) -> None:
    state = new_state()
    ranking_step(state, batch(0), SETTINGS, WHOLE)
    before = snapshot(state)
    refused = batch(1)
    refused.images_BCHW[1] = torch.nan
    metrics = ranking_step(state, refused, SETTINGS, RankingSettings(num_micro_batches=num))
    assert not torch.isfinite(metrics["loss"])
    assert (state.step, state.refused_in_a_row, state.refused_steps) == (2, 1, 1)
    assert all(torch.equal(value, before[name]) for name, value in snapshot(state).items())
    ranking_step(state, batch(2), SETTINGS, WHOLE)
    assert (state.step, state.refused_in_a_row, state.refused_steps) == (3, 0, 1)


def test_mixed_precision_keeps_the_loss_in_whole() -> None:
    found = []
    for precision in ("fp32", "bf16"):
        state, own = new_state(), batch(0)
        state.network.float()
        state.average = None
        settings = FinetuneStepSettings(precision, 5)
        metrics = ranking_step(state, LabelledBatch(own.images_BCHW.float(), own.ids_B), settings, WHOLE)
        assert metrics["loss"].dtype == torch.float32
        found.append(float(metrics["loss"]))
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=0.05)
