"""The teacher: an exponential moving average of the student."""

from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from passreid_ray.config import Section
from passreid_ray.distributed import local_part

Centering = Literal["mean", "sinkhorn"]


class TeacherConfig(Section):
    """The teacher and its targets; the defaults are PASS's."""

    momentum: float = Field(default=0.996, ge=0, le=1)
    """Share of itself that the teacher keeps at the first step; a cosine takes it to 1."""
    temp: float = Field(default=0.04, gt=0)
    """Temperature of the targets."""
    warmup_temp: float = Field(default=0.04, gt=0)
    """Temperature at the first epoch."""
    warmup_temp_epochs: int = Field(default=0, ge=0)
    """Epochs over which the temperature goes from warmup_temp to temp."""
    centering: Centering = "mean"
    """What keeps targets from collapsing: "mean" subtracts the centers (PASS, DINO), "sinkhorn" balances the use of
    prototypes within each batch (SwAV, DINOv2)."""
    center_momentum: float = Field(default=0.9, ge=0, le=1)
    """Share of themselves that the centers keep at every step."""


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move every teacher parameter to ``momentum * teacher + (1 - momentum) * student``; buffers are left alone.

    Source: PASS (arXiv:2203.03931), section 3.1; batch-norm buffers stay the teacher's own, as in the reference.
    """
    average = get_ema_multi_avg_fn(momentum)
    of_teacher, of_student = ([local_part(own) for own in model.parameters()] for model in (teacher, student))
    average(of_teacher, of_student, 0)
