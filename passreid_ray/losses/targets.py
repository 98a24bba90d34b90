"""What the student learns to predict: the teacher's distributions over prototypes, kept from collapsing."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from passreid_ray.distributed import all_reduce_sum, world_size
from passreid_ray.dtypes import at_least_float32

SINKHORN_ITERATIONS = 3


def centered_targets(teacher: Sequence[Tensor], centers_TK: Tensor, teacher_temp: float) -> list[Tensor]:
    """Per token the softmax of centered, sharpened logits, ``(G, B, K)``; what DINO and PASS use.

    Float32 (float64 is kept), without gradient. DINO (arXiv:2104.14294, section 3.1).
    """
    targets = []
    for logits_GBK, center_K in zip(teacher, centers_TK.detach(), strict=True):
        if logits_GBK.shape[-1:] != center_K.shape:
            raise ValueError(f"teacher logits {tuple(logits_GBK.shape)} do not fit centers {tuple(centers_TK.shape)}")
        own_GBK = at_least_float32(logits_GBK.detach()).clone(memory_format=torch.contiguous_format)
        targets.append(become_centered_targets(own_GBK, center_K, teacher_temp))
    return targets


@torch.no_grad()
def become_centered_targets(logits_GBK: Tensor, center_K: Tensor, teacher_temp: float) -> Tensor:
    """``centered_targets`` of one token in the memory of its logits, in float32 or float64."""
    logits_GBK.sub_(center_K).div_(teacher_temp)
    return torch.softmax(logits_GBK, dim=-1, out=logits_GBK)


@torch.no_grad()
def sinkhorn_targets(teacher: Sequence[Tensor], teacher_temp: float) -> list[Tensor]:
    """Per token distributions ``(G, B, K)`` in which, over the batch of all ranks, every prototype is used alike.

    Three rounds of Sinkhorn-Knopp on the sharpened logits: prototypes to equal mass, then images to mass 1. It needs
    no center and acts from the first step on. SwAV (arXiv:2006.09882, section 3.1); DINOv2 (arXiv:2304.07193).
    Every rank must call this; they may have different numbers of images, none too.
    """
    return [_sinkhorn(F.softmax(at_least_float32(logits_GBK) / teacher_temp, dim=-1)) for logits_GBK in teacher]


def _sinkhorn(mass_GBK: Tensor) -> Tensor:
    """The targets, in the memory of ``mass_GBK``."""
    # The softmax has made rows sum to 1: Sinkhorn-Knopp does not depend on the scale of a row, and nothing overflows.
    # That also makes the number of images a guess that need not be right: where ranks differ, it scales rows only.
    num_images = mass_GBK.shape[0] * mass_GBK.shape[1] * world_size()
    for _ in range(SINKHORN_ITERATIONS):
        used_K = all_reduce_sum(mass_GBK.sum(dim=(0, 1)))
        mass_GBK.mul_(num_images / mass_GBK.shape[-1] / used_K.clamp(min=torch.finfo(used_K.dtype).tiny))
        mass_GBK.div_(mass_GBK.sum(dim=-1, keepdim=True))
    return mass_GBK
