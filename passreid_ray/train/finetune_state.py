"""All that supervised tuning carries from one step to the next."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from passreid_ray.models import ReidFeatures, ReidModel
from passreid_ray.train.ema import update_teacher
from passreid_ray.train.state_files import require_same_tensors, tensors_below
from passreid_ray.train.supervised_losses import SupervisedLosses
from passreid_ray.train.tuning_state import TuningState

IDENTITY_CLASSIFIER = "losses.classifiers.identity"
"""Name of the plain classifier in a checkpoint."""


class FinetuneNetwork(nn.Module):
    """What is trained: the ReID model, and the classifiers of the losses."""

    def __init__(self, model: ReidModel, losses: SupervisedLosses) -> None:
        super().__init__()
        self.model = model
        self.losses = losses
        if not losses.config.classifier_names:
            for name in model.neck_names:  # they have no gradient then, which several workers would wait for
                model.get_submodule(name).requires_grad_(False)

    def forward(
        self, images_BCHW: Tensor, drop_path_noise: Tensor | None, grids_B2: Tensor | None = None
    ) -> ReidFeatures:
        """Features on both sides of the necks."""
        return self.model.embed(images_BCHW, drop_path_noise=drop_path_noise, grids_B2=grids_B2)


@dataclass
class FinetuneState(TuningState[FinetuneNetwork]):
    """A tuning state with the moving average of the model's weights."""

    average: ReidModel | None = None
    """What is evaluated and published instead of the model, when it is kept."""

    @property
    def published(self) -> ReidModel:
        """The model whose features are compared."""
        return self.network.model if self.average is None else self.average

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state under a stable name."""
        average = {} if self.average is None else self.average.state_dict()
        return super().tensors() | {f"average.{name}": value for name, value in average.items()}

    def load(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], source: str) -> None:
        """As ``TuningState.load``."""
        super().load(tensors, meta, source)
        if self.average is not None:
            own = tensors_below(tensors, "average.")
            require_same_tensors(self.average.state_dict(), own, f"{source}: average")
            self.average.load_state_dict(own)


def published_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The ReID model in a tuning checkpoint: the moving average where it is kept; nothing in other checkpoints."""
    return tensors_below(tensors, "average.") or tensors_below(tensors, "model.")


def average_of(model: ReidModel) -> ReidModel:
    """A copy to keep the moving average in."""
    return deepcopy(model).requires_grad_(False)


@torch.no_grad()
def update_average(average: ReidModel, model: ReidModel, decay: float) -> None:
    """Move the average's weights towards the model's; the statistics of the necks are the model's."""
    update_teacher(average, model, decay)
    for own, new in zip(average.buffers(), model.buffers(), strict=True):
        own.copy_(new)
