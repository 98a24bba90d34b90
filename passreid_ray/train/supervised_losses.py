"""Which losses supervised tuning adds up, with what weights, and the classifiers that some of them need."""

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from passreid_ray.config import Section
from passreid_ray.losses import (
    ClassCenters,
    SparsePositive,
    TripletDistance,
    am_softmax_loss,
    arcface_loss,
    average_k_loss,
    circle_loss,
    cosface_loss,
    identity_loss,
    sparse_pairwise_loss,
    triplet_loss,
)
from passreid_ray.models import ReidFeatures

CLASSIFIER_STD = 0.001
"""Initial deviation of plain classifiers, as in the reference."""
MARGIN_LOSSES = {"am_softmax": am_softmax_loss, "arcface": arcface_loss, "cosface": cosface_loss, "circle": circle_loss}


class IdentityLossConfig(Section):
    """Cross-entropy over the training identities, on the feature behind the neck."""

    weight: float = Field(default=1.0, ge=0)
    """Weight in the sum; 0: off."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target that all identities get alike."""


class MarginLossConfig(Section):
    """Cross-entropy over cosines with a margin, on the feature behind the neck."""

    weight: float = Field(default=0.0, ge=0)
    """Weight in the sum; 0: off."""
    scale: float = Field(default=30.0, gt=0)
    """What cosines are multiplied by."""
    margin: float = Field(default=0.35, ge=0)
    """How much better than the others the own identity must be."""
    margin_warmup_epochs: float = Field(default=5.0, ge=0)
    """Epochs over which the margin grows from 0; a fresh classifier meets a loss of 17 otherwise."""


class ArcFaceLossConfig(MarginLossConfig):
    """A margin on the angle."""

    margin: float = Field(default=0.5, ge=0, lt=math.pi)
    """Radians that are added to the angle to the own identity."""


class CosFaceLossConfig(MarginLossConfig):
    """The margin of AM-Softmax at the scale of fast-reid."""

    scale: float = Field(default=64.0, gt=0)
    """What cosines are multiplied by."""


class CircleLossConfig(MarginLossConfig):
    """A margin that weighs each cosine by how far it is from where it should be."""

    scale: float = Field(default=64.0, gt=0)
    """What weighted cosines are multiplied by."""
    margin: float = Field(default=0.25, ge=0, lt=1)
    """How far from 1 and from 0 cosines may stay."""


class TripletLossConfig(Section):
    """Batch-hard triplets, on the feature before the neck."""

    weight: float = Field(default=1.0, ge=0)
    """Weight in the sum; 0: off."""
    margin: float | None = Field(default=None, ge=0)
    """None: soft margin, log(1 + exp(d_ap - d_an))."""
    normalize: bool = False
    """L2-normalise features first."""
    distance: TripletDistance = "euclidean"
    """Euclidean or cosine."""


class SparsePairwiseLossConfig(Section):
    """SP and AdaSP (arXiv:2303.18247): one positive pair per identity, on the feature before the neck."""

    weight: float = Field(default=0.0, ge=0)
    """Weight in the sum; 0: off."""
    positive: SparsePositive = "adaptive"
    """Which pair of an identity: the hardest, the least hard of the hardest, or a mean of both that adapts."""
    temp: float = Field(default=0.04, gt=0)
    """Temperature."""


class AverageKLossConfig(Section):
    """Two heads that give each image as many candidate identities as it is ambiguous (arXiv:2303.18118)."""

    weight: float = Field(default=0.0, ge=0)
    """Weight in the sum; 0: off."""
    k: int = Field(default=5, ge=1)
    """Candidates per image, on average."""
    set_weight: float = Field(default=1.0, ge=0)
    """Weight of the head that learns the sets, beside the cross-entropy of the other."""
    negative_weight: float = Field(default=1.0, ge=0)
    """Weight of identities outside the set."""


class CenterLossConfig(Section):
    """Squared distance to the center of the own identity, on the feature before the neck."""

    weight: float = Field(default=0.0, ge=0)
    """Weight in the sum; 0: off. The usual one is 0.0005."""
    momentum: float = Field(default=0.5, ge=0, lt=1)
    """Share of itself that a center keeps at an update."""


class LossesConfig(Section):
    """The losses of supervised tuning; the sum of those with a weight above 0 is learnt from."""

    identity: IdentityLossConfig = IdentityLossConfig()
    am_softmax: MarginLossConfig = MarginLossConfig()
    arcface: ArcFaceLossConfig = ArcFaceLossConfig()
    cosface: CosFaceLossConfig = CosFaceLossConfig()
    circle: CircleLossConfig = CircleLossConfig()
    triplet: TripletLossConfig = TripletLossConfig()
    sparse_pairwise: SparsePairwiseLossConfig = SparsePairwiseLossConfig()
    average_k: AverageKLossConfig = AverageKLossConfig()
    center: CenterLossConfig = CenterLossConfig()

    @property
    def in_use(self) -> dict[str, float]:
        """Weight of each loss that has one above 0, by name."""
        weights = {name: getattr(self, name).weight for name in type(self).model_fields}
        return {name: weight for name, weight in weights.items() if weight > 0}

    @property
    def classifier_names(self) -> list[str]:
        """Names of the classifiers that the losses need."""
        names = [name for name in self.in_use if isinstance(getattr(self, name), IdentityLossConfig | MarginLossConfig)]
        return [*names, "average_k", "average_k_set"] if "average_k" in self.in_use else names


class SupervisedLosses(nn.Module):
    """Classifiers and centers of the losses in use, and the losses themselves."""

    def __init__(self, config: LossesConfig, num_identities: int, width: int) -> None:
        super().__init__()
        self.config = config
        self.classifiers = nn.ParameterDict()
        for name in config.classifier_names:
            weights_CD = torch.empty(num_identities, width)
            if isinstance(getattr(config, name, None), MarginLossConfig):
                nn.init.xavier_uniform_(weights_CD)  # only their directions count
            else:
                nn.init.normal_(weights_CD, std=CLASSIFIER_STD)
            self.classifiers[name] = nn.Parameter(weights_CD)
        has_centers = "center" in config.in_use
        self.centers = ClassCenters(num_identities, width, config.center.momentum) if has_centers else None

    def terms(self, features: ReidFeatures, ids_B: Tensor, epoch: float) -> dict[str, Tensor]:
        """Weighted terms of the loss by name, scalars; only those in use are computed.

        ``epoch`` is how many are done, fractions included. Every rank must call this, with as many images.
        """
        return {name: weight * self._term(name, features, ids_B, epoch) for name, weight in self.config.in_use.items()}

    def update_centers(self, features: ReidFeatures, ids_B: Tensor) -> None:
        """Move the centers, if there are any; every rank must call this after a step that was taken."""
        if self.centers is not None:
            self.centers.update(features.before_BD, ids_B)

    def _term(self, name: str, features: ReidFeatures, ids_B: Tensor, epoch: float) -> Tensor:
        before_BD, after_BD = features
        match getattr(self.config, name):
            case IdentityLossConfig() as own:
                return identity_loss(self._logits(after_BD, name), ids_B, label_smoothing=own.label_smoothing)
            case MarginLossConfig() as own:
                margin = own.margin * min(1.0, epoch / own.margin_warmup_epochs if own.margin_warmup_epochs else 1.0)
                return MARGIN_LOSSES[name](after_BD, self.classifiers[name], ids_B, own.scale, margin)
            case TripletLossConfig() as own:
                return triplet_loss(before_BD, ids_B, own.margin, own.normalize, distance=own.distance)
            case SparsePairwiseLossConfig() as own:
                return sparse_pairwise_loss(before_BD, ids_B, own.positive, own.temp)
            case AverageKLossConfig() as own:
                logits_BC, set_logits_BC = self._logits(after_BD, "average_k"), self._logits(after_BD, "average_k_set")
                weights = {"set_weight": own.set_weight, "negative_weight": own.negative_weight}
                return average_k_loss(logits_BC, set_logits_BC, ids_B, own.k, **weights)
            case CenterLossConfig():
                assert self.centers is not None
                return self.centers.loss(before_BD, ids_B)
            case _:
                raise AssertionError(name)

    def _logits(self, features_BD: Tensor, name: str) -> Tensor:
        return features_BD @ self.classifiers[name].t()
