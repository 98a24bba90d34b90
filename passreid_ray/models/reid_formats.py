"""Tuned networks, necks included, from and to the checkpoints of the PASS tuning codes.

| written by | necks |
| --- | --- |
| USL and UDA tuning | ``module.bottleneck``, with one neck per token also ``module.bottleneck_pt1`` to ``_ptP`` |
| supervised tuning | ``bottleneck``, with one neck per token also ``bottleneck_1`` to ``_P``; ``classifier.weight`` |
| our own | ``ReidModel.state_dict()`` |
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from passreid_ray.errors import UserError
from passreid_ray.models.formats import CheckpointTensors, LoadReport, fitted_backbone, read_tensors
from passreid_ray.models.part_vit import Stem
from passreid_ray.models.positions import Grid, stored_grid
from passreid_ray.models.reid_model import Neck, NeckFusion, ReidModel

_NECK_KEY = re.compile(r"bottleneck(?:_(?:pt)?(?P<part>\d+))?\.(?P<tensor>\w+)")
_BACKBONE = "backbone."
_CLASSIFIER = "classifier.weight"
_HEAD_WIDTH = 64
"""Channels per attention head of ViT-Ti, S, B and L."""
_ICS_STRIDE = 2
"""Pixels per step of the convolutional stem's first layer; its projection makes patches of what that leaves."""
_TALLEST_SHAPE: Grid = (3, 1)
"""Rows to columns of 384x128 px, tried after twice as high as wide and square."""


def load_reid_model(model: ReidModel, source: str | Path | Mapping[str, Any]) -> LoadReport:
    """Copy a checkpoint's backbone and, where it has them, its necks into ``model``.

    ``source`` may be whatever ``load_backbone`` takes, which also says what becomes of the backbone. Without necks in
    the checkpoint those of the model stay as they are. Nothing is copied when anything is wrong.

    The reference itself starts a tuning with fresh necks even from a tuned checkpoint: for that, call
    ``load_backbone(model.backbone, source)``.

    Raises:
        UserError: as ``load_backbone``, or the checkpoint's necks are of another kind or width, or incomplete.
    """
    checkpoint = read_tensors(source)
    backbone_state, backbone = fitted_backbone(model.backbone, checkpoint)
    given, sources = _necks_of(checkpoint.tensors)
    wanted = {key: value for key, value in model.state_dict().items() if not key.startswith(_BACKBONE)}
    notes = list(backbone.notes)
    if given:
        _check_necks(model, given, wanted, checkpoint)
    else:
        notes.append("no necks in checkpoint, those of the model are unchanged")
    neck_state = wanted | {key: given[key] for key in wanted if key in given}
    model.load_state_dict({_BACKBONE + key: value for key, value in backbone_state.items()} | neck_state)
    return LoadReport(
        loaded=[*(_BACKBONE + key for key in backbone.loaded), *(key for key in wanted if key in given)],
        missing=[*(_BACKBONE + key for key in backbone.missing), *(key for key in wanted if key not in given)],
        unexpected=[*backbone.unexpected, *(sources[key] for key in given if key not in wanted)],
        resized=[_BACKBONE + key for key in backbone.resized],
        skipped=[key for key in backbone.skipped if key not in sources.values()],
        notes=notes,
    )


def official_usl_state_dict(model: ReidModel) -> dict[str, Tensor]:
    """Copies of the model's weights as the ``state_dict`` of the reference's ``checkpoint.pth.tar`` has them."""
    return {
        f"module.{key.removeprefix(_BACKBONE)}": value.detach().cpu().clone()
        for key, value in model.state_dict().items()
    }


def official_supervised_state_dict(model: ReidModel, classifier_CD: Tensor | None = None) -> dict[str, Tensor]:
    """Copies of the model's weights, and of a classifier's, as the reference's ``transformer_*.pth`` has them.

    The reference's ``base.fc``, which it never uses, is left out.

    Args:
        classifier_CD: weights ``(C, feature_width)`` of the linear classifier behind the necks; without it the file has
            none, which is enough for retrieval and for further tuning.

    Raises:
        UserError: a classifier of another width.
    """
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if key.startswith(_BACKBONE):
            key = f"base.{key.removeprefix(_BACKBONE)}"
        state[key.replace("bottleneck_pt", "bottleneck_")] = value.detach().cpu().clone()
    if classifier_CD is None:
        return state
    if classifier_CD.ndim != 2 or classifier_CD.shape[1] != model.feature_width:
        raise UserError(
            f"classifier_CD: expected (classes, {model.feature_width}) for these features, found "
            f"{tuple(classifier_CD.shape)}; give the classifier that was trained with this model"
        )
    return state | {_CLASSIFIER: classifier_CD.detach().cpu().clone()}


def classifier_of(source: str | Path | Mapping[str, Any]) -> Tensor | None:
    """The classifier's weights ``(C, feature_width)`` in a supervised checkpoint; None when it holds none.

    ``source`` may be whatever ``load_reid_model`` takes.

    Raises:
        UserError: the file is refused, or what it calls a classifier is no matrix.
    """
    checkpoint = read_tensors(source)
    classifier_CD = checkpoint.tensors.get(_CLASSIFIER)
    if classifier_CD is not None and classifier_CD.ndim != 2:
        raise UserError(
            f"{checkpoint.where}: {_CLASSIFIER} is {tuple(classifier_CD.shape)}, expected (classes, width); "
            "its classifier cannot be used, load the model alone"
        )
    return classifier_CD


@dataclass(frozen=True, kw_only=True)
class ReidShape:
    """What a model must be built with to hold a checkpoint. The number of attention heads is in no file."""

    num_parts: int
    width: int
    depth: int
    patch_size: tuple[int, int]
    grid: Grid
    """Rows and columns of patches that the position table most likely has."""
    stem: Stem
    stem_channels: int | None
    """Width of the convolutional stem; none: the other stem."""
    neck: Neck | None
    """None: no necks in the checkpoint. Without part tokens both kinds are the same, and this is ``single``."""
    fusion: NeckFusion | None
    """None: cannot be told, there is neither a single neck nor a classifier. Either then loads; the features differ."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width (px) of the position table's grid."""
        return self.grid[0] * self.patch_size[0], self.grid[1] * self.patch_size[1]

    @property
    def usual_num_heads(self) -> int | None:
        """Heads that ViT-Ti, S, B and L have at this width, 64 channels each; None when that does not divide it."""
        return None if self.width % _HEAD_WIDTH else self.width // _HEAD_WIDTH


def infer_reid_shape(source: str | Path | Mapping[str, Any]) -> ReidShape:
    """The sizes of the backbone and the kind of the necks in a checkpoint, so that ``load_reid_model`` will fit.

    ``source`` may be whatever ``load_reid_model`` takes. The grid is told from the number of positions: twice as high
    as wide, else square, else three times as high (384x128 px). The fusion is told from the width of a single neck, or
    of the classifier; width D reads as ``mean``, also without part tokens, where both fusions are the same.

    Raises:
        UserError: the file is refused, holds no vision transformer or one whose grid cannot be told, or its necks do
            not fit its backbone.
    """
    checkpoint = read_tensors(source)
    tensors, where = checkpoint.tensors, checkpoint.where
    lacking = [key for key in ("cls_token", "pos_embed", "patch_embed.proj.weight") if key not in tensors]
    blocks = {int(match[1]) for key in tensors if (match := re.match(r"blocks\.(\d+)\.", key))}
    if lacking or not blocks:
        found = ", ".join(repr(key) for key in list(tensors)[:3]) or "none that hold a tensor"
        raise UserError(
            f"{where}: holds no vision transformer, {(lacking or ['blocks.0'])[0]!r} is not there; found keys like "
            f"{found}; give a checkpoint of pre-training or tuning"
        )
    width = tensors["cls_token"].shape[-1]
    num_parts = sum(re.fullmatch(r"part_token\d+", key) is not None for key in tensors)
    kernel_height, kernel_width = tensors["patch_embed.proj.weight"].shape[-2:]
    first_convolution = tensors.get("patch_embed.conv.0.weight")
    stride = 1 if first_convolution is None else _ICS_STRIDE
    neck, fusion = _neck_and_fusion(checkpoint, width, num_parts)
    return ReidShape(
        num_parts=num_parts,
        width=width,
        depth=1 + max(blocks),
        patch_size=(stride * kernel_height, stride * kernel_width),
        grid=_grid_of_positions(checkpoint),
        stem="patch" if first_convolution is None else "ics",
        stem_channels=None if first_convolution is None else len(first_convolution),
        neck=neck,
        fusion=fusion,
    )


def _grid_of_positions(checkpoint: CheckpointTensors) -> Grid:
    count = checkpoint.tensors["pos_embed"].shape[1]
    # A plain ViT's table starts with CLS, in all but a few.
    counts = [count] if "cls_pos" in checkpoint.tensors else [count - 1, count]
    grids = [grid for own in counts if (grid := stored_grid(own, _TALLEST_SHAPE))]
    if not grids:
        raise UserError(
            f"{checkpoint.where}: pos_embed has {count} positions, no grid twice or three times as high as wide, nor a "
            "square; set the image size of the model by hand"
        )
    return grids[0]


def _neck_and_fusion(
    checkpoint: CheckpointTensors, width: int, num_parts: int
) -> tuple[Neck | None, NeckFusion | None]:
    given, _ = _necks_of(checkpoint.tensors)
    fusions: dict[int, NeckFusion] = {2 * width: "cat", width: "mean"} if num_parts else {width: "mean"}
    names = {key.partition(".")[0] for key in given}
    features: dict[str, Tensor] = {}
    if _CLASSIFIER in checkpoint.tensors:
        features[_CLASSIFIER] = checkpoint.tensors[_CLASSIFIER]
    if len(names) == 1 and "bottleneck.weight" in given:
        features["bottleneck.weight"] = given["bottleneck.weight"]
    fusion = None
    for name, tensor in features.items():
        told = fusions.get(tensor.shape[-1])
        if told is None or told != (fusion or told):
            raise UserError(
                f"{checkpoint.where}: {name} is {tuple(tensor.shape)}, which fits no fusion of {num_parts} part tokens "
                f"of width {width} or not the rest of the file; it is damaged or of another kind of model"
            )
        fusion = told
    if len(names) > 1 and len(names) != 1 + num_parts:
        raise UserError(
            f"{checkpoint.where}: has {len(names)} necks and {num_parts} part tokens, expected one neck or "
            f"{1 + num_parts}; it is damaged or of another kind of model"
        )
    return ("multi" if len(names) > 1 else "single" if names else None), fusion


def _necks_of(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The checkpoint's neck tensors under the model's keys, and the checkpoint's key of each."""
    given: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    for key, value in tensors.items():
        if match := _NECK_KEY.fullmatch(key):
            name = f"bottleneck_pt{match['part']}" if match["part"] else "bottleneck"
            given[f"{name}.{match['tensor']}"] = value
            sources[f"{name}.{match['tensor']}"] = key
    return given, sources


def _check_necks(
    model: ReidModel, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], checkpoint: CheckpointTensors
) -> None:
    where = checkpoint.where
    count = len({key.partition(".")[0] for key in given})
    if count > 1 == len(model.neck_names):
        raise UserError(f"{where}: has a neck per token, {count} in all, the model a single one; set neck='multi'")
    width = len(given["bottleneck.weight"]) if "bottleneck.weight" in given else None
    fitting = {2 * model.backbone.width: "cat", model.backbone.width: "mean"}.get(width or 0)
    if count == 1 < len(model.neck_names):
        fusion = f" and fusion={fitting!r}" if fitting else ""
        raise UserError(f"{where}: has a single neck, the model one per token; set neck='single'{fusion}")
    # Files older than torch 0.4.1 have no such counters, and nothing depends on them.
    if lacking := [key for key in wanted if key not in given and not key.endswith("num_batches_tracked")]:
        raise UserError(f"{where}: its necks are incomplete, {lacking[0]!r} is not there")
    for key, value in wanted.items():
        if key in given and given[key].shape != value.shape:
            fusion_differs = model.neck == "single" and fitting
            hint = f"set fusion={fitting!r}" if fusion_differs else "build the model with the checkpoint's trunk"
            raise UserError(
                f"{where}: {key} is {tuple(given[key].shape)} there and {tuple(value.shape)} in the model; {hint}"
            )
