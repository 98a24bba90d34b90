"""Features of rows inside a process that already has a model: an actor's, or a training worker's."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passreid_ray import distributed
from passreid_ray.data.decode import BadImage
from passreid_ray.data.rows import Rows
from passreid_ray.models.fusion import Fusion, fuse_tokens, fused_width
from passreid_ray.models.part_vit import PartViT
from passreid_ray.views import PixelStatistics, evaluation_view


class Embedder(Protocol):
    """A module that makes features ``(B, feature_width)`` of normalised images."""

    training: bool

    @property
    def feature_width(self) -> int:
        """D."""
        ...

    def __call__(self, images_BCHW: Tensor) -> Tensor: ...
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

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return fuse_tokens(self.backbone(images_BCHW), self.fusion)


@torch.inference_mode()
def embed(model: Embedder, images_BCHW: Tensor) -> Tensor:
    """Features ``(B, D)`` of normalised images, in eval mode."""
    was_training = model.training
    model.train(False)
    features_BD = model(images_BCHW)
    model.train(was_training)
    return features_BD


def read_images(
    rows: Rows, numbers: np.ndarray, size_px: tuple[int, int], pixels: PixelStatistics
) -> tuple[Tensor, list[tuple[str, str]]]:
    """Normalised images ``(N, 3, H, W)`` of some rows, and (image_id, reason) of those that could not be used.

    An image that could not be used is NaN.
    """
    bad: list[tuple[str, str]] = []

    def read(number: int) -> Tensor:
        try:
            return evaluation_view(rows.image(number), size_px, pixels)
        except BadImage as error:
            bad.append((str(rows.image_ids[number]), str(error)))
            return torch.full((3, *size_px), torch.nan)

    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        return torch.stack(list(pool.map(read, map(int, numbers)))), bad


def embed_rows(
    model: Embedder,
    rows: Rows,
    *,
    size_px: tuple[int, int],
    pixels: PixelStatistics,
    batch_size: int,
    device: torch.device,
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Features ``(N, D)`` of all rows, computed by all workers together and the same on each; bad images are NaN."""
    world_size, rank = distributed.world_size(), distributed.rank()
    share = -(-len(rows) // world_size)
    numbers = np.arange(rank * share, min((rank + 1) * share, len(rows)))
    own_ND, bad = embed_numbers(
        model, rows, numbers, size_px=size_px, pixels=pixels, batch_size=batch_size, device=device
    )
    padded_ND = F.pad(own_ND, (0, 0, 0, share - len(own_ND)))
    return distributed.all_gather(padded_ND)[: len(rows)].cpu().numpy(), bad


def embed_numbers(
    model: Embedder,
    rows: Rows,
    numbers: np.ndarray,
    *,
    size_px: tuple[int, int],
    pixels: PixelStatistics,
    batch_size: int,
    device: torch.device,
) -> tuple[Tensor, list[tuple[str, str]]]:
    """Features of some rows, by this process alone, on ``device``; and (image_id, reason) of bad images."""
    bad: list[tuple[str, str]] = []
    features = [torch.zeros(0, model.feature_width, device=device)]
    for first in range(0, len(numbers), batch_size):
        images_BCHW, unusable = read_images(rows, numbers[first : first + batch_size], size_px, pixels)
        features.append(embed(model, images_BCHW.to(device)))
        bad += unusable
    return torch.cat(features), bad
