"""The masked-patch loss of iBOT with the weights of DINOv2, patch by patch, with whole softmaxes."""

from collections.abc import Sequence

import torch
from torch import Tensor


def literal_masked_patch_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], center_K: Tensor, student_temp: float, teacher_temp: float
) -> Tensor:
    """Mean over masked views of the mean over their masked patches.

    ``student`` and ``teacher``: per masked view the logits of its masked patches, ``(patches of this view, K)``.
    """
    of_views = []
    for student_view, teacher_view in zip(student, teacher, strict=True):
        of_patches = []
        for student_K, teacher_K in zip(student_view, teacher_view, strict=True):
            exp_K = torch.exp((teacher_K - center_K) / teacher_temp)
            target_K = (exp_K / exp_K.sum()).detach()
            scores_K = torch.exp(student_K / student_temp)
            of_patches.append(-(target_K * torch.log(scores_K / scores_K.sum())).sum())
        of_views.append(torch.stack(of_patches).mean())
    return torch.stack(of_views).mean()
