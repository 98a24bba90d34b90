"""Stochastic depth that does not depend on how many workers share a batch."""

import torch
from torch import Tensor

from passreid_ray import distributed
from passreid_ray.models.part_vit import PartViT


def drop_path_noise(
    backbone: PartViT, seed: int, step: int, batch: int, device: torch.device, views: int | None = None
) -> Tensor | None:
    """Noise for this worker's ``batch`` images, ``(depth, 2, B)``, or ``(depth, 2, M, B)`` for M views of each.

    None when the backbone has no stochastic depth. Drawn for the global batch from the seed and the step alone, so an
    image meets the same noise on any worker.
    """
    if backbone.drop_path_rates[-1] == 0:
        return None
    generator = torch.Generator().manual_seed((seed << 32) + step)
    of_views = () if views is None else (views,)
    shape = (backbone.depth, 2, *of_views, batch * distributed.world_size())
    first = distributed.rank() * batch
    return torch.rand(shape, generator=generator)[..., first : first + batch].to(device)
