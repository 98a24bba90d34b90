"""The optimiser of supervised tuning: its parameter groups and the learning rate of each step."""

import math
import re
from typing import Literal

from pydantic import Field
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from passreid_ray.config import Section
from passreid_ray.models import PartViT
from passreid_ray.train.schedules import cosine

WARMUP_START = 0.01
FINAL_SHARE = 0.002


class FinetuneOptimizerConfig(Section):
    """Optimiser of a supervised run; the defaults are those of PASS's fine-tuning but for the schedule."""

    kind: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    lr: float = Field(default=4e-4, gt=0)
    """Peak learning rate; it does not depend on the batch."""
    schedule: Literal["cosine", "reference"] = "cosine"
    """cosine: a linear warm-up from 0 and a half cosine, at every step. reference: the curve of PASS's code, a value an
    epoch, whose cosine began with the warm-up, so that the peak is never reached."""
    warmup_epochs: float = Field(default=20, ge=0)
    """Length of the warm-up."""
    final_lr_share: float = Field(default=FINAL_SHARE, ge=0, le=1)
    """What is left of the learning rate at the end."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of SGD."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Weight decay of all parameters."""
    bias_lr_factor: float = Field(default=2.0, gt=0)
    """Learning rate of biases, as a multiple of the others'."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Learning rate of a block as a multiple of that of the block behind it; 1: all alike."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of all gradients together; none: no clipping."""

    def build(self, network: nn.Module, backbone: PartViT) -> Optimizer:
        """The optimiser of ``network``'s trained parameters, in a group for each multiple of the learning rate.

        ``backbone`` is the part of ``network`` whose blocks ``layer_decay`` counts; all else learns at the full rate.
        """
        layers = {id(own): _layer(name, backbone.depth) for name, own in backbone.named_parameters()}
        groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                layer = layers.get(id(parameter), backbone.depth + 1)
                groups.setdefault((layer, name.endswith("bias")), []).append(parameter)
        parameters = [
            {
                "params": own,
                "share": self.layer_decay ** (backbone.depth + 1 - layer),
                "bias_factor": self.bias_lr_factor if is_bias else 1.0,
            }
            for (layer, is_bias), own in groups.items()
        ]
        match self.kind:
            case "sgd":
                return SGD(parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
            case "adamw":
                return AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)

    def set_lr(self, optimizer: Optimizer, step: int, steps_per_epoch: int, epochs: int) -> float:
        """Set every group's learning rate for ``step``; returns that of the weights behind the backbone."""
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * self._lr_at(group["bias_factor"], step, steps_per_epoch, epochs)
        return self._lr_at(1.0, step, steps_per_epoch, epochs)

    def _lr_at(self, factor: float, step: int, steps_per_epoch: int, epochs: int) -> float:
        match self.schedule:
            case "cosine":
                return factor * cosine(
                    step,
                    start=self.lr,
                    end=self.final_lr_share * self.lr,
                    steps=epochs * steps_per_epoch,
                    warmup_steps=min(round(self.warmup_epochs * steps_per_epoch), epochs * steps_per_epoch),
                )
            case "reference":
                return reference_lr(
                    step // steps_per_epoch, factor, self.lr, epochs, self.warmup_epochs, self.final_lr_share
                )


def reference_lr(
    epoch: int, factor: float, base_lr: float, epochs: int, warmup_epochs: float, final_share: float = FINAL_SHARE
) -> float:
    """Learning rate of PASS's fine-tuning code in an epoch counted from 0, for a group of ``factor`` times the base.

    A line from a hundredth of ``base_lr``, whatever the factor, then a half cosine over all ``epochs`` that is entered
    where the warm-up ends: with 20 of 120 epochs at 0.933 of the peak, which is thus never reached.
    """
    if epoch < warmup_epochs:
        start = WARMUP_START * base_lr
        return start + (factor * base_lr - start) * epoch / warmup_epochs
    end = final_share * base_lr
    return end + (factor * base_lr - end) * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def _layer(name: str, depth: int) -> int:
    """0 for the stem, tokens and positions, 1 to ``depth`` for the blocks, ``depth`` + 1 for what is behind them."""
    if match := re.match(r"blocks\.(\d+)\.", name):
        return int(match[1]) + 1
    return depth + 1 if name.startswith("norm.") else 0
