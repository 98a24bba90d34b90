"""The published loss of PASS with its heads: one pass of a head per token and group of views, one softmax per pair."""

# Shape letters: G global views, L local views per part, V views, B batch, D width, K prototypes, N rows.

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LogitsOf = Callable[[int, Tensor], Tensor]
"""Logits ``(N, K)`` of rows ``(N, D)`` under the head of a token, which does all its work anew at every call."""


def literal_heads(head: LogitsOf, global_tokens: Sequence[Tensor], local_tokens: Sequence[Tensor]) -> list[Tensor]:
    """Per token the logits of the views that show it, ``(V_t * B, K)``, with one call of the head per group of views.

    ``global_tokens``: per token ``(G * B, D)``. ``local_tokens``: per part ``(2, L * B, D)``, CLS and the part's own.
    """
    cls = [head(0, global_tokens[0])]
    for own_2ND in local_tokens:
        cls.append(head(0, own_2ND[0]))
    logits = [torch.cat(cls)]
    for part, own_2ND in enumerate(local_tokens):
        logits.append(torch.cat([head(1 + part, global_tokens[1 + part]), head(1 + part, own_2ND[1])]))
    return logits


def literal_pass_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    centers_TK: Tensor,
    batch: int,
    student_temp: float,
    teacher_temp: float,
) -> Tensor:
    """Mean over the pairs of all tokens of logits ``(V_t * B, K)`` and ``(G * B, K)``."""
    total, num_pairs = torch.zeros(()), 0
    for student_NK, teacher_NK, center_K in zip(student, teacher, centers_TK, strict=True):
        scaled = (student_NK / student_temp).split(batch)
        targets = F.softmax((teacher_NK - center_K) / teacher_temp, dim=-1).detach().split(batch)
        for teacher_view, target_BK in enumerate(targets):
            for student_view, scaled_BK in enumerate(scaled):
                if student_view == teacher_view:
                    continue
                loss_B = torch.sum(-target_BK * F.log_softmax(scaled_BK, dim=-1), dim=-1)
                total = total + loss_B.mean()
                num_pairs += 1
    return total / num_pairs
