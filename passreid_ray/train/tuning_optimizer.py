"""The optimiser of tuning: SGD as Cluster Contrast and PASS use it, or AdamW; a step schedule in rounds."""

from typing import Literal

from pydantic import Field
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from passreid_ray.config import Section


class TuningOptimizerConfig(Section):
    """Optimiser of a tuning run; the defaults are those of PASS's unsupervised tuning."""

    kind: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    lr: float = Field(default=3.5e-4, gt=0)
    """Learning rate at the start; it does not depend on the batch."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of SGD."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """Weight decay of all parameters."""
    decay_every_rounds: int = Field(default=20, ge=1)
    """Rounds between decays of the learning rate."""
    decay_factor: float = Field(default=0.1, gt=0, le=1)
    """What the learning rate is multiplied by."""

    def build(self, module: nn.Module) -> Optimizer:
        """The optimiser of the parameters that are trained."""
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        match self.kind:
            case "sgd":
                return SGD(parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
            case "adamw":
                return AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)

    def lr_at(self, round_index: int) -> float:
        """Learning rate of a round, counted from 0."""
        return self.lr * self.decay_factor ** (round_index // self.decay_every_rounds)
