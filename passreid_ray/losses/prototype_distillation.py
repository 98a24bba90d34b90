"""The distillation loss of one token from its features: logits exist for a few rows at a time, never for all views."""

# Shape letters: B batch, G global views, V views of one token, M rows (views x images), R rows of a chunk, N rows of a
# block, D bottleneck width, K prototypes, S prototypes of a block.

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from passreid_ray.dtypes import at_least_float32
from passreid_ray.losses.logit_chunks import (
    BLOCK_BYTES,
    GRADIENT_UNIT,
    in_matmul_dtype,
    row_blocks,
    targets_of_views,
)
from passreid_ray.products import product_with_transposed

CHUNK_ROWS = 128
"""Rows whose logits exist at a time. Fewer rows read and write the prototypes more often; 65,536 prototypes: 34 MB."""


def prototype_cross_entropy(
    features_VBD: Tensor,
    weight_v_KD: Tensor,
    weight_g_K1: Tensor | None,
    targets_GBK: Tensor,
    *,
    student_temp: float,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """Mean cross-entropy of a token's student views against *other* teacher views; a scalar.

    Prototype k is ``weight_g[k] * weight_v[k] / |weight_v[k]|``; without ``weight_g_K1`` it has length 1. Equals
    ``part_distillation_terms`` of the logits ``features_VBD @ prototypes_KD.T``, in value and gradients, but holds only
    ``chunk_rows`` rows of logits and no normalised prototypes. The first G of the V views are the global ones;
    ``targets_GBK`` are the teacher's distributions and get no gradient. The gradients are made together with the
    value, so that nothing is computed twice, and given away by the first backward: there is no second. Under autocast
    the matmuls are done in its dtype, all else in float32 (float64 is kept).
    PASS (arXiv:2203.03931) on top of DINO (arXiv:2104.14294, section 3.1).

    Raises:
        ValueError: the shapes do not fit, there is no pair of different views, or ``chunk_rows`` is below 1.
        RuntimeError: in a second backward.
    """
    _check(features_VBD, weight_v_KD, weight_g_K1, targets_GBK, chunk_rows)
    num_views, batch = features_VBD.shape[:2]
    targets = targets_of_views(targets_GBK.detach(), num_views)
    num_terms = (num_views - 1) * len(targets_GBK) * batch
    return cross_entropy_of_rows(
        features_VBD, weight_v_KD, weight_g_K1, targets, None, num_terms, student_temp, chunk_rows
    )


def cross_entropy_of_rows(
    features_VBD: Tensor,
    weight_v_KD: Tensor,
    weight_g_K1: Tensor | None,
    targets: Sequence[Tensor],
    weights_M: Tensor | None,
    num_terms: float | Tensor,
    student_temp: float,
    chunk_rows: int,
) -> Tensor:
    """Sum of the cross-entropies of V * B = M > 0 rows with their own targets, over ``num_terms``; a scalar.

    ``targets``: V tensors ``(B, K)``; ``weights_M``, when given, is what each row's cross-entropy is multiplied by, and
    should be about 1 for float16's sake. What ``prototype_cross_entropy`` says of values and gradients holds here.
    """
    arguments = features_VBD, weight_v_KD, weight_g_K1, targets, weights_M, num_terms, student_temp, chunk_rows
    if torch.is_grad_enabled() and any(own is not None and own.requires_grad for own in arguments[:3]):
        return cast(Tensor, _PrototypeCrossEntropy.apply(*arguments))
    with torch.no_grad():
        return _loss_and_products(*arguments, (False, False)).loss


class _PrototypeCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features_VBD: Tensor,
        weight_v_KD: Tensor,
        weight_g_K1: Tensor | None,
        targets: Sequence[Tensor],
        weights_M: Tensor | None,
        num_terms: float | Tensor,
        student_temp: float,
        chunk_rows: int,
    ) -> Tensor:
        arguments = features_VBD, weight_v_KD, weight_g_K1, targets, weights_M, num_terms, student_temp, chunk_rows
        wanted = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        found = _loss_and_products(*arguments, wanted)
        ctx.save_for_backward(weight_v_KD, weight_g_K1)
        ctx.found = found
        return found.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.found is None:
            raise RuntimeError("prototype_cross_entropy: a second backward; the first was given its gradients")
        # They become the gradients in place, and nothing else may hold them: autograd would copy them.
        found, ctx.found = cast(_Products, ctx.found), None
        saved: tuple[Tensor, Tensor | None] = ctx.saved_tensors
        unit = grads[0] * found.unit
        d_features_VBD = None
        if found.features_VBD is not None:
            d_features_VBD = found.features_VBD.mul_(unit).to(found.features_dtype)
        if found.weights_KD is None:
            return d_features_VBD, *[None] * 7
        d_weight_v_KD, d_weight_g_K1 = _weight_gradients(found.weights_KD, *saved, found.length_K1, unit)
        return d_features_VBD, d_weight_v_KD, d_weight_g_K1, *[None] * 5


class _Products(NamedTuple):
    """What the forward leaves for the backward."""

    loss: Tensor
    features_VBD: Tensor | None
    """Gradient of the features, in ``unit``; None where it is not wanted."""
    weights_KD: Tensor | None
    """Gradient of the prototypes, before their normalisation, in ``unit``; None where it is not wanted."""
    length_K1: Tensor
    """``|weight_v|``."""
    unit: float | Tensor
    features_dtype: torch.dtype


def _loss_and_products(
    features_VBD: Tensor,
    weight_v_KD: Tensor,
    weight_g_K1: Tensor | None,
    targets: Sequence[Tensor],
    weights_M: Tensor | None,
    num_terms: float | Tensor,
    student_temp: float,
    chunk_rows: int,
    wanted: Sequence[bool],
) -> _Products:
    rows_MD = in_matmul_dtype(features_VBD.flatten(0, 1))
    # One chunk uses a block twice: casting it twice while it is in cache costs less than a copy of all prototypes.
    is_cast_once = len(rows_MD) > chunk_rows or rows_MD.device.type != "cpu"
    weights_KD = in_matmul_dtype(weight_v_KD) if is_cast_once else weight_v_KD
    with torch.autocast(rows_MD.device.type, enabled=False):
        length_K1 = torch.linalg.vector_norm(weight_v_KD, dim=1, keepdim=True)
        scale_K = (1 / length_K1 if weight_g_K1 is None else weight_g_K1 / length_K1)[:, 0]
        sharp_K = scale_K / student_temp
        d_rows_MD = torch.zeros_like(at_least_float32(rows_MD)) if wanted[0] else None
        d_weights_KD = torch.empty_like(weight_v_KD) if wanted[1] else None
        buffer_RK = weight_v_KD.new_empty(min(chunk_rows, len(rows_MD)), len(weights_KD))
        loss = buffer_RK.new_zeros(())
        for first, rows_RD in zip(range(0, len(rows_MD), chunk_rows), rows_MD.split(chunk_rows), strict=True):
            logits_RK, row = buffer_RK[: len(rows_RD)], first
            for own in _prototype_blocks(weight_v_KD):
                weights_SD = weights_KD[own].to(rows_RD.dtype)
                torch.mul(product_with_transposed(rows_RD, weights_SD), sharp_K[own], out=logits_RK[:, own])
            for logits_NK, targets_NK in row_blocks(logits_RK, targets, first):
                if weights_M is not None:
                    targets_NK, row = targets_NK * weights_M[row : row + len(targets_NK), None], row + len(targets_NK)
                loss += _block_loss(logits_NK, targets_NK, become_gradients=any(wanted))
            for own in _prototype_blocks(weight_v_KD):
                d_logits_RS = logits_RK[:, own]
                if d_weights_KD is not None:
                    # Not a product with out=: into fresh memory it takes a tenth longer than adding to zeros in cache.
                    d_weights_SD = d_weights_KD[own].zero_() if first == 0 else d_weights_KD[own]
                    _add_product(d_weights_SD, d_logits_RS.T.to(rows_RD.dtype), rows_RD)
                if d_rows_MD is not None:
                    scaled_RS = (d_logits_RS * scale_K[own]).to(rows_RD.dtype)
                    weights_SD = weights_KD[own].to(rows_RD.dtype)
                    d_rows_MD[first : first + chunk_rows] += product_with_transposed(scaled_RS, weights_SD.T)
    return _Products(
        loss / num_terms,
        None if d_rows_MD is None else d_rows_MD.view_as(features_VBD),
        d_weights_KD,
        length_K1,
        unit=1 / (GRADIENT_UNIT * num_terms * student_temp),
        features_dtype=features_VBD.dtype,
    )


def _weight_gradients(
    products_KD: Tensor, weight_v_KD: Tensor, weight_g_K1: Tensor | None, length_K1: Tensor, unit: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``weight_v`` and ``weight_g`` from those of the prototypes, which become the first in place."""
    scale_K1 = unit / length_K1 if weight_g_K1 is None else unit * weight_g_K1 / length_K1
    along_K1 = torch.empty_like(length_K1)
    for own in _prototype_blocks(weight_v_KD):
        products_SD, weight_v_SD, length_S1 = products_KD[own], weight_v_KD[own], length_K1[own]
        along_S1 = torch.linalg.vecdot(products_SD, weight_v_SD)[:, None].div_(length_S1)
        # Length has no say, so neither has the part of the gradient along the vector.
        products_SD.addcmul_(weight_v_SD, along_S1 / length_S1, value=-1).mul_(scale_K1[own])
        along_K1[own] = along_S1
    return products_KD, None if weight_g_K1 is None else along_K1.mul_(unit)


def _prototype_blocks(weight_v_KD: Tensor) -> Iterator[slice]:
    """Consecutive prototypes that stay in a CPU's cache; all of them at once elsewhere."""
    size = len(weight_v_KD)
    if weight_v_KD.device.type == "cpu":
        size = max(1, 2 * BLOCK_BYTES // (weight_v_KD.shape[1] * weight_v_KD.element_size()))
    for start in range(0, len(weight_v_KD), size):
        yield slice(start, start + size)


def _add_product(sum_NM: Tensor, left_NR: Tensor, right_RM: Tensor) -> None:
    if left_NR.dtype == sum_NM.dtype:
        torch.addmm(sum_NM, left_NR, right_RM, out=sum_NM)
    else:
        sum_NM.add_(left_NR @ right_RM)


def _block_loss(logits_NK: Tensor, targets_NK: Tensor, *, become_gradients: bool) -> Tensor:
    """Sum of the rows' cross-entropies; the logits become its gradient for them, in ``GRADIENT_UNIT``.

    A row's cross-entropy is (sum of targets) * (log-sum-exp of logits) - (sum of targets * logits).
    """
    product = (targets_NK * logits_NK).sum()  # not a matmul, which TF32 would round
    highest_N1 = logits_NK.amax(dim=-1, keepdim=True)
    # The highest logit's probability is 1 / (sum of shifted exp). log_softmax takes five times as long as softmax.
    torch.softmax(logits_NK, dim=-1, out=logits_NK)
    log_sum_N1 = highest_N1 - logits_NK.amax(dim=-1, keepdim=True).log()
    mass_N1 = targets_NK.sum(dim=-1, keepdim=True)
    if become_gradients:
        logits_NK.mul_(mass_N1 * GRADIENT_UNIT).sub_(targets_NK, alpha=GRADIENT_UNIT)
    return (mass_N1 * log_sum_N1).sum() - product


def _check(
    features_VBD: Tensor, weight_v_KD: Tensor, weight_g_K1: Tensor | None, targets_GBK: Tensor, chunk_rows: int
) -> None:
    logits_shape = (*features_VBD.shape[:-1], len(weight_v_KD))
    if (
        features_VBD.ndim != 3
        or features_VBD.shape[-1:] != weight_v_KD.shape[1:]
        or logits_shape[1:] != targets_GBK.shape[1:]
        or len(features_VBD) < len(targets_GBK)
        or (weight_g_K1 is not None and weight_g_K1.shape != (len(weight_v_KD), 1))
    ):
        lengths = "none" if weight_g_K1 is None else tuple(weight_g_K1.shape)
        raise ValueError(
            f"features {tuple(features_VBD.shape)}, prototypes {tuple(weight_v_KD.shape)}, their lengths {lengths} and "
            f"targets {tuple(targets_GBK.shape)} do not fit: expected (V, B, D), (K, D), (K, 1) or none, and (G, B, K) "
            "with V >= G"
        )
    if len(features_VBD) < 2 or len(targets_GBK) < 1:
        raise ValueError("one global view and no local view make no pair to learn from")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows: expected at least 1, got {chunk_rows}")
