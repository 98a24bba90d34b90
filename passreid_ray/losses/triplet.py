"""Each feature nearer to its farthest positive than to its nearest negative."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from passreid_ray.distributed import all_gather, all_gather_with_gradient
from passreid_ray.dtypes import at_least_float32
from passreid_ray.errors import UserError
from passreid_ray.losses.checks import check_choice, check_ids, check_matrix

TripletDistance = Literal["euclidean", "cosine"]


def triplet_loss(
    features_ND: Tensor,
    ids_N: Tensor,
    margin: float | None = None,
    normalize: bool = False,
    *,
    distance: TripletDistance = "euclidean",
) -> Tensor:
    """Batch-hard triplet loss, the mean over the anchors of all ranks; a scalar, in float32 at least.

    ``d_ap`` is the distance from an anchor to the farthest feature of its identity, itself included, and ``d_an`` to
    the nearest one of another identity. The loss is ``max(0, margin + d_ap - d_an)``, or the soft margin
    ``log(1 + exp(d_ap - d_an))`` without a margin. ``cosine`` is ``2 - 2 cos``, as fast-reid has it, with or without
    ``normalize``. Identities may come in groups of any size and in any order. Without a second identity there are no
    negatives: loss and gradient are 0. Equal features have distance 0 and no gradient between them.

    Every rank must call this with as many rows, and gets the value over all of them; after DDP has averaged gradients
    they are those of one process. Shapes, settings and a negative margin that do not fit are a UserError.
    Batch hard and soft margin: In Defense of the Triplet Loss (arXiv:1703.07737).
    """
    check_matrix("triplet_loss", "features", features_ND, "(N, D)")
    check_ids("triplet_loss", ids_N, len(features_ND))
    check_choice("triplet_loss distance", distance, TripletDistance)
    if margin is not None and not margin >= 0:
        raise UserError(f"triplet_loss margin: {margin}; give a number from 0, or None for the soft margin")
    ids_N = all_gather(ids_N)
    with torch.autocast(features_ND.device.type, enabled=False):
        features_ND = all_gather_with_gradient(at_least_float32(features_ND))
        if normalize or distance == "cosine":
            features_ND = F.normalize(features_ND, dim=1)
        same_NN = ids_N[:, None] == ids_N
        # Differences, not a^2 + b^2 - 2ab: that one cancels for near points (2e-3 from a feature to itself in float32).
        with torch.no_grad():
            distance_NN = torch.cdist(features_ND, features_ND, compute_mode="donot_use_mm_for_euclid_dist")
            positive_N = distance_NN.masked_fill(~same_NN, -math.inf).argmax(dim=1)
            negative_N = distance_NN.masked_fill(same_NN, math.inf).argmin(dim=1)
        to_positive_N = _distance(features_ND, features_ND[positive_N], distance)
        to_negative_N = _distance(features_ND, features_ND[negative_N], distance)
        excess_N = to_positive_N - to_negative_N
        loss_N = F.softplus(excess_N) if margin is None else F.relu(excess_N + margin)
        has_negative_N = ~same_NN.all(dim=1)
        return (loss_N * has_negative_N).sum() / has_negative_N.sum().clamp(min=1)


def _distance(features_ND: Tensor, others_ND: Tensor, distance: TripletDistance) -> Tensor:
    difference_ND = features_ND - others_ND
    match distance:
        case "euclidean":
            return torch.linalg.vector_norm(difference_ND, dim=1)  # its gradient at 0 is 0
        case "cosine":
            return difference_ND.square().sum(dim=1)  # |u - v|^2 = 2 - 2 cos for unit features
