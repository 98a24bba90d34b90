"""The loss of PASS as its formula reads: one loop over the teacher's views, one over the student's."""

from collections.abc import Sequence

import torch
from torch import Tensor


def literal_pairs(
    student_VBK: Tensor, teacher_GBK: Tensor, center_K: Tensor, student_temp: float, teacher_temp: float
) -> list[Tensor]:
    """Batch-mean cross-entropy of every pair of different views of one token."""
    pairs = []
    for teacher_view, teacher_BK in enumerate(teacher_GBK):
        target_BK = torch.softmax((teacher_BK - center_K) / teacher_temp, dim=-1).detach()
        for student_view, student_BK in enumerate(student_VBK):
            if student_view != teacher_view:
                log_prob_BK = torch.log_softmax(student_BK / student_temp, dim=-1)
                pairs.append(torch.sum(-target_BK * log_prob_BK, dim=-1).mean())
    return pairs


def literal_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], centers_TK: Tensor, student_temp: float, teacher_temp: float
) -> Tensor:
    """Mean over the pairs of all tokens."""
    pairs = []
    for student_VBK, teacher_GBK, center_K in zip(student, teacher, centers_TK, strict=True):
        pairs += literal_pairs(student_VBK, teacher_GBK, center_K, student_temp, teacher_temp)
    return torch.stack(pairs).mean()
