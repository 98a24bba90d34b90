"""The reference's pre-training checkpoint: student, teacher, their heads and the centers of the loss in one dict."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from passreid_ray.errors import UserError
from passreid_ray.models.formats import official_state_dict
from passreid_ray.models.part_vit import PartViT
from passreid_ray.models.prototype_head import PrototypeHead, official_head_state_dict, token_names
from passreid_ray.models.safe_load import read_state


@dataclass(frozen=True)
class PretrainCheckpoint:
    """What a run can be warm-started from; feed the states to ``load_backbone`` and ``load_heads``."""

    student_backbone: dict[str, Tensor]
    student_head: dict[str, Tensor]
    teacher_backbone: dict[str, Tensor]
    teacher_head: dict[str, Tensor]
    centers_TK: Tensor
    epoch: int
    """Epochs finished."""


def pretrain_checkpoint(
    student: PartViT,
    student_head: PrototypeHead,
    teacher: PartViT,
    teacher_head: PrototypeHead,
    centers_TK: Tensor,
    epoch: int,
) -> dict[str, Any]:
    """A dict that the reference's own tools read once it is saved with ``torch.save``.

    The student's keys start with ``module.``, as those of a model in DistributedDataParallel; the teacher's do not.
    ``epoch`` counts the finished ones. The optimiser's state is left out.
    """
    centers = zip(token_names(len(centers_TK)), centers_TK, strict=True)
    return {
        "student": _joined("module.", student, student_head),
        "teacher": _joined("", teacher, teacher_head),
        "epoch": epoch,
        "dino_loss": {f"center_{name}": center_K[None].detach().cpu().clone() for name, center_K in centers},
    }


def read_pretrain_checkpoint(source: str | Path | Mapping[str, Any]) -> PretrainCheckpoint:
    """The pieces of a reference pre-training checkpoint, from a file or its content.

    Raises:
        UserError: student, teacher or centers are not there (a released backbone has only the teacher's trunk).
    """
    where = "checkpoint" if isinstance(source, Mapping) else str(source)
    content = source if isinstance(source, Mapping) else read_state(source)
    for key in ("student", "teacher", "dino_loss"):
        if not isinstance(content.get(key), Mapping):
            raise UserError(f"{where}: not a pre-training checkpoint, it has no {key!r}; found {sorted(content)[:4]}")
    student, teacher, loss = content["student"], content["teacher"], content["dino_loss"]
    names = token_names(sum(key.startswith("center_") for key in loss))
    if not names or any(f"center_{name}" not in loss for name in names):
        raise UserError(f"{where}: expected centers center_cls, center_pt1, ...; found {sorted(loss)}")
    return PretrainCheckpoint(
        student_backbone=_part_of(student, "backbone."),
        student_head=_part_of(student, "head."),
        teacher_backbone=_part_of(teacher, "backbone."),
        teacher_head=_part_of(teacher, "head."),
        centers_TK=torch.cat([loss[f"center_{name}"].reshape(1, -1) for name in names]),
        epoch=int(content.get("epoch", 0)),
    )


def _joined(prefix: str, backbone: PartViT, head: PrototypeHead) -> dict[str, Tensor]:
    state = {f"{prefix}backbone.{key}": value for key, value in official_state_dict(backbone).items()}
    return state | {f"{prefix}head.{key}": value for key, value in official_head_state_dict(head).items()}


def _part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    plain = {key.removeprefix("module."): value for key, value in state.items()}
    return {key.removeprefix(prefix): value for key, value in plain.items() if key.startswith(prefix)}
