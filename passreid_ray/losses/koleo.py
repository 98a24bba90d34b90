"""Spreading features over the sphere, so that none crowd together."""

import torch
import torch.nn.functional as F
from torch import Tensor

from passreid_ray.distributed import all_gather_with_gradient
from passreid_ray.dtypes import at_least_float32

EPSILON = 1e-8


def koleo_loss(features_ND: Tensor) -> Tensor:
    """Mean of -log distance from each L2-normalised feature to its nearest other one, over the rows of all ranks.

    Kozachenko-Leonenko estimator of differential entropy: it falls as features spread. Every rank must call this with
    as many rows, and gets the value over all of them; after DDP has averaged gradients they are those of one process.
    Spreading vectors (arXiv:1806.03198, section 4); DINOv2 (arXiv:2304.07193).
    """
    features_ND = F.normalize(all_gather_with_gradient(at_least_float32(features_ND)), dim=-1)
    with torch.no_grad():
        similarity_NN = features_ND @ features_ND.T
        nearest_N = similarity_NN.fill_diagonal_(-2).argmax(dim=1)
    return -torch.log(F.pairwise_distance(features_ND, features_ND[nearest_N], eps=EPSILON)).mean()
