"""The optimiser of supervised tuning: groups, and the learning rate of every step."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from passreid_ray.models import PartViT, ReidModel
from passreid_ray.models.config import NeckConfig
from passreid_ray.train.finetune_optimizer import FinetuneOptimizerConfig, reference_lr
from passreid_ray.train.finetune_state import FinetuneNetwork
from passreid_ray.train.supervised_losses import LossesConfig, SupervisedLosses

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "finetune_transreid.npz", allow_pickle=False)
REFERENCE_LR_E2 = GOLDEN["finetune_lr_used_in_epoch_1..120_then_after"]
"""Learning rate of weights and of biases in epochs 0 to 119, and after them."""
DEPTH = 3


def new_network() -> FinetuneNetwork:
    backbone = PartViT("vit_tiny_patch16_224", image_size=(64, 32), embed_dim=24, depth=DEPTH, num_heads=2)
    model: ReidModel = NeckConfig(neck="multi").build(backbone)
    return FinetuneNetwork(model, SupervisedLosses(LossesConfig(), 4, model.feature_width))


def built(config: FinetuneOptimizerConfig) -> tuple[FinetuneNetwork, Optimizer]:
    network = new_network()
    return network, config.build(network, network.model.backbone)


def lr_by_name(network: nn.Module, optimizer: Optimizer) -> dict[str, float]:
    """Learning rate of every parameter that the optimiser has."""
    lr_of = {id(own): group["lr"] for group in optimizer.param_groups for own in group["params"]}
    return {name: lr_of[id(own)] for name, own in network.named_parameters() if id(own) in lr_of}


def test_the_reference_curve_is_that_of_the_reference_code_in_every_epoch() -> None:
    found_E2 = [[reference_lr(epoch, factor, 4e-4, 120, 20) for factor in (1.0, 2.0)] for epoch in range(121)]
    np.testing.assert_allclose(found_E2, REFERENCE_LR_E2, rtol=1e-12, atol=0)


def test_an_optimizer_follows_the_reference_curve_through_all_steps_of_an_epoch() -> None:
    config = FinetuneOptimizerConfig(lr=4e-4, schedule="reference", warmup_epochs=20, bias_lr_factor=2.0)
    network, optimizer = built(config)
    for epoch, (of_weights, of_biases) in enumerate(REFERENCE_LR_E2):
        for step in (3 * epoch, 3 * epoch + 2):
            told = config.set_lr(optimizer, step, steps_per_epoch=3, epochs=120)
            assert told == pytest.approx(of_weights, rel=1e-12)
            for name, lr in lr_by_name(network, optimizer).items():
                assert lr == pytest.approx(of_biases if name.endswith("bias") else of_weights, rel=1e-12), name


def test_the_cosine_rises_over_the_warm_up_and_falls_to_its_final_share() -> None:
    config = FinetuneOptimizerConfig(lr=0.5, warmup_epochs=1, final_lr_share=0.1)
    _, optimizer = built(config)
    found = [config.set_lr(optimizer, step, steps_per_epoch=10, epochs=5) for step in (0, 3, 9, 10, 30, 50, 60)]
    assert found == pytest.approx([0.0, 0.5 / 3, 0.5, 0.5, 0.275, 0.05, 0.05], abs=1e-12)


def test_the_cosine_changes_at_every_step_and_a_fraction_of_an_epoch_counts() -> None:
    config = FinetuneOptimizerConfig(lr=1.0, warmup_epochs=0.5)
    _, optimizer = built(config)
    found = [config.set_lr(optimizer, step, steps_per_epoch=10, epochs=2) for step in range(20)]
    assert found[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert all(later < earlier for earlier, later in pairwise(found[5:]))


def test_a_warm_up_longer_than_the_run_is_all_of_the_run() -> None:
    config = FinetuneOptimizerConfig(lr=1.0, warmup_epochs=20)
    _, optimizer = built(config)
    found = [config.set_lr(optimizer, step, steps_per_epoch=5, epochs=1) for step in range(5)]
    assert found == pytest.approx([0, 0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize("schedule", ["cosine", "reference"])
def test_a_block_learns_at_its_share_of_the_block_behind_it(schedule: str) -> None:
    values = {"schedule": schedule, "lr": 1.0, "layer_decay": 0.5, "bias_lr_factor": 1.0, "warmup_epochs": 1}
    config = FinetuneOptimizerConfig.model_validate(values)
    network, optimizer = built(config)
    peak = config.set_lr(optimizer, 3, steps_per_epoch=2, epochs=4)
    shares = {
        "model.backbone.blocks.0.": 0.125,
        "model.backbone.blocks.1.": 0.25,
        "model.backbone.blocks.2.": 0.5,
        "model.backbone.norm.": 1.0,
        "model.backbone.": 0.0625,  # tokens, positions and stem
        "model.bottleneck": 1.0,
        "losses.classifiers.": 1.0,
    }
    found = lr_by_name(network, optimizer)
    met = set()
    for name, lr in found.items():
        prefix = next(prefix for prefix in shares if name.startswith(prefix))
        assert lr == pytest.approx(shares[prefix] * peak), name
        met.add(prefix)
    assert met == shares.keys()


def test_biases_learn_at_their_multiple_and_without_one_like_the_rest() -> None:
    for factor in (2.0, 1.0):
        config = FinetuneOptimizerConfig(lr=1.0, bias_lr_factor=factor, warmup_epochs=0)
        network, optimizer = built(config)
        config.set_lr(optimizer, 1, steps_per_epoch=4, epochs=2)
        found = lr_by_name(network, optimizer)
        of_weights = found["losses.classifiers.identity"]
        of_biases = {lr for name, lr in found.items() if name.endswith("bias")}
        assert of_biases == {factor * of_weights}
        assert {lr for name, lr in found.items() if not name.endswith("bias")} == {of_weights}


@pytest.mark.parametrize(("kind", "expected"), [("sgd", SGD), ("adamw", AdamW)])
def test_every_trained_parameter_is_in_one_group_and_frozen_ones_in_none(kind: str, expected: type) -> None:
    config = FinetuneOptimizerConfig.model_validate({"kind": kind, "layer_decay": 0.9, "weight_decay": 0.25})
    network = new_network()
    network.model.backbone.pos_embed.requires_grad_(False)
    optimizer = config.build(network, network.model.backbone)
    assert isinstance(optimizer, expected)
    owned = [id(own) for group in optimizer.param_groups for own in group["params"]]
    assert sorted(owned) == sorted(id(own) for own in network.parameters() if own.requires_grad)
    frozen = {name for name, own in network.named_parameters() if id(own) not in owned}
    assert frozen == {"model.backbone.pos_embed"} | {f"model.{name}.bias" for name in network.model.neck_names}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.25}
