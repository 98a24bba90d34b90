"""Backbones from the files people have: PASS and TransReID-SSL releases, their training and tuning checkpoints, timm.

| written by | content |
| --- | --- |
| PASS pre-training | ``{student, teacher, epoch, ...}``, keys ``[module.]backbone.*`` and ``[module.]head.*`` |
| PASS releases, our own | flat ``PartViT`` keys |
| PASS supervised tuning | flat, ``base.*``, ``bottleneck*``, ``classifier.*`` |
| PASS USL and UDA tuning | ``{state_dict, epoch, best_mAP}``, keys ``module.*`` |
| TransReID-SSL, DINO, timm | no part tokens; ``pos_embed`` starts with the position of CLS |
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from passreid_ray.errors import UserError
from passreid_ray.models.part_vit import PartViT
from passreid_ray.models.positions import Grid, resize_positions, stored_grid
from passreid_ray.models.safe_load import read_state

_WRAPPERS = ("teacher", "model", "state_dict", "student")
"""Keys under which training codes keep a state dict; a teacher is read before a student."""
_PREFIXES = ("module.", "backbone.", "base.")
_OTHER_MODULES = re.compile("head|fc|classifier|bottleneck|dist|pre_logits")
"""How the names of heads, necks and classifiers begin, which are no part of a backbone."""


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor of the model and of the checkpoint."""

    loaded: list[str]
    """Model tensors read from the checkpoint."""
    missing: list[str]
    """Model tensors that the checkpoint lacks; ``notes`` says what they hold now."""
    unexpected: list[str]
    """Checkpoint tensors that nothing in the model is made for."""
    resized: list[str]
    """Loaded tensors that were resampled to this model's grid."""
    skipped: list[str] = field(default_factory=list)
    """Checkpoint tensors of heads, necks and classifiers that are no part of the model."""
    notes: list[str] = field(default_factory=list)
    """What a reader should know, one sentence each."""

    def __str__(self) -> str:
        counts = [f"{len(self.loaded)} of {len(self.loaded) + len(self.missing)} tensors loaded", *self.notes]
        if self.skipped:
            counts.append(f"not in the model: {len(self.skipped)} of heads, necks or classifiers")
        if self.unexpected:
            counts.append(f"{len(self.unexpected)} unexpected tensors, the first is {self.unexpected[0]!r}")
        return "; ".join(counts)


def official_state_dict(model: PartViT) -> dict[str, Tensor]:
    """Copies of the model's weights under the flat keys of the released PASS backbones."""
    return {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}


def load_backbone(model: PartViT, source: str | Path | Mapping[str, Any]) -> LoadReport:
    """Copy a checkpoint's backbone into ``model``; the table above lists what ``source`` may hold.

    Wrappers and the prefixes ``module.``, ``backbone.``, ``base.`` are taken off; heads are left out. Positions of
    another grid are resized bilinearly. Without part tokens in the checkpoint, those of the model become copies of
    CLS. Nothing is copied when anything is wrong.

    Raises:
        UserError: the backbone would stay incomplete, a shape or the number of parts differs, or the file is refused.
    """
    state, report = fitted_backbone(model, read_tensors(source))
    model.load_state_dict(state)
    return report


@dataclass(frozen=True)
class CheckpointTensors:
    """The tensors of a checkpoint under their names in the model, heads and necks included."""

    where: str
    """How messages name the checkpoint."""
    tensors: dict[str, Tensor]
    """Without wrappers and the prefixes ``module.``, ``backbone.``, ``base.``."""
    notes: list[str]
    """Which wrappers were taken off."""


def read_tensors(source: str | Path | Mapping[str, Any]) -> CheckpointTensors:
    """Content of a checkpoint in any of the formats above.

    Raises:
        UserError: the file is refused.
    """
    where = "checkpoint" if isinstance(source, Mapping) else str(source)
    content, notes = unwrapped(source if isinstance(source, Mapping) else read_state(source))
    return CheckpointTensors(where, dict(_stripped(content)), notes)


def fitted_backbone(model: PartViT, checkpoint: CheckpointTensors) -> tuple[dict[str, Tensor], LoadReport]:
    """The state dict that ``load_backbone`` gives to ``model``, and its report; the model is not changed.

    Raises:
        UserError: as ``load_backbone``.
    """
    where, tensors, notes = checkpoint.where, checkpoint.tensors, list(checkpoint.notes)
    skipped = [key for key in tensors if _OTHER_MODULES.match(key)]
    given = {key: value for key, value in tensors.items() if key not in skipped}

    _give_cls_its_position(given, model.grid, where)
    missing = _fill_part_tokens(given, model.num_parts, where, notes)
    resized = _resize_to(given, model, where, notes)

    wanted = model.state_dict()
    # Files older than torch 0.4.1 have no such counters, and nothing depends on them.
    counters = [key for key in wanted if key.endswith("num_batches_tracked") and key not in given]
    if lacking := [key for key in wanted if key not in given and key not in counters]:
        raise UserError(
            f"{where}: the backbone would stay incomplete, {len(lacking)} of {len(wanted)} tensors are not there, "
            f"the first is {lacking[0]!r}; found keys like {_examples(tensors)}"
        )
    unexpected = [key for key in given if key not in wanted]
    for key in wanted:  # in the model's order, so that the error is the same every time
        if key in given and given[key].shape != wanted[key].shape:
            hint = "stem and patch size" if key.startswith("patch_embed") else "trunk, embed_dim and depth"
            raise UserError(
                f"{where}: {key} is {tuple(given[key].shape)} there and {tuple(wanted[key].shape)} in the model; "
                f"build the model with the checkpoint's {hint}"
            )
    missing += counters
    loaded = [key for key in wanted if key in given and key not in missing]
    state = wanted | {key: given[key] for key in wanted if key in given}
    return state, LoadReport(loaded, missing, unexpected, resized, skipped, notes)


def unwrapped(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """The state dict inside a training code's wrappers, and a note for each wrapper taken off."""
    notes = []
    while wrapper := next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None):
        content = content[wrapper]
        notes.append(f"read from {wrapper!r}")
    return content, notes


def _stripped(content: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for key, value in content.items():
        if not isinstance(value, Tensor):
            continue
        while prefix := next((p for p in _PREFIXES if key.startswith(p)), None):
            key = key.removeprefix(prefix)
        yield key, value


def _give_cls_its_position(given: dict[str, Tensor], like: Grid, where: str) -> None:
    """Split the slot of CLS off a plain ViT's ``pos_embed``; some ViTs have none, their CLS has no position."""
    if "cls_pos" in given or "pos_embed" not in given or "cls_token" not in given:
        return
    positions_1ND = given["pos_embed"]
    count = positions_1ND.shape[1]
    if stored_grid(count - 1, like):
        given["cls_pos"], given["pos_embed"] = positions_1ND[:, :1], positions_1ND[:, 1:]
    elif stored_grid(count, like):
        given["cls_pos"] = given["cls_token"].new_zeros(given["cls_token"].shape)
    else:
        raise UserError(f"{where}: pos_embed has {count} positions, which is no grid of patches with or without CLS")


def _fill_part_tokens(given: dict[str, Tensor], num_parts: int, where: str, notes: list[str]) -> list[str]:
    """Model keys that the checkpoint lacks and that now hold copies of CLS."""
    stored = sum(re.fullmatch(r"part_token\d+", key) is not None for key in given)
    if stored not in (0, num_parts):
        raise UserError(f"{where}: has {stored} part tokens, the model {num_parts}; build it with num_parts={stored}")
    if stored or not num_parts or "cls_token" not in given or "cls_pos" not in given:
        return []
    notes.append(f"{num_parts} part tokens not in checkpoint, copied from CLS")
    names = [(f"part_token{part}", f"part{part}_pos") for part in range(1, num_parts + 1)]
    for token, position in names:
        given[token], given[position] = given["cls_token"], given["cls_pos"]
    return [name for pair in names for name in pair]


def _resize_to(given: dict[str, Tensor], model: PartViT, where: str, notes: list[str]) -> list[str]:
    positions_1ND = given.get("pos_embed")
    if positions_1ND is None or positions_1ND.shape[1] == model.pos_embed.shape[1]:
        return []
    count = positions_1ND.shape[1]
    grid = stored_grid(count, model.grid)
    if grid is None:
        raise UserError(f"{where}: pos_embed has {count} positions, which is no grid of patches")
    given["pos_embed"] = resize_positions(positions_1ND.to(model.pos_embed.dtype), grid, model.grid, "bilinear")
    notes.append(f"positions resized from {grid[0]}x{grid[1]} to {model.grid[0]}x{model.grid[1]} patches")
    return ["pos_embed"]


def _examples(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(repr(key) for key in list(tensors)[:3]) or "none that hold a tensor"
