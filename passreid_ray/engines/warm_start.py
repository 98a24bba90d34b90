"""Starting from weights instead of from chance."""

from pathlib import Path

import torch
from pydantic import Field, field_validator
from torch import nn

from passreid_ray.config import Section, UserPath
from passreid_ray.errors import UserError
from passreid_ray.models import (
    load_backbone,
    load_heads,
    load_timm_weights,
    read_pretrain_checkpoint,
    read_state,
)
from passreid_ray.models.pass_model import PassModel
from passreid_ray.train.state_files import find_checkpoint, load_state, tensors_below


class WarmStartConfig(Section):
    """Weights to begin with; by default random ones."""

    checkpoint: UserPath | None = None
    """A run or checkpoint folder of this project, or any public PASS or TransReID-SSL file."""
    timm: str | None = None
    """timm weights of the trunk: a file, or "hub" to download them."""
    head_warmup_epochs: float | None = Field(default=None, ge=0)
    """Epochs in which only the heads learn; none: 0 where the heads were loaded too, else 1."""

    @field_validator("checkpoint", "timm")
    @classmethod
    def _absolute(cls, value: Path | str | None) -> Path | str | None:
        # Workers run in another folder than the one where the user stands.
        if value is None or value == "hub":
            return value
        return type(value)(Path(value).expanduser().absolute())

    def check(self) -> None:
        """Raise ``UserError`` for what can be told to be wrong before the run starts."""
        if self.checkpoint is not None and self.timm is not None:
            raise UserError("warm_start: give checkpoint or timm, not both")
        for key, path in (("checkpoint", self.checkpoint), ("timm", self.timm)):
            if path is not None and path != "hub" and not Path(path).exists():
                raise UserError(f"warm_start.{key}: {path} does not exist")


def warm_start(model: PassModel, config: WarmStartConfig) -> tuple[float, str | None]:
    """Load ``config``'s weights into a student: (epochs in which only the heads should learn, what was loaded).

    The teacher's weights are taken where a checkpoint has them. Raises ``UserError`` when the backbone would stay
    incomplete; nothing but ``model`` is touched, so a driver may call it to see whether its workers will succeed.
    """
    config.check()
    if config.timm is not None:
        report = load_timm_weights(model.backbone, config.timm)
        return _warmup(config, has_heads=False), f"timm weights: {report}"
    if config.checkpoint is None:
        return 0.0, None
    try:
        backbone, head, patches = read_teacher(config.checkpoint)
        report = load_backbone(model.backbone, backbone)
    except UserError as error:
        reason = str(error).removeprefix("checkpoint: ").removeprefix(f"{config.checkpoint}: ")
        raise UserError(f"warm_start.checkpoint: {config.checkpoint}: {reason}") from None
    has_heads = _load_fitting_heads(model, head)
    heads = "heads loaded" if has_heads else "heads start at random"
    if model.patches is not None and not _load_if_same(model.patches, patches):
        has_heads, heads = False, f"{heads}; the patch head starts at random"
    return _warmup(config, has_heads=has_heads), f"{config.checkpoint}: {report}; {heads}"


def read_teacher(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(backbone, heads, patch head) of the teacher in a checkpoint of this project or a public file.

    Heads may be empty; public files have no patch head.
    """
    if path.is_dir():
        tensors, _ = load_state(find_checkpoint(path))
        backbone, head, patches = (tensors_below(tensors, f"teacher.{own}.") for own in ("backbone", "head", "patches"))
        return backbone, head, patches
    content = read_state(path)
    if {"student", "teacher", "dino_loss"} <= content.keys():
        pieces = read_pretrain_checkpoint(content)
        return pieces.teacher_backbone, pieces.teacher_head, {}
    return dict(content), {}, {}


def _load_fitting_heads(model: PassModel, state: dict[str, torch.Tensor]) -> bool:
    if _load_if_same(model.head, state):
        return True
    try:
        load_heads(model.head, state)
    except UserError:
        return False  # other sizes or none: the heads learn anew
    return True


def _load_if_same(module: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    own = module.state_dict()
    is_same = own.keys() == state.keys() and all(own[name].shape == state[name].shape for name in own)
    if is_same:
        module.load_state_dict(state)
    return is_same


def _warmup(config: WarmStartConfig, *, has_heads: bool) -> float:
    if config.head_warmup_epochs is not None:
        return config.head_warmup_epochs
    return 0.0 if has_heads else 1.0
