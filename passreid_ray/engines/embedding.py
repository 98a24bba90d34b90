"""Features of rows inside a process that already has a model: evaluation during training."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from passreid_ray import distributed
from passreid_ray.data.decode import BadImage
from passreid_ray.data.rows import Rows
from passreid_ray.models.fusion import Fusion, fuse_tokens
from passreid_ray.models.part_vit import PartViT
from passreid_ray.views import PixelStatistics, evaluation_view


@torch.inference_mode()
def embed(model: PartViT, images_BCHW: Tensor, fusion: Fusion) -> Tensor:
    """L2-normalised features ``(B, D)`` or ``(B, 2D)`` of normalised images, in eval mode."""
    was_training = model.training
    model.eval()
    features_BD = fuse_tokens(model(images_BCHW), fusion)
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
    model: PartViT,
    rows: Rows,
    *,
    size_px: tuple[int, int],
    pixels: PixelStatistics,
    fusion: Fusion,
    batch_size: int,
    device: torch.device,
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Features ``(N, D)`` of all rows, computed by all workers together and the same on each; bad images are NaN."""
    world_size, rank = distributed.world_size(), distributed.rank()
    share = -(-len(rows) // world_size)
    numbers = np.arange(rank * share, min((rank + 1) * share, len(rows)))
    bad: list[tuple[str, str]] = []
    features = []
    for first in range(0, len(numbers), batch_size):
        images_BCHW, unusable = read_images(rows, numbers[first : first + batch_size], size_px, pixels)
        features.append(embed(model, images_BCHW.to(device), fusion))
        bad += unusable
    width = model.width * (2 if fusion == "cat" and model.num_parts else 1)
    own_ND = torch.cat(features) if features else torch.zeros(0, width, device=device)
    padded_ND = F.pad(own_ND, (0, 0, 0, share - len(own_ND)))
    return distributed.all_gather(padded_ND)[: len(rows)].cpu().numpy(), bad
