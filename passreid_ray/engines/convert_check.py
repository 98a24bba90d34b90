"""The checks of a conversion: what was written is read again and compared with what was read, tensors and features."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from passreid_ray.engines.convert_source import Source, tensors_in
from passreid_ray.engines.embedding import Embedder, FusedViT, TunedFeatures, embed
from passreid_ray.engines.loading import LoadConfig, Loaded, load_model
from passreid_ray.errors import UserError
from passreid_ray.models import ReidModel, read_state
from passreid_ray.models.config import ModelConfig
from passreid_ray.train.state_files import load_state

TOLERANCE = 1e-5
"""Difference of features up to which two models are the same."""
NUM_IMAGES = 4
"""Random images whose features are compared."""


@dataclass(frozen=True)
class Checked:
    """The model in what was written, as any other job reads it."""

    loaded: Loaded
    largest_difference: float
    """Between features of random images before and after."""
    is_told: bool
    """Whether what was written tells the kind of model, but for its attention heads."""


def check_tensors(draft: Path, expected: Mapping[str, Tensor], output: Path) -> None:
    """Raise ``UserError`` unless the draft holds the tensors ``expected``, equal to the bit, and no others."""
    found = load_state(draft)[0] if draft.is_dir() else dict(tensors_in(read_state(draft)))
    if different := _different(expected, found):
        raise UserError(f"{output}: not written: {different[0]} is not the same when it is read again")


def check_model(draft: Path, source: Source, model: ReidModel | None, output: Path) -> Checked:
    """The model in the draft, with the weights and the features of the source; ``model`` None: its backbone.

    Raises:
        UserError: it has others, even when it is built as the source's model was.
    """
    try:
        as_told = ModelConfig(num_heads=source.num_heads)
        return Checked(*_read_and_compared(draft, as_told, source, model, output), is_told=True)
    except UserError:  # a kind of model that the file does not tell
        given = source.loaded.model_config
        return Checked(*_read_and_compared(draft, given, source, model, output), is_told=False)


def _read_and_compared(
    draft: Path, given: ModelConfig, source: Source, model: ReidModel | None, output: Path
) -> tuple[Loaded, float]:
    """The draft's model, and the largest difference of its features; ``UserError`` unless it is the source's."""
    size_px = None if draft.is_dir() else source.backbone.image_size
    settings = LoadConfig(checkpoint=draft, model=given, image_size_px=size_px)
    again = load_model(settings, "cat" if model is None else model.fusion)
    before = source.backbone if model is None else model
    after = again.backbone if model is None else again.reid_model
    if different := _different(before.state_dict(), {} if after is None else after.state_dict()):
        raise UserError(f"{output}: not written: {different[0]} is another in the model that is read again")
    difference = _largest_difference(*_embedders(source, model, again), source.backbone.image_size)
    if not difference <= TOLERANCE:
        raise UserError(f"{output}: not written: features of the model that is read again differ by {difference:g}")
    return again, difference


def _embedders(source: Source, model: ReidModel | None, again: Loaded) -> tuple[Embedder, Embedder]:
    """What makes features before and after: on the source's side of its necks, in front of fresh ones."""
    if model is None or again.reid_model is None:
        return FusedViT(source.backbone, "cat"), FusedViT(again.backbone, "cat")
    match source.loaded.model:
        case TunedFeatures(side=side) as before:
            return before, TunedFeatures(again.reid_model, side)
        case ReidModel() as before:
            return before, again.reid_model
        case FusedViT(backbone=backbone):
            return FusedViT(backbone, model.fusion), TunedFeatures(again.reid_model, "before")


def _largest_difference(before: Embedder, after: Embedder, image_size_px: tuple[int, int]) -> float:
    images_BCHW = torch.randn((NUM_IMAGES, 3, *image_size_px), generator=torch.Generator().manual_seed(0))
    return (embed(before, images_BCHW) - embed(after, images_BCHW)).abs().max().item()


def _different(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Sorted names of the tensors that only one has, or that are not the same to the bit."""
    names = sorted(expected.keys() | found.keys())
    return [name for name in names if not _is_equal(expected.get(name), found.get(name))]


def _is_equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both are there and the same to the bit, nan and the sign of 0 included."""
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = [value.detach().cpu().contiguous().flatten().view(torch.uint8) for value in (a, b)]
    return torch.equal(*bits)
