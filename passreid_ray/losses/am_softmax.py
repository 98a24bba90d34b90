"""Additive margin: the own class's cosine must win by a fixed amount."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from passreid_ray.losses.class_cosines import check_scale_and_margin, checked_cosines


def am_softmax_loss(
    features_ND: Tensor, weights_CD: Tensor, ids_N: Tensor, scale: float = 30.0, margin: float = 0.35
) -> Tensor:
    """Mean cross-entropy of the logits ``scale (cos_c - margin [c = id])``, a scalar.

    ``cos_c`` is the cosine of the feature to the weights of class c. With 751 classes and all cosines 0 the default
    margin makes the loss 17.1, without it 6.6: raise the margin slowly when a classifier starts from nothing. Float32
    even under autocast (float64 is kept). Shapes that do not fit are UserErrors, and so is, on the CPU, an id outside
    0..C-1. AM-Softmax (arXiv:1801.05599).
    """
    check_scale_and_margin(scale, margin, margin_below=math.inf)
    cosine_NC = checked_cosines(features_ND, weights_CD, ids_N)
    ids_N = ids_N.long()
    margin_NC = torch.zeros_like(cosine_NC).scatter(1, ids_N[:, None], margin)
    return F.cross_entropy(scale * (cosine_NC - margin_NC), ids_N)
