"""What a public checkpoint holds, told from its tensors: the sizes of its backbone, its necks and who tuned it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from passreid_ray.errors import UserError
from passreid_ray.models.config import ModelConfig
from passreid_ray.models.formats import CheckpointTensors, read_tensors, unwrapped
from passreid_ray.models.ics_stem import OFFICIAL_CHANNELS, STRIDE
from passreid_ray.models.part_vit import Stem
from passreid_ray.models.positions import Grid, stored_grid
from passreid_ray.models.reid_model import Neck, NeckFusion
from passreid_ray.models.safe_load import read_state

CLASSIFIER = "classifier.weight"
"""Key of the identity classifier in a supervised checkpoint."""

TunedBy = Literal["supervised", "unsupervised"]

_NECK_KEY = re.compile(r"bottleneck(?:_(?:pt)?(?P<part>\d+))?\.(?P<tensor>\w+)")
_SUPERVISED_KEY = re.compile(r"(module\.)?(base\.|classifier\.|bottleneck_\d)")
"""How keys begin that only supervised tuning writes."""
_HEAD_WIDTH = 64
"""Channels per attention head of ViT-Ti, S, B and L."""
_TALLEST_SHAPE: Grid = (3, 1)
"""Rows to columns of 384x128 px, tried after twice as high as wide and square."""


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
    tuned_by: TunedBy | None
    """Whose necks they are, which decides the side of them that features are taken from; None: no necks."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width (px) of the position table's grid."""
        return self.grid[0] * self.patch_size[0], self.grid[1] * self.patch_size[1]

    @property
    def usual_num_heads(self) -> int | None:
        """Heads that ViT-Ti, S, B and L have at this width, 64 channels each; None when that does not divide it."""
        return None if self.width % _HEAD_WIDTH else self.width // _HEAD_WIDTH

    def model_config(self, given: ModelConfig | None = None) -> ModelConfig:
        """The backbone's settings, told from the file but for those that ``given`` sets, which win.

        A trunk that is given brings its own width, depth, heads and patches, unless these are given too.

        Raises:
            UserError: the number of heads is neither given nor the usual one for this width.
        """
        chosen = {} if given is None else given.model_dump(exclude_unset=True)
        told: dict[str, Any] = {"stem": self.stem, "stem_channels": self.stem_channels or OFFICIAL_CHANNELS}
        if "trunk" not in chosen:
            if self.usual_num_heads is None and chosen.get("num_heads") is None:
                raise UserError(
                    f"model.num_heads: no file tells it, and width {self.width} is not one of {_HEAD_WIDTH} channels "
                    "per head, as ViT-Ti, S, B and L have; give model.num_heads"
                )
            told |= {"embed_dim": self.width, "depth": self.depth, "patch_size": self.patch_size[0]}
            told["num_heads"] = self.usual_num_heads
        return ModelConfig.model_validate(told | chosen)


def infer_reid_shape(source: str | Path | Mapping[str, Any], image_size: tuple[int, int] | None = None) -> ReidShape:
    """The sizes of the backbone and the kind of the necks in a checkpoint, so that ``load_reid_model`` will fit.

    ``source`` may be whatever ``load_reid_model`` takes. The grid is told from the number of positions: that of
    ``image_size`` (height and width in px) where it fits, twice as high as wide, else square, else the shape of
    ``image_size``, or without one three times as high as wide (384x128 px). The fusion is told from the width of a
    single neck, or of the classifier; width D reads as ``mean``, also without part tokens, where both fusions are the
    same. Necks under keys that supervised tuning does not write count as those of unsupervised tuning.

    Raises:
        UserError: the file is refused, holds no vision transformer or one whose grid cannot be told, or its necks do
            not fit its backbone.
    """
    where = "checkpoint" if isinstance(source, Mapping) else str(source)
    content = source if isinstance(source, Mapping) else read_state(source)
    tensors = read_tensors(content).tensors
    lacking = [key for key in ("cls_token", "pos_embed", "patch_embed.proj.weight") if key not in tensors]
    blocks = {int(match[1]) for key in tensors if (match := re.match(r"blocks\.(\d+)\.", key))}
    if lacking or not blocks:
        found = ", ".join(repr(key) for key in list(tensors)[:3]) or "none that hold a tensor"
        raise UserError(
            f"{where}: holds no vision transformer, {(lacking or ['blocks.0'])[0]!r} is not there; found keys like "
            f"{found}; give a checkpoint of pre-training or tuning"
        )
    checkpoint = CheckpointTensors(where, tensors, [])
    width = tensors["cls_token"].shape[-1]
    num_parts = sum(re.fullmatch(r"part_token\d+", key) is not None for key in tensors)
    kernel_height, kernel_width = tensors["patch_embed.proj.weight"].shape[-2:]
    first_convolution = tensors.get("patch_embed.conv.0.weight")
    stride = 1 if first_convolution is None else STRIDE
    patch_size = (stride * kernel_height, stride * kernel_width)
    like = None if image_size is None else (image_size[0] // patch_size[0], image_size[1] // patch_size[1])
    neck, fusion = _neck_and_fusion(checkpoint, width, num_parts)
    is_supervised = any(_SUPERVISED_KEY.match(key) for key in unwrapped(content)[0])
    return ReidShape(
        num_parts=num_parts,
        width=width,
        depth=1 + max(blocks),
        patch_size=patch_size,
        grid=_grid_of_positions(checkpoint, like or _TALLEST_SHAPE),
        stem="patch" if first_convolution is None else "ics",
        stem_channels=None if first_convolution is None else len(first_convolution),
        neck=neck,
        fusion=fusion,
        tuned_by=None if neck is None else "supervised" if is_supervised else "unsupervised",
    )


def necks_of(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The checkpoint's neck tensors under the model's keys, and the checkpoint's key of each."""
    given: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    for key, value in tensors.items():
        if match := _NECK_KEY.fullmatch(key):
            name = f"bottleneck_pt{match['part']}" if match["part"] else "bottleneck"
            given[f"{name}.{match['tensor']}"] = value
            sources[f"{name}.{match['tensor']}"] = key
    return given, sources


def _grid_of_positions(checkpoint: CheckpointTensors, like: Grid) -> Grid:
    count = checkpoint.tensors["pos_embed"].shape[1]
    # A plain ViT's table starts with CLS, in all but a few.
    counts = [count] if "cls_pos" in checkpoint.tensors else [count - 1, count]
    grids = [grid for own in counts if (grid := stored_grid(own, like))]
    if not grids:
        raise UserError(
            f"{checkpoint.where}: pos_embed has {count} positions, no grid twice or three times as high as wide, nor a "
            "square; set the image size of the model by hand"
        )
    return grids[0]


def _neck_and_fusion(
    checkpoint: CheckpointTensors, width: int, num_parts: int
) -> tuple[Neck | None, NeckFusion | None]:
    given, _ = necks_of(checkpoint.tensors)
    fusions: dict[int, NeckFusion] = {2 * width: "cat", width: "mean"} if num_parts else {width: "mean"}
    names = {key.partition(".")[0] for key in given}
    features: dict[str, Tensor] = {}
    if CLASSIFIER in checkpoint.tensors:
        features[CLASSIFIER] = checkpoint.tensors[CLASSIFIER]
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
