"""Self-distillation between the views of an image, once per token."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from passreid_ray.dtypes import at_least_float32
from passreid_ray.losses.targets import centered_targets


def part_distillation_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    centers_TK: Tensor,
    *,
    student_temp: float,
    teacher_temp: float,
) -> Tensor:
    """Cross-entropy of student views against *other* teacher views, averaged over all pairs of all tokens; a scalar.

    ``student``: per token a ``(V_t, B, K)`` tensor of logits whose first G views are the global ones: the CLS token
    sees every view, a part token the global views and its own local views. ``teacher``: per token ``(G, B, K)``.
    PASS (arXiv:2203.03931) on top of DINO (arXiv:2104.14294, section 3.1): with 2 global views and 3
    parts of 3 local views these are 20 pairs of CLS and 8 of each part. Computed in float32 even under autocast
    (float64 is kept); no gradient reaches the teacher or the centers.
    """
    targets = centered_targets(teacher, centers_TK, teacher_temp)
    return mean_over_pairs(*part_distillation_terms(student, targets, student_temp=student_temp))


def part_distillation_terms(
    student: Sequence[Tensor], targets: Sequence[Tensor], *, student_temp: float
) -> tuple[Tensor, list[int]]:
    """Each token's mean cross-entropy, ``(T,)``, and its number of pairs of views.

    ``targets``: per token the teacher's distributions ``(G, B, K)``, from ``centered_targets`` or
    ``sinkhorn_targets``. ``mean_over_pairs`` of the result is one scalar; this is the form for logging.
    """
    pairs = list(zip(student, targets, strict=True))
    losses = [_cross_entropy(student_VBK, target_GBK, student_temp) for student_VBK, target_GBK in pairs]
    return torch.stack(losses), [_num_pairs(len(s_VBK), len(t_GBK)) for s_VBK, t_GBK in pairs]


def mean_over_pairs(loss_T: Tensor, num_pairs: Sequence[float]) -> Tensor:
    """The tokens' losses weighted by their number of pairs; a scalar."""
    # Plain numbers: a tensor of weights would have to be copied to the device, which waits for it.
    weighted = [loss * weight for loss, weight in zip(loss_T.unbind(), num_pairs, strict=True)]
    return torch.stack(weighted).sum() / sum(num_pairs)


def _cross_entropy(student_VBK: Tensor, target_GBK: Tensor, student_temp: float) -> Tensor:
    num_global = len(target_GBK)
    if student_VBK.shape[1:] != target_GBK.shape[1:] or len(student_VBK) < num_global:
        raise ValueError(
            f"student logits {tuple(student_VBK.shape)} do not fit teacher logits {tuple(target_GBK.shape)}: expected "
            "(V, B, K) and (G, B, K) with V >= G"
        )
    log_prob_VBK = F.log_softmax(at_least_float32(student_VBK) / student_temp, dim=-1)
    # Cross-entropy is linear in the target, so a view's targets are added up first: nothing of size G x V x B x K
    # appears. Products, not a matmul, which autocast and TF32 would round.
    all_targets_BK = target_GBK.sum(dim=0)
    total = log_prob_VBK.new_zeros(())
    for view, log_prob_BK in enumerate(log_prob_VBK.unbind()):
        is_local = view >= num_global
        targets_BK = all_targets_BK if is_local else torch.cat([target_GBK[:view], target_GBK[view + 1 :]]).sum(dim=0)
        total = total - (targets_BK * log_prob_BK).sum(dim=-1).mean()
    return total / _num_pairs(len(student_VBK), num_global)


def _num_pairs(num_views: int, num_global: int) -> int:
    num_pairs = (num_views - 1) * num_global
    if num_pairs == 0:
        raise ValueError("one global view and no local view make no pair to learn from")
    return num_pairs
