"""The weighted losses of supervised tuning: which are computed, on which side of the neck, with what settings."""

from typing import Any

import pytest
import torch
from torch import Tensor

from passreid_ray.config import load_config
from passreid_ray.losses import (
    am_softmax_loss,
    arcface_loss,
    average_k_loss,
    circle_loss,
    cosface_loss,
    identity_loss,
    sparse_pairwise_loss,
    triplet_loss,
)
from passreid_ray.models import PartViT, ReidFeatures
from passreid_ray.models.config import NeckConfig
from passreid_ray.train.finetune_state import FinetuneNetwork
from passreid_ray.train.supervised_losses import CLASSIFIER_STD, LossesConfig, SupervisedLosses

WIDTH, IDENTITIES = 6, 5
IDS_B = torch.tensor([0, 0, 3, 3, 4, 4, 4, 1])
K = {"average_k": {"k": 2}}
OFF = {"identity": {"weight": 0}, "triplet": {"weight": 0}}
LATE = 1000.0
"""An epoch when every margin is whole."""
MARGIN_NAMES = ["am_softmax", "arcface", "cosface", "circle"]
READS = {"identity": "after", "triplet": "before", "sparse_pairwise": "before", "average_k": "after"}
READS |= dict.fromkeys(MARGIN_NAMES, "after") | {"center": "before"}


def config_of(losses: dict[str, dict[str, Any]]) -> LossesConfig:
    """Settings as a preset with ``losses`` gives them: on top of the defaults of each loss."""
    return LossesConfig.model_validate(
        {name: own | losses.get(name, {}) for name, own in LossesConfig().model_dump().items()}
    )


def only(name: str, **values: Any) -> LossesConfig:
    """All losses off but one."""
    return config_of(OFF | {name: {"weight": 1.0, **K.get(name, {}), **values}})


def everything() -> LossesConfig:
    return config_of({name: {"weight": 0.5 + 0.25 * place, **K.get(name, {})} for place, name in enumerate(READS)})


def losses_of(config: LossesConfig) -> SupervisedLosses:
    torch.manual_seed(0)
    return SupervisedLosses(config, IDENTITIES, WIDTH).double()


def features(seed: int = 1) -> ReidFeatures:
    generator = torch.Generator().manual_seed(seed)
    before_BD, after_BD = torch.randn(2, len(IDS_B), WIDTH, dtype=torch.float64, generator=generator)
    return ReidFeatures(before_BD, after_BD)


def new_network(config: LossesConfig, fusion: str = "cat") -> FinetuneNetwork:
    torch.manual_seed(0)
    backbone = PartViT("vit_tiny_patch16_224", image_size=(64, 32), embed_dim=24, depth=1, num_heads=2)
    model = NeckConfig.model_validate({"fusion": fusion, "neck": "multi"}).build(backbone)
    return FinetuneNetwork(model, SupervisedLosses(config, IDENTITIES, model.feature_width))


def test_every_loss_of_the_settings_is_tested_here() -> None:
    assert READS.keys() == LossesConfig.model_fields.keys()


def test_by_default_identity_and_soft_margin_triplets_are_in_use() -> None:
    assert LossesConfig().in_use == {"identity": 1.0, "triplet": 1.0}
    assert LossesConfig().triplet.margin is None


def test_a_margin_loss_that_is_given_a_weight_has_the_scale_and_margin_of_its_paper() -> None:
    config = load_config(LossesConfig, [f"{name}.weight=1" for name in MARGIN_NAMES])
    found = {name: (own.scale, own.margin) for name in MARGIN_NAMES if (own := getattr(config, name)).weight == 1}
    assert found == {"am_softmax": (30, 0.35), "arcface": (30, 0.5), "cosface": (64, 0.35), "circle": (64, 0.25)}


@pytest.mark.parametrize(("name", "side"), READS.items())
def test_a_loss_has_its_classifiers_and_nothing_else(name: str, side: str) -> None:
    losses = losses_of(only(name))
    names = {"average_k": {"average_k", "average_k_set"}}.get(name, {name} if side == "after" else set())
    assert (
        set(losses.classifiers) == names == {own.removeprefix("classifiers.") for own, _ in losses.named_parameters()}
    )
    assert {tuple(own.shape) for own in losses.parameters()} <= {(IDENTITIES, WIDTH)}
    assert [own for own, _ in losses.named_buffers()] == (["centers.centers_CD"] if name == "center" else [])


def test_only_losses_with_a_weight_are_computed() -> None:
    before_BD, after_BD = features()
    nothing_BD = torch.full_like(after_BD, torch.nan)
    terms = losses_of(only("triplet")).terms(ReidFeatures(before_BD, nothing_BD), IDS_B, LATE)
    assert terms.keys() == {"triplet"}
    assert torch.isfinite(terms["triplet"])
    terms = losses_of(only("circle")).terms(ReidFeatures(nothing_BD, after_BD), IDS_B, LATE)
    assert terms.keys() == {"circle"}
    assert torch.isfinite(terms["circle"])


@pytest.mark.parametrize(("fusion", "width"), [("cat", 48), ("mean", 24)])
def test_classifiers_and_centers_are_as_wide_as_the_fused_feature(fusion: str, width: int) -> None:
    network = new_network(everything(), fusion)
    sizes = {tuple(own.shape) for own in [*network.losses.parameters(), *network.losses.buffers()]}
    assert sizes == {(IDENTITIES, width)}
    terms = network.losses.terms(network(torch.randn(len(IDS_B), 3, 64, 32), None), IDS_B, LATE)
    assert terms.keys() == READS.keys()
    assert all(value.shape == () and torch.isfinite(value) for value in terms.values())


def test_plain_classifiers_start_near_zero_and_those_of_cosines_do_not() -> None:
    losses = SupervisedLosses(everything(), 200, 100)
    for name, weights_CD in losses.classifiers.items():
        expected = (2 / 300) ** 0.5 if name in MARGIN_NAMES else CLASSIFIER_STD  # of Xavier's uniform distribution
        assert weights_CD.std().item() == pytest.approx(expected, rel=0.05), name


def test_a_term_is_the_loss_function_of_its_settings_times_its_weight() -> None:
    config = config_of(
        {
            "identity": {"weight": 0.5, "label_smoothing": 0.1},
            "am_softmax": {"weight": 0.25, "scale": 20.0, "margin": 0.3},
            "arcface": {"weight": 2.0, "scale": 10.0, "margin": 0.4},
            "cosface": {"weight": 3.0, "scale": 15.0, "margin": 0.2},
            "circle": {"weight": 4.0, "scale": 32.0, "margin": 0.15},
            "triplet": {"weight": 5.0, "margin": 0.3, "normalize": True, "distance": "cosine"},
            "sparse_pairwise": {"weight": 6.0, "positive": "least_hard", "temp": 0.1},
            "average_k": {"weight": 7.0, "k": 2, "set_weight": 0.3, "negative_weight": 0.6},
            "center": {"weight": 8.0},
        }
    )
    losses = losses_of(config)
    before_BD, after_BD = features()
    weights = dict(losses.classifiers.items())
    k_BC, set_BC = after_BD @ weights["average_k"].T, after_BD @ weights["average_k_set"].T
    expected = {
        "identity": 0.5 * identity_loss(after_BD @ weights["identity"].T, IDS_B, label_smoothing=0.1),
        "am_softmax": 0.25 * am_softmax_loss(after_BD, weights["am_softmax"], IDS_B, 20.0, 0.3),
        "arcface": 2 * arcface_loss(after_BD, weights["arcface"], IDS_B, 10.0, 0.4),
        "cosface": 3 * cosface_loss(after_BD, weights["cosface"], IDS_B, 15.0, 0.2),
        "circle": 4 * circle_loss(after_BD, weights["circle"], IDS_B, 32.0, 0.15),
        "triplet": 5 * triplet_loss(before_BD, IDS_B, 0.3, True, distance="cosine"),
        "sparse_pairwise": 6 * sparse_pairwise_loss(before_BD, IDS_B, "least_hard", 0.1),
        "average_k": 7 * average_k_loss(k_BC, set_BC, IDS_B, 2, set_weight=0.3, negative_weight=0.6),
        "center": 8 * before_BD.square().sum(dim=1).mean(),  # centers start at 0
    }
    found = losses.terms(ReidFeatures(before_BD, after_BD), IDS_B, LATE)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "side"), READS.items())
def test_a_loss_reads_its_side_of_the_neck_only(name: str, side: str) -> None:
    losses, (before_BD, after_BD), other = losses_of(only(name)), features(), features(seed=2)
    value = losses.terms(ReidFeatures(before_BD, after_BD), IDS_B, LATE)[name]
    changed = {
        "before": losses.terms(ReidFeatures(other.before_BD, after_BD), IDS_B, LATE)[name],
        "after": losses.terms(ReidFeatures(before_BD, other.after_BD), IDS_B, LATE)[name],
    }
    assert [own for own, new in changed.items() if not torch.equal(new, value)] == [side]


@pytest.mark.parametrize("name", MARGIN_NAMES)
def test_margins_grow_from_nothing_to_their_full_size(name: str) -> None:
    def value(losses: SupervisedLosses, epoch: float) -> Tensor:
        return losses.terms(features(), IDS_B, epoch)[name]

    growing = losses_of(only(name, margin=0.3, margin_warmup_epochs=4))
    for epoch, margin in [(0, 0.0), (1, 0.075), (2.5, 0.1875), (4, 0.3), (40, 0.3)]:
        at_once = losses_of(only(name, margin=margin, margin_warmup_epochs=0))
        torch.testing.assert_close(value(growing, epoch), value(at_once, 0.0), rtol=1e-12, atol=0)
    assert not torch.equal(value(growing, 0), value(growing, 4))


def test_centers_follow_the_features_before_the_neck_at_an_update_only() -> None:
    losses, own = losses_of(only("center", momentum=0.25)), features()
    assert losses.centers is not None
    losses.terms(own, IDS_B, LATE)
    assert not losses.centers.centers_CD.any()
    losses.update_centers(own, IDS_B)
    for person in range(IDENTITIES):
        mine_ND = own.before_BD[person == IDS_B]
        expected_D = 0.75 * mine_ND.sum(dim=0) / (1 + len(mine_ND))
        torch.testing.assert_close(losses.centers.centers_CD[person], expected_D, rtol=1e-12, atol=1e-12)


def test_without_the_center_loss_there_is_nothing_to_update() -> None:
    losses = losses_of(everything().model_copy(update={"center": LossesConfig().center}))
    before = {name: value.clone() for name, value in losses.state_dict().items()}
    losses.update_centers(features(), IDS_B)
    assert losses.centers is None
    assert all(torch.equal(value, before[name]) for name, value in losses.state_dict().items())


@pytest.mark.parametrize(("name", "side"), READS.items())
def test_necks_are_frozen_exactly_when_no_loss_looks_behind_them(name: str, side: str) -> None:
    model = new_network(only(name)).model
    assert len(model.neck_names) == 4
    for neck in model.neck_names:
        assert model.get_parameter(f"{neck}.weight").requires_grad == (side == "after")
        assert not model.get_parameter(f"{neck}.bias").requires_grad


def test_a_frozen_neck_still_counts_its_statistics() -> None:
    network = new_network(only("triplet"))
    before = network.model.get_buffer("bottleneck.running_mean").clone()
    network.train()(torch.randn(len(IDS_B), 3, 64, 32), None)
    assert not torch.equal(network.model.get_buffer("bottleneck.running_mean"), before)
