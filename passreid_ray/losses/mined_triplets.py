"""Triplets that were mined beforehand: a query nearer to its positive than to its negative."""

import torch
import torch.nn.functional as F
from torch import Tensor

from passreid_ray.dtypes import at_least_float32
from passreid_ray.errors import UserError


def ranking_loss(query_ND: Tensor, positive_ND: Tensor, negative_ND: Tensor, margin: float = 0.1) -> Tensor:
    """Mean of ``max(0, margin + |q - p|^2 - |q - n|^2) / 2`` over the rows of this rank; a scalar.

    Features are L2-normalised here, and everything is in float32 at least. Row i of the three is one triplet, and rows
    do not meet: triplets one by one, each with its share of the weight, give the gradient of the batch. Three shapes
    that are not one ``(N, D)``, no rows or a negative margin are a UserError.
    Re-ID done right (arXiv:1801.05339).
    """
    shapes = [tuple(features.shape) for features in (query_ND, positive_ND, negative_ND)]
    if query_ND.ndim != 2 or 0 in query_ND.shape or len(set(shapes)) > 1:
        raise UserError(
            f"ranking_loss: query, positive and negative of shapes {', '.join(map(str, shapes))}; "
            "give three times the same (N, D), both above 0"
        )
    if not margin >= 0:
        raise UserError(f"ranking_loss margin: {margin}; give a number from 0")
    with torch.autocast(query_ND.device.type, enabled=False):
        query_ND, positive_ND, negative_ND = (
            F.normalize(at_least_float32(features_ND), dim=1) for features_ND in (query_ND, positive_ND, negative_ND)
        )
        to_positive_N = (query_ND - positive_ND).square().sum(dim=1)
        to_negative_N = (query_ND - negative_ND).square().sum(dim=1)
        return F.relu(margin + to_positive_N - to_negative_N).mean() / 2
