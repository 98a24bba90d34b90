"""The distillation loss of one token from its features: logits exist for a few rows at a time, never for all views."""

# Shape letters: B batch, G global views, V views of one token, R rows (views x images) of a chunk, N rows of a block,
# D bottleneck width, K prototypes.

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from passreid_ray.dtypes import at_least_float32

CHUNK_ROWS = 128
"""Rows whose logits exist at a time. Fewer rows read and write the prototypes more often; 65,536 prototypes: 34 MB."""

_BLOCK_BYTES = 2**21
"""Logits that the passes between the matmuls work on at a time on a CPU: they stay in its cache."""

_GRADIENT_UNIT = 64.0
"""What gradients of logits are multiplied by on their way into a matmul: float16 would lose those of 1 / 65,536."""


def prototype_cross_entropy(
    features_VBD: Tensor,
    prototypes_KD: Tensor,
    targets_GBK: Tensor,
    *,
    student_temp: float,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """Mean cross-entropy of a token's student views against *other* teacher views; a scalar.

    Equals ``part_distillation_terms`` of the logits ``features_VBD @ prototypes_KD.T``, in value and gradients, but
    holds only ``chunk_rows`` rows of logits. The first G of the V views are the global ones; ``targets_GBK`` are the
    teacher's distributions and get no gradient. The gradients are made together with the value, so that nothing is
    computed twice; they are as large as the features and the prototypes. Under autocast the matmuls are done in its
    dtype, all else in float32 (float64 is kept).
    PASS (arXiv:2203.03931) on top of DINO (arXiv:2104.14294, section 3.1).

    Raises:
        ValueError: the shapes do not fit, there is no pair of different views, or ``chunk_rows`` is below 1.
    """
    _check(features_VBD, prototypes_KD, targets_GBK, chunk_rows)
    arguments = features_VBD, prototypes_KD, targets_GBK.detach(), student_temp, chunk_rows
    if torch.is_grad_enabled() and (features_VBD.requires_grad or prototypes_KD.requires_grad):
        return cast(Tensor, _PrototypeCrossEntropy.apply(*arguments))
    with torch.no_grad():
        return _loss_and_gradients(*arguments, (False, False))[0]


class _PrototypeCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features_VBD: Tensor,
        prototypes_KD: Tensor,
        targets_GBK: Tensor,
        student_temp: float,
        chunk_rows: int,
    ) -> Tensor:
        arguments = features_VBD, prototypes_KD, targets_GBK, student_temp, chunk_rows
        loss, *gradients = _loss_and_gradients(*arguments, ctx.needs_input_grad[:2])
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Not in place: the graph may be kept for a second backward.
        scaled = [None if own is None else own * grads[0].to(own.dtype) for own in ctx.saved_tensors]
        return (*scaled, None, None, None)


def _loss_and_gradients(
    features_VBD: Tensor,
    prototypes_KD: Tensor,
    targets_GBK: Tensor,
    student_temp: float,
    chunk_rows: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, and its gradients for the features and for the prototypes where ``wanted``, else None."""
    num_views, batch = features_VBD.shape[:2]
    targets = _targets_of_views(targets_GBK, num_views)
    num_terms = (num_views - 1) * len(targets_GBK) * batch
    scale = 1 / (_GRADIENT_UNIT * num_terms * student_temp)
    rows_MD, weights_KD = _matmul_operands(features_VBD.flatten(0, 1), prototypes_KD)
    d_rows_MD = torch.empty_like(at_least_float32(rows_MD)) if wanted[0] else None
    d_weights_KD = torch.zeros_like(at_least_float32(weights_KD)) if wanted[1] else None
    dtype = at_least_float32(rows_MD[:0]).dtype
    buffer_RK = rows_MD.new_empty(min(chunk_rows, len(rows_MD)), len(weights_KD), dtype=dtype)
    loss = buffer_RK.new_zeros(())
    with torch.autocast(rows_MD.device.type, enabled=False):
        for first, rows_RD in zip(range(0, len(rows_MD), chunk_rows), rows_MD.split(chunk_rows), strict=True):
            logits_RK = _scaled_logits(rows_RD, weights_KD, student_temp, buffer_RK[: len(rows_RD)])
            for logits_NK, targets_NK in _blocks(logits_RK, targets, first):
                loss += _block_loss(logits_NK, targets_NK, become_gradients=any(wanted))
            d_logits_RK = logits_RK.to(rows_RD.dtype)
            if d_rows_MD is not None:
                d_rows_MD[first : first + chunk_rows] = d_logits_RK @ weights_KD
            if d_weights_KD is not None:
                _add_product(d_weights_KD, d_logits_RK.T, rows_RD, scale)
    d_features_VBD = None if d_rows_MD is None else d_rows_MD.mul_(scale).view_as(features_VBD).to(features_VBD.dtype)
    d_prototypes_KD = None if d_weights_KD is None else d_weights_KD.to(prototypes_KD.dtype)
    return loss / num_terms, d_features_VBD, d_prototypes_KD


def _targets_of_views(targets_GBK: Tensor, num_views: int) -> list[Tensor]:
    """Per student view the sum of the other views' targets, ``(B, K)``: cross-entropy is linear in the target."""
    views = list(targets_GBK)
    if len(views) == 1:  # the only global view has no other to learn from
        return [torch.zeros_like(views[0])] + views * (num_views - 1)
    own = [_sum([*views[:view], *views[view + 1 :]]) for view in range(len(views))]
    return own + [_sum(views)] * (num_views - len(views))


def _sum(targets: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, targets)  # one tensor is handed on, not copied


def _matmul_operands(rows_MD: Tensor, weights_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's dtype where it is on, as for ``F.linear``: float64 is kept."""
    device_type = rows_MD.device.type
    if torch.is_autocast_enabled(device_type) and rows_MD.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        return rows_MD.to(dtype), weights_KD.to(dtype)
    return rows_MD, weights_KD


def _scaled_logits(rows_RD: Tensor, weights_KD: Tensor, student_temp: float, out_RK: Tensor) -> Tensor:
    """Logits over the temperature, in ``out_RK``."""
    if rows_RD.dtype == out_RK.dtype:
        return out_RK.addmm_(rows_RD, weights_KD.T, beta=0, alpha=1 / student_temp)
    return out_RK.copy_(rows_RD @ weights_KD.T).div_(student_temp)


def _add_product(sum_KD: Tensor, left_KR: Tensor, right_RD: Tensor, scale: float) -> None:
    if right_RD.dtype == sum_KD.dtype:
        sum_KD.addmm_(left_KR, right_RD, alpha=scale)
    else:
        sum_KD.add_(left_KR @ right_RD, alpha=scale)


def _blocks(logits_RK: Tensor, targets: Sequence[Tensor], first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Consecutive rows of one view each, and their targets; ``first`` is the number of the chunk's first row."""
    batch = len(targets[0])
    row_bytes = logits_RK.shape[1] * logits_RK.element_size()
    at_most = max(1, _BLOCK_BYTES // row_bytes) if logits_RK.device.type == "cpu" else batch
    start = 0
    while start < len(logits_RK):
        view, image = divmod(first + start, batch)
        stop = min(start + at_most, start + batch - image, len(logits_RK))
        yield logits_RK[start:stop], targets[view][image : image + stop - start]
        start = stop


def _block_loss(logits_NK: Tensor, targets_NK: Tensor, *, become_gradients: bool) -> Tensor:
    """Sum of the rows' cross-entropies; the logits become its gradient for them, in ``_GRADIENT_UNIT``."""
    log_prob_NK = F.log_softmax(logits_NK, dim=-1)
    if become_gradients:
        torch.exp(log_prob_NK, out=logits_NK)
        logits_NK.mul_(targets_NK.sum(dim=-1, keepdim=True) * _GRADIENT_UNIT).sub_(targets_NK, alpha=_GRADIENT_UNIT)
    # A product, not a matmul, which TF32 would round.
    return -log_prob_NK.mul_(targets_NK).sum()


def _check(features_VBD: Tensor, prototypes_KD: Tensor, targets_GBK: Tensor, chunk_rows: int) -> None:
    logits_shape = (*features_VBD.shape[:-1], len(prototypes_KD))
    if (
        features_VBD.ndim != 3
        or features_VBD.shape[-1:] != prototypes_KD.shape[1:]
        or logits_shape[1:] != targets_GBK.shape[1:]
        or len(features_VBD) < len(targets_GBK)
    ):
        raise ValueError(
            f"features {tuple(features_VBD.shape)}, prototypes {tuple(prototypes_KD.shape)} and targets "
            f"{tuple(targets_GBK.shape)} do not fit: expected (V, B, D), (K, D) and (G, B, K) with V >= G"
        )
    if len(features_VBD) < 2 or len(targets_GBK) < 1:
        raise ValueError("one global view and no local view make no pair to learn from")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows: expected at least 1, got {chunk_rows}")
