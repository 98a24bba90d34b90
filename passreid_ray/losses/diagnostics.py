"""Is the representation collapsing? Numbers without gradient, equal on all ranks; every rank must ask for them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from passreid_ray.distributed import all_reduce_mean
from passreid_ray.losses.part_distillation import part_distillation_terms

_NEAR = 0.01


class DistillationDiagnostics(NamedTuple):
    """The two parts of the cross-entropy between global views, per token: their sum is that cross-entropy."""

    teacher_entropy_T: Tensor
    """Mean entropy of the teacher's targets, in nats: 0 = one prototype, ln K = uniform."""
    divergence_T: Tensor
    """Mean KL(teacher || student) between different global views, in nats: 0 = nothing left to learn, or collapse."""


@torch.no_grad()
def distillation_diagnostics(
    student: Sequence[Tensor], targets: Sequence[Tensor], *, student_temp: float
) -> DistillationDiagnostics:
    """Teacher entropy and KL(teacher || student) of the global views; arguments as ``part_distillation_terms``.

    DINO (arXiv:2104.14294, section 5.3) reads collapse from these: a divergence that goes to 0 while the entropy goes
    to 0 (one prototype) or to ln K (uniform).
    """
    entropy_T = torch.stack([-torch.xlogy(target, target).sum(dim=-1).mean() for target in targets])
    global_student = [logits_VBK[: len(target)] for logits_VBK, target in zip(student, targets, strict=True)]
    cross_entropy_T, _ = part_distillation_terms(global_student, targets, student_temp=student_temp)
    means_2T = all_reduce_mean(torch.stack([entropy_T, cross_entropy_T - entropy_T]))
    return DistillationDiagnostics(*means_2T)


@torch.no_grad()
def feature_spread(features_ND: Tensor) -> Tensor:
    """Standard deviation of L2-normalised features per dimension, averaged, times sqrt(D): a scalar of all ranks.

    1 = spread over the whole sphere, 0 = all features point the same way. Every rank gives the same N.
    SimSiam (arXiv:2011.10566, section 4.1).
    """
    features_ND = F.normalize(features_ND.float(), dim=-1)
    mean_D = all_reduce_mean(features_ND.mean(dim=0))
    variance_D = all_reduce_mean((features_ND - mean_D).square().mean(dim=0))
    return variance_D.sqrt().mean() * math.sqrt(features_ND.shape[-1])


def collapse(entropy: float, num_prototypes: int) -> str | None:
    """Name of the collapse that a mean teacher entropy (nats) shows, or None.

    ``"one prototype"`` within 1 % of 0, ``"uniform"`` within 1 % of ln K. A healthy teacher stays well between.
    """
    if num_prototypes < 2:
        raise ValueError(f"num_prototypes: expected at least 2, got {num_prototypes}")
    share = entropy / math.log(num_prototypes)
    if share < _NEAR:
        return "one prototype"
    return "uniform" if share > 1 - _NEAR else None
