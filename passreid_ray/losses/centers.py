"""The running mean of teacher logits, which keeps one prototype from winning everywhere."""

from collections.abc import Sequence

import torch
from torch import Tensor

from passreid_ray.distributed import all_reduce_mean


@torch.no_grad()
def updated_centers(centers_TK: Tensor, teacher: Sequence[Tensor], momentum: float) -> Tensor:
    """New ``(T, K)`` centers: ``momentum`` of the old ones, the rest the mean teacher logits of all ranks.

    ``teacher``: per token a ``(G, B, K)`` tensor of logits, with the same B on every rank; every rank must call this
    and gets the same result. DINO (arXiv:2104.14294, eq. 4), one center per token as in PASS.
    """
    mean_TK = torch.stack([logits_GBK.mean(dim=(0, 1), dtype=centers_TK.dtype) for logits_GBK in teacher])
    if mean_TK.shape != centers_TK.shape:
        raise ValueError(f"centers {tuple(centers_TK.shape)} do not fit teacher logits of {tuple(mean_TK.shape)}")
    return centers_TK * momentum + all_reduce_mean(mean_TK) * (1 - momentum)
