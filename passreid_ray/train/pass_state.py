"""All that PASS pre-training carries from one step to the next, and how it is saved."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import AdamW

from passreid_ray.distributed import is_sharded, restore
from passreid_ray.models.pass_model import PassModel
from passreid_ray.train.optimizer import build_optimizer, load_optimizer, optimizer_tensors
from passreid_ray.train.pass_student import PassStudent
from passreid_ray.train.precision import load_scaler
from passreid_ray.train.sharing import Strategy, shard
from passreid_ray.train.state_files import require_same_tensors, tensors_below


@dataclass
class PassState:
    """Student, teacher, centers, optimiser and the step; all randomness is a function of the seed and the step."""

    student: PassModel
    teacher: PassModel
    forward: nn.Module
    """The student as the step calls it: a ``PassStudent`` around it, or that wrapped for several workers."""
    centers_TK: Tensor
    """Running means of the teacher's logits; sharded as the prototypes are."""
    patch_centers_1K: Tensor | None
    """Of the patch head; none where the models have no such head."""
    optimizer: AdamW
    scaler: GradScaler
    """Loss scale of fp16; disabled, and then the identity, otherwise."""
    step: int = 0
    refused_in_a_row: int = 0
    refused_steps: int = 0
    """Steps whose loss or gradient was not finite; they changed nothing."""

    @property
    def device(self) -> torch.device:
        """Where the step computes."""
        return self.centers_TK.device

    def centers(self) -> list[Tensor]:
        """Those of the tokens, and of the patches where they have any."""
        return [self.centers_TK] if self.patch_centers_1K is None else [self.centers_TK, self.patch_centers_1K]

    @property
    def is_sharded(self) -> bool:
        """Whether each worker holds a piece of the state only."""
        return is_sharded(self.centers_TK)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state under a stable name; of a sharded one, this worker's pieces."""
        named = {"centers": self.centers_TK}
        if self.patch_centers_1K is not None:
            named["patch_centers"] = self.patch_centers_1K
        named |= {f"student.{name}": value for name, value in self.student.state_dict().items()}
        named |= {f"teacher.{name}": value for name, value in self.teacher.state_dict().items()}
        return named | {f"optimizer.{k}": v for k, v in optimizer_tensors(self.optimizer, self.student).items()}

    def meta(self) -> dict[str, Any]:
        """What is not a tensor."""
        return {
            "step": self.step,
            "refused_in_a_row": self.refused_in_a_row,
            "refused_steps": self.refused_steps,
            "scaler": self.scaler.state_dict(),
        }

    def load(self, tensors: dict[str, Tensor], meta: dict[str, Any], source: str) -> None:
        """Put back what ``tensors`` and ``meta`` gave; raises ``UserError`` when they are another model's."""
        for name, model in (("student", self.student), ("teacher", self.teacher)):
            own = tensors_below(tensors, f"{name}.")
            expected = model.state_dict()
            require_same_tensors(expected, own, f"{source}: {name}")
            for key, value in expected.items():
                restore(value, own[key])
        restore(self.centers_TK, tensors["centers"])
        if self.patch_centers_1K is not None:
            restore(self.patch_centers_1K, tensors["patch_centers"])
        load_optimizer(self.optimizer, self.student, tensors_below(tensors, "optimizer."))
        load_scaler(self.scaler, meta["scaler"])
        self.step = meta["step"]
        self.refused_in_a_row, self.refused_steps = meta["refused_in_a_row"], meta["refused_steps"]


def new_state(
    student: PassModel,
    teacher: PassModel,
    num_prototypes: int,
    device: torch.device,
    *,
    fp16: bool,
    strategy: Strategy = "copies",
) -> PassState:
    """State before the first step on ``device``: the teacher equals the student, centers are zero.

    ``strategy`` says which of it each worker holds.
    """
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    student.to(device)
    teacher.to(device)
    dtype = next(student.parameters()).dtype
    centers_TK = torch.zeros(1 + student.backbone.num_parts, num_prototypes, device=device, dtype=dtype)
    patches = student.patches
    patch_centers_1K = None if patches is None else centers_TK.new_zeros(1, patches.num_prototypes)
    scaler = GradScaler(device.type, enabled=fp16)
    forward = PassStudent(student)
    centers_TK = shard(forward, teacher, centers_TK, strategy)
    optimizer = build_optimizer(student)
    return PassState(student, teacher, forward, centers_TK, patch_centers_1K, optimizer, scaler)
