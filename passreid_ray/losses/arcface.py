"""Angular margin: the own class must win even when its angle is widened; hard negatives may come to count more."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from passreid_ray.distributed import all_reduce_mean
from passreid_ray.losses.class_cosines import check_scale_and_margin, checked_cosines


def arcface_loss(
    features_ND: Tensor,
    weights_CD: Tensor,
    ids_N: Tensor,
    scale: float = 30.0,
    margin: float = 0.5,
    *,
    curriculum: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of ``scale`` times the cosines, the own class's angle widened by ``margin`` radians; a scalar.

    Where the angle is above ``pi - margin``, its own logit is ``cos - margin sin(margin)`` instead of
    ``cos(angle + margin)``, which would rise again. Gradients are finite at cosines of 1 and -1 too. ArcFace
    (arXiv:1801.07698, eq. 3).

    ``curriculum`` is CurricularFace's t (arXiv:2004.00288, section 3), a scalar without gradient: the cosine of a
    negative above its row's own logit is then multiplied by (t + that cosine). It starts at 0, and
    ``updated_curriculum`` gives the next one, before the loss of the same batch. Without it negatives are as they are.

    Float32 even under autocast (float64 is kept). Shapes that do not fit are UserErrors, and so is, on the CPU, an id
    outside 0..C-1.
    """
    check_scale_and_margin(scale, margin, margin_below=math.pi)
    cosine_NC = checked_cosines(features_ND, weights_CD, ids_N)
    ids_N = ids_N.long()
    own_N1 = _widened(cosine_NC.gather(1, ids_N[:, None]), margin)
    if curriculum is not None:
        reweighted_NC = cosine_NC * (curriculum.detach().to(cosine_NC.dtype) + cosine_NC)
        cosine_NC = torch.where(cosine_NC > own_N1, reweighted_NC, cosine_NC)
    return F.cross_entropy(scale * cosine_NC.scatter(1, ids_N[:, None], own_N1), ids_N)


@torch.no_grad()
def updated_curriculum(
    curriculum: Tensor, features_ND: Tensor, weights_CD: Tensor, ids_N: Tensor, momentum: float = 0.99
) -> Tensor:
    """New t: ``momentum`` of the old one, the rest the mean cosine of rows to their own class, over all ranks.

    Every rank must call this with as many rows and gets the same result; it has ``curriculum``'s shape and dtype.
    Errors are those of ``arcface_loss``. CurricularFace (arXiv:2004.00288, section 3).
    """
    cosine_NC = checked_cosines(features_ND, weights_CD, ids_N)
    own_mean = all_reduce_mean(cosine_NC.gather(1, ids_N.long()[:, None]).mean())
    return curriculum * momentum + own_mean.to(curriculum.dtype) * (1 - momentum)


def _widened(cosine_N1: Tensor, margin: float) -> Tensor:
    """Cosine of the angle plus ``margin``; goes on falling where that sum is above pi."""
    # The root's slope is infinite at cosines of +-1, where rounding also takes the square below 0: the sine is a
    # constant 0 there. The inner `where` keeps the infinite slope out of the backward pass.
    squared_sine_N1 = 1 - cosine_N1.square()
    is_safe_N1 = squared_sine_N1 > torch.finfo(cosine_N1.dtype).eps
    sine_N1 = torch.where(is_safe_N1, squared_sine_N1, 1).sqrt().where(is_safe_N1, 0)
    widened_N1 = cosine_N1 * math.cos(margin) - sine_N1 * math.sin(margin)
    return torch.where(cosine_N1 > math.cos(math.pi - margin), widened_N1, cosine_N1 - margin * math.sin(margin))
