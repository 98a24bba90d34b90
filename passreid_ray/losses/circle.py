"""Each cosine pulls with a force of its own: the farther from its optimum, the stronger."""

import torch
import torch.nn.functional as F
from torch import Tensor

from passreid_ray.losses.class_cosines import check_scale_and_margin, checked_cosines


def circle_loss(
    features_ND: Tensor, weights_CD: Tensor, ids_N: Tensor, scale: float = 64.0, margin: float = 0.25
) -> Tensor:
    """Mean cross-entropy of cosines, each weighted by how far it is from its optimum; a scalar.

    The own class's logit is ``scale (1 + margin - cos) (cos - 1 + margin)``, another's ``scale (cos + margin)
    (cos - margin)``. The first factor is a weight: it is never below 0 and takes no gradient. Float32 even under
    autocast (float64 is kept). Shapes that do not fit are UserErrors, and so is, on the CPU, an id outside 0..C-1.
    Circle loss with class labels (arXiv:2002.10857, sections 3.1 and 3.2).
    """
    check_scale_and_margin(scale, margin, margin_below=1)
    cosine_NC = checked_cosines(features_ND, weights_CD, ids_N)
    ids_N = ids_N.long()
    is_own_NC = torch.zeros_like(cosine_NC, dtype=torch.bool).scatter(1, ids_N[:, None], True)
    with torch.no_grad():
        weight_NC = torch.where(is_own_NC, 1 + margin - cosine_NC, cosine_NC + margin).clamp(min=0)
    return F.cross_entropy(scale * weight_NC * (cosine_NC - torch.where(is_own_NC, 1 - margin, margin)), ids_N)
