"""Features of rows inside a process that already has a model: an actor's, or a training worker's."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passreid_ray import distributed
from passreid_ray.data.decode import BadImage
from passreid_ray.data.rows import Rows
from passreid_ray.models.fusion import Fusion, fuse_tokens, fused_width
from passreid_ray.models.part_vit import PartViT
from passreid_ray.models.reid_model import ReidModel
from passreid_ray.train.pulse import pulse
from passreid_ray.views import PixelStatistics, evaluation_pixels, normalize, undistorted_pixels

NeckSide = Literal["before", "after"]


@dataclass(frozen=True)
class ImageInput:
    """How images become what a model is given."""

    size_px: tuple[int, int]
    """Height and width."""
    pixels: PixelStatistics
    patch_px: int | None = None
    """None: images are stretched to the size. Otherwise they keep their shape and are told by their grids of patches
    of this side; see ``undistorted_pixels``."""

    def read(self, image_HWC: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """(uint8 pixels ``(3, H, W)``, rows and columns of patches)."""
        if self.patch_px is None:
            return evaluation_pixels(image_HWC, self.size_px), (0, 0)
        return undistorted_pixels(image_HWC, self.size_px, self.pixels.mean_colour, self.patch_px)


class Images(NamedTuple):
    """A batch as a model is given it, and what could not be read."""

    images_BCHW: Tensor
    """Normalised; NaN where an image could not be used."""
    grids_B2: Tensor | None
    """Rows and columns of patches, where images keep their shape; on the CPU, where positions are made from them."""
    bad: list[tuple[str, str]]
    """(image_id, reason)."""


class Embedder(Protocol):
    """A module that makes features ``(B, feature_width)`` of normalised images."""

    training: bool

    @property
    def feature_width(self) -> int:
        """D."""
        ...

    def __call__(self, images_BCHW: Tensor, *, grids_B2: Tensor | None = None) -> Tensor: ...
    def train(self, mode: bool = True) -> Any: ...


class FusedViT(nn.Module):
    """A backbone and how its tokens become L2-normalised features."""

    def __init__(self, backbone: PartViT, fusion: Fusion) -> None:
        super().__init__()
        self.backbone = backbone
        self.fusion: Fusion = fusion

    @property
    def feature_width(self) -> int:
        """Width of the features."""
        return fused_width(self.backbone.width, self.backbone.num_parts, self.fusion)

    def forward(self, images_BCHW: Tensor, *, grids_B2: Tensor | None = None) -> Tensor:
        return fuse_tokens(self.backbone(images_BCHW, grids_B2=grids_B2), self.fusion)


class TunedFeatures(nn.Module):
    """A model that was tuned with labels, and on which side of its necks features are compared."""

    def __init__(self, model: ReidModel, side: NeckSide) -> None:
        super().__init__()
        self.model = model
        self.side: NeckSide = side

    @property
    def feature_width(self) -> int:
        """Width of the features."""
        return self.model.feature_width

    @property
    def fusion(self) -> Fusion:
        """How tokens become a feature."""
        return self.model.fusion

    def extra_repr(self) -> str:
        """The side."""
        return self.side

    def forward(self, images_BCHW: Tensor, *, grids_B2: Tensor | None = None) -> Tensor:
        features = self.model.embed(images_BCHW, grids_B2=grids_B2)
        return F.normalize(features.before_BD if self.side == "before" else features.after_BD, dim=1)


@torch.inference_mode()
def embed(model: Embedder, images_BCHW: Tensor, grids_B2: Tensor | None = None) -> Tensor:
    """Features ``(B, D)`` of normalised images, in eval mode."""
    was_training = model.training
    model.train(False)
    features_BD = model(images_BCHW, grids_B2=grids_B2)
    model.train(was_training)
    return features_BD


def read_images(rows: Rows, numbers: np.ndarray, image_input: ImageInput) -> Images:
    """Normalised images of some rows of ``rows``."""
    bad: list[tuple[str, str]] = []

    def read(number: int) -> tuple[Tensor, tuple[int, int]]:
        try:
            pixels_3HW, grid = image_input.read(rows.image(number))
        except BadImage as error:
            bad.append((str(rows.image_ids[number]), str(error)))
            return torch.full((3, *image_input.size_px), torch.nan), (1, 1)
        return normalize(torch.from_numpy(pixels_3HW), image_input.pixels), grid

    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        images, grids = zip(*pool.map(read, map(int, numbers)), strict=True)
    return Images(torch.stack(images), None if image_input.patch_px is None else torch.tensor(grids), bad)


def embed_rows(
    model: Embedder, rows: Rows, image_input: ImageInput, *, batch_size: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Features ``(N, D)`` of all rows, and which of them could be used ``(N,)``.

    Computed by all workers together, and the same on each.
    """
    world_size, rank = distributed.world_size(), distributed.rank()
    share = -(-len(rows) // world_size)
    numbers = np.arange(rank * share, min((rank + 1) * share, len(rows)))
    own_ND, bad = embed_numbers(model, rows, numbers, image_input, batch_size=batch_size, device=device)
    is_bad_N = np.isin(rows.image_ids[numbers].astype(str), [image_id for image_id, _ in bad])
    own_ND1 = torch.cat([own_ND, torch.from_numpy(is_bad_N).to(own_ND)[:, None]], dim=1)
    gathered_ND1 = distributed.all_gather(F.pad(own_ND1, (0, 0, 0, share - len(own_ND))))[: len(rows)].cpu().numpy()
    return gathered_ND1[:, :-1], gathered_ND1[:, -1] == 0


def embed_numbers(
    model: Embedder, rows: Rows, numbers: np.ndarray, image_input: ImageInput, *, batch_size: int, device: torch.device
) -> tuple[Tensor, list[tuple[str, str]]]:
    """Features of some rows, by this process alone, on ``device``; and (image_id, reason) of bad images."""
    bad: list[tuple[str, str]] = []
    features = [torch.zeros(0, model.feature_width, device=device)]
    for first in range(0, len(numbers), batch_size):
        batch = read_images(rows, numbers[first : first + batch_size], image_input)
        features.append(embed(model, batch.images_BCHW.to(device), batch.grids_B2))
        bad += batch.bad
        pulse.get_on()
    return torch.cat(features), bad
