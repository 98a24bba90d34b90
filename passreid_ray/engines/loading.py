"""A model that makes features, from any checkpoint: a run of this project or a public file.

Reads from top to bottom in the order it runs: settings, ``load_model``, the two kinds of checkpoints.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from pydantic import Field
from torch import Tensor

from passreid_ray.config import Section, UserPath, build
from passreid_ray.engines.embedding import FusedViT, ImageInput, NeckSide, TunedFeatures
from passreid_ray.errors import UserError
from passreid_ray.models import PartViT, ReidModel, infer_reid_shape, load_backbone, load_reid_model, read_state
from passreid_ray.models.config import ModelConfig, NeckConfig
from passreid_ray.models.fusion import Fusion
from passreid_ray.models.reid_model import NeckFusion
from passreid_ray.train.finetune_state import published_tensors
from passreid_ray.train.state_files import find_checkpoint, load_state, tensors_below
from passreid_ray.views import PixelStatistics, TrainingViewConfig

BackboneOf = Literal["teacher", "student"]

DEFAULT_SIZE_PX = (256, 128)
"""Height and width for random weights and for backbones of square images."""


class LoadConfig(Section):
    """Which weights make features, and what of them a file does not tell."""

    checkpoint: UserPath | None = None
    """A run or checkpoint folder of this project, or any public file; none: random weights."""
    weights: BackboneOf = "teacher"
    """Which network of a pre-training checkpoint of this project."""
    seed: int = Field(default=0, ge=0)
    """Decides random weights."""
    model: ModelConfig | None = None
    """Model of a public file, where it is not told by its tensors, or of random weights (none: ViT-S); a checkpoint of
    this project brings its own."""
    image_size_px: tuple[int, int] | None = None
    """Height and width that images are resized to; none: the checkpoint's, or 256 x 128."""
    num_parts: int | None = Field(default=None, ge=0)
    """Part tokens; none: the public file's, or 3 for random weights."""
    pixels: PixelStatistics | None = None
    """Pixel mean and standard deviation; none: the checkpoint's, 0.5 for a public tuned file, or ImageNet's."""


@dataclass(frozen=True)
class Loaded:
    """A model that makes features, and what images must be made into for it."""

    model: FusedViT | ReidModel | TunedFeatures
    image_input: ImageInput
    notes: str
    """What was loaded, for the reader."""
    model_config: ModelConfig
    """What the backbone was built with."""

    @property
    def backbone(self) -> PartViT:
        """The backbone alone."""
        match self.model:
            case TunedFeatures(model=model):
                return model.backbone
            case FusedViT(backbone=backbone) | ReidModel(backbone=backbone):
                return backbone

    @property
    def reid_model(self) -> ReidModel | None:
        """The tuned model; None for a backbone, which has no necks."""
        match self.model:
            case TunedFeatures(model=model):
                return model
            case ReidModel() as model:
                return model
            case FusedViT():
                return None


def load_model(config: LoadConfig, fusion: Fusion) -> Loaded:
    """``config``'s checkpoint, or random weights.

    A tuned checkpoint fuses its tokens in its own way and gives the features that its own code compares: a supervised
    file those before the necks, an unsupervised one those behind them. ``fusion`` is for backbones, and for the files
    that do not tell theirs.

    Raises:
        UserError: the checkpoint is not there, is refused, or does not fit the settings.
    """
    path = config.checkpoint
    if path is None:
        torch.manual_seed(config.seed)
        size_px = config.image_size_px or DEFAULT_SIZE_PX
        model_config = config.model or ModelConfig()
        backbone = model_config.build(size_px, 3 if config.num_parts is None else config.num_parts)
        image_input = ImageInput(size_px, config.pixels or PixelStatistics())
        return Loaded(FusedViT(backbone, fusion), image_input, "random weights", model_config)
    if not path.exists():
        raise UserError(f"checkpoint: {path} does not exist")
    if path.is_dir():
        folder = find_checkpoint(path)
        return load_own(config, fusion, *load_state(folder), str(folder))
    try:
        loaded = load_public(config, fusion, read_state(path))
    except UserError as error:
        message = str(error).removeprefix("checkpoint: ").removeprefix(f"{path}: ")
        raise UserError(f"{path}: {message}") from None
    return replace(loaded, notes=f"{path}: {loaded.notes}")


def load_public(config: LoadConfig, fusion: Fusion, content: Mapping[str, Any]) -> Loaded:
    """The model in the ``content`` of a public file, of the kind and size that its tensors and ``config`` tell."""
    shape = infer_reid_shape(content, config.image_size_px)
    model_config = shape.model_config(config.model)
    # A square table is that of a backbone trained on pictures of anything; people are upright.
    is_for_people = shape.tuned_by is not None or shape.grid[0] > shape.grid[1]
    size_px = config.image_size_px or (shape.image_size if is_for_people else DEFAULT_SIZE_PX)
    backbone = model_config.build(size_px, shape.num_parts if config.num_parts is None else config.num_parts)
    sizes = (
        f"ViT of width {backbone.width} and depth {backbone.depth} with {backbone.num_parts} parts, "
        f"{size_px[0]}x{size_px[1]} px"
    )
    if shape.tuned_by is None:
        notes = f"a backbone, {sizes}; {load_backbone(backbone, content)}"
        image_input = ImageInput(size_px, config.pixels or PixelStatistics())
        return Loaded(FusedViT(backbone, fusion), image_input, notes, model_config)
    if shape.fusion is None and fusion not in get_args(NeckFusion):
        raise UserError(f"fusion: the file does not tell its own; expected cat or mean, found {fusion}")
    neck_fusion = shape.fusion or cast(NeckFusion, fusion)
    model = ReidModel(backbone, fusion=neck_fusion, neck=shape.neck or "single")
    report = load_reid_model(model, content)
    side: NeckSide = "before" if shape.tuned_by == "supervised" else "after"
    told = "" if shape.fusion else " (as set, the file does not tell it)"
    notes = (
        f"{shape.tuned_by} tuning, {sizes}, neck {model.neck}, fusion {model.fusion}{told}, features {side} the neck; "
        f"{report}"
    )
    views = TrainingViewConfig()  # the defaults are those of the codes that write such files
    image_input = ImageInput(size_px, config.pixels or PixelStatistics(mean=views.mean, std=views.std))
    return Loaded(TunedFeatures(model, side) if side == "before" else model, image_input, notes, model_config)


def load_own(
    config: LoadConfig, fusion: Fusion, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], folder: str
) -> Loaded:
    """The model in what ``load_state`` read of a checkpoint of this project in ``folder``."""
    settings = meta["config"]
    # Pre-training has views of parts, tuning has necks, tuning with labels says on which side of them features are.
    kind = "pretrain" if "neck" not in settings else "finetune" if "feature" in settings else "usl"
    views, undistorted = settings["views"], settings.get("undistorted")
    known_px = views["global_size_px"] if kind == "pretrain" else (undistorted or views)["image_size_px"]
    size_px = config.image_size_px or tuple(known_px)
    num_parts = (settings["views"] if kind == "pretrain" else settings)["num_parts"]
    model_config = build(ModelConfig, settings["model"])
    backbone = model_config.build(size_px, num_parts)
    image_input = ImageInput(
        size_px,
        config.pixels or PixelStatistics(mean=views["mean"], std=views["std"]),
        backbone.patch_size[0] if undistorted else None,
    )
    where = f"{folder}, step {meta['step']}"
    if kind == "pretrain":
        state = tensors_below(tensors, f"{config.weights}.backbone.")
        notes = f"{config.weights} of {where}: {load_backbone(backbone, state)}"
        return Loaded(FusedViT(backbone, fusion), image_input, notes, model_config)
    model = build(NeckConfig, settings["neck"]).build(backbone)
    notes = f"{where}: {load_reid_model(model, published_tensors(tensors))}"
    features = TunedFeatures(model, settings["feature"]) if kind == "finetune" else model
    return Loaded(features, image_input, notes, model_config)
