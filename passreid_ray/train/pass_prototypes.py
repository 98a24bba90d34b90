"""What a step asks of the prototypes of a token, whether each rank holds all of them or its share."""

# Shape letters: B this rank's images, I those of all ranks, G global views, V views of a token, D bottleneck width,
# K prototypes, S those of this rank. With whole prototypes targets are (G, B, K) and a center is (K,); with sharded
# ones they are (G, I, S) and (S,).

from typing import NamedTuple

import torch
from torch import Tensor

from passreid_ray.distributed import world_size
from passreid_ray.dtypes import at_least_float32
from passreid_ray.losses import (
    become_centered_targets,
    prototype_cross_entropy,
    sinkhorn_targets,
    updated_centers,
)
from passreid_ray.losses.sharded_prototypes import (
    of_own_images,
    sharded_centers,
    sharded_cross_entropy,
    sharded_logits,
    sharded_sinkhorn,
    sharded_targets,
)
from passreid_ray.models.prototype_head import Prototypes
from passreid_ray.train.ema import Centering


class TokenTargets(NamedTuple):
    """What the teacher says of one token of the global views."""

    targets: Tensor
    """Its distributions, ``(G, B, K)`` or ``(G, I, S)``."""
    center: Tensor
    """What the center is after this step."""


@torch.no_grad()
def token_targets(
    own_GBD: Tensor,
    prototypes: Prototypes,
    center: Tensor,
    *,
    centering: Centering,
    teacher_temp: float,
    center_momentum: float,
) -> TokenTargets:
    """The teacher's targets of one token, whose bottlenecks are ``own_GBD``; call it under the step's autocast."""
    if prototypes.is_sharded:
        prototypes_SD = prototypes.own_rows()
        new_center = sharded_centers(center, own_GBD, prototypes_SD, center_momentum)
        match centering:
            case "mean":
                return TokenTargets(sharded_targets(own_GBD, prototypes_SD, center, teacher_temp), new_center)
            case "sinkhorn":
                return TokenTargets(sharded_sinkhorn(own_GBD, prototypes_SD, teacher_temp), new_center)
    logits_GBK = at_least_float32(prototypes(own_GBD))
    (new_center,) = updated_centers(center[None], [logits_GBK], center_momentum)
    with torch.autocast(logits_GBK.device.type, enabled=False):
        match centering:  # targets in the memory of their logits: both are as large as a layer of prototypes
            case "mean":
                return TokenTargets(become_centered_targets(logits_GBK, center, teacher_temp), new_center)
            case "sinkhorn":
                (targets_GBK,) = sinkhorn_targets([logits_GBK], teacher_temp)
                return TokenTargets(targets_GBK, new_center)


def token_loss(own_VBD: Tensor, prototypes: Prototypes, targets: Tensor, student_temp: float) -> Tensor:
    """Mean cross-entropy of a token's views against the targets of other global views, with gradient.

    Of this rank's images, or of all ranks' when the prototypes are sharded; the mean over ranks is the same.
    """
    if prototypes.is_sharded:
        return sharded_cross_entropy(own_VBD, prototypes.own_rows(), targets, student_temp=student_temp)
    return prototype_cross_entropy(
        own_VBD, prototypes.weight_v, prototypes.weight_g, targets, student_temp=student_temp
    )


def in_micro_batches(targets: Tensor, num: int, prototypes: Prototypes) -> list[Tensor]:
    """``targets`` of each of ``num`` micro-batches; the images of one are some of every rank."""
    if not prototypes.is_sharded:
        return list(targets.chunk(num, dim=1))
    return [own.flatten(1, 2) for own in targets.unflatten(1, (world_size(), -1)).chunk(num, dim=2)]


def targets_of_own_images(targets: Tensor, prototypes: Prototypes) -> Tensor:
    """Targets ``(G, B, K)`` of this rank's images."""
    return of_own_images(targets) if prototypes.is_sharded else targets


@torch.no_grad()
def logits_of_own_images(own_GBD: Tensor, prototypes: Prototypes) -> Tensor:
    """Logits ``(G, B, K)`` of this rank's images, without gradient."""
    if prototypes.is_sharded:
        return of_own_images(sharded_logits(own_GBD, prototypes.own_rows()))
    return prototypes(own_GBD)
