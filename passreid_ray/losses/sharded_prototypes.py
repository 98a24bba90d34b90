"""The distillation of one token whose prototypes are shared out over the ranks: each holds K/W of them.

Every rank takes the features of all ranks' images through its own prototypes, so a softmax over all K needs three
numbers of a row from every rank. That, and each feature there and its gradient back, is all that is sent: W * V * B
rows of D numbers, where data parallelism sums K x D gradients. With 65,536 prototypes and 8 ranks of 8 images and 11
views these are 704 rows. A rank also holds, normalises and updates K/W prototypes, not K; the products are as many.

Every rank must call these functions in the same order with as many views and images. The order of images is that of
the ranks: rank r's are r * B to (r + 1) * B. Without a process group they are the unsharded functions.
"""

# Shape letters: W ranks, K prototypes of all ranks, S = K/W of this rank, D bottleneck width, G global views, V views
# of one token, B images of this rank, I = W * B of all ranks, R rows (views x images) of a chunk, N rows of a block.

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from passreid_ray.distributed import all_gather, all_reduce_mean, all_reduce_sum, all_to_all, is_active, world_size
from passreid_ray.dtypes import at_least_float32
from passreid_ray.errors import UserError
from passreid_ray.losses.logit_chunks import GRADIENT_UNIT, in_matmul_dtype, row_blocks, targets_of_views
from passreid_ray.losses.targets import SINKHORN_ITERATIONS
from passreid_ray.products import product_with_transposed

CHUNK_ROWS = 256
"""Rows of all ranks whose logits exist at a time. 65,536 prototypes on 2 ranks: 34 MB."""


def shard_rows(num_prototypes: int, rank: int, world_size: int) -> slice:
    """The rows of the ``(K, D)`` prototypes that ``rank`` holds: equal shares, in rank order.

    Raises:
        UserError: the prototypes cannot be shared out equally.
    """
    if num_prototypes % world_size:
        raise UserError(
            f"num_prototypes: {num_prototypes} cannot be shared out equally over {world_size} workers; choose a "
            f"multiple of {world_size}, or another number of workers"
        )
    share = num_prototypes // world_size
    return slice(rank * share, (rank + 1) * share)


@torch.no_grad()
def sharded_targets(
    teacher_features_GBD: Tensor, prototypes_SD: Tensor, center_S: Tensor, teacher_temp: float
) -> Tensor:
    """This rank's columns ``(G, I, S)`` of ``centered_targets`` for the images of all ranks.

    The softmax is over all K. Sent: the teacher's features, and one number of each row. Float32 (float64 is kept),
    without gradient. DINO (arXiv:2104.14294, section 3.1).
    """
    _check_center(center_S, prototypes_SD)
    logits_GIS = _teacher_logits(teacher_features_GBD, prototypes_SD)
    return _softmax_over_ranks(logits_GIS.sub_(center_S).div_(teacher_temp))


@torch.no_grad()
def sharded_sinkhorn(teacher_features_GBD: Tensor, prototypes_SD: Tensor, teacher_temp: float) -> Tensor:
    """This rank's columns ``(G, I, S)`` of ``sinkhorn_targets`` for the images of all ranks.

    How much a prototype is used is known to the rank that holds it; the mass of an image is summed over ranks, one
    number of each row in each round. SwAV (arXiv:2006.09882, section 3.1).
    """
    mass_GIS = _softmax_over_ranks(_teacher_logits(teacher_features_GBD, prototypes_SD).div_(teacher_temp))
    num_rows, num_prototypes = mass_GIS.shape[0] * mass_GIS.shape[1], mass_GIS.shape[2] * world_size()
    for _ in range(SINKHORN_ITERATIONS):
        used_S = mass_GIS.sum(dim=(0, 1))
        mass_GIS *= num_rows / num_prototypes / used_S.clamp(min=torch.finfo(used_S.dtype).tiny)
        mass_GIS /= all_reduce_sum(mass_GIS.sum(dim=-1, keepdim=True))
    return mass_GIS


@torch.no_grad()
def sharded_centers(center_S: Tensor, teacher_features_GBD: Tensor, prototypes_SD: Tensor, momentum: float) -> Tensor:
    """This rank's new ``(S,)`` columns of ``updated_centers``, over the images of all ranks.

    The mean of the logits is the logit of the mean feature, so that D numbers are sent and no logits are made. DINO
    (arXiv:2104.14294, eq. 4).
    """
    _check_center(center_S, prototypes_SD)
    with torch.autocast(center_S.device.type, enabled=False):
        mean_D = all_reduce_mean(teacher_features_GBD.mean(dim=(0, 1), dtype=center_S.dtype))
        return center_S * momentum + prototypes_SD.to(center_S.dtype) @ mean_D * (1 - momentum)


@torch.no_grad()
def sharded_logits(features_GBD: Tensor, prototypes_SD: Tensor) -> Tensor:
    """This rank's columns ``(G, I, S)`` of the logits for the images of all ranks."""
    return _teacher_logits(features_GBD, prototypes_SD)


def of_own_images(values_GIS: Tensor) -> Tensor:
    """All K columns ``(G, B, K)`` of this rank's images, of what each rank has its columns of; without gradient.

    As large as if prototypes were not sharded: for a look now and then, not for every step.
    """
    values_WGBS = values_GIS.unflatten(1, (world_size(), -1)).movedim(1, 0)
    return all_to_all(values_WGBS).movedim(0, 2).flatten(2)


def sharded_cross_entropy(
    features_VBD: Tensor,
    prototypes_SD: Tensor,
    targets_GIS: Tensor,
    *,
    student_temp: float,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """Mean cross-entropy of all ranks' student views against *other* teacher views; the same scalar on every rank.

    Equals ``part_distillation_terms`` of all ranks' images and all prototypes. The first G of the V views are the
    global ones; ``targets_GIS``, from ``sharded_targets`` or ``sharded_sinkhorn``, get no gradient. Logits exist for
    ``chunk_rows`` rows of all ranks and this rank's S prototypes at a time: W times what one process takes need as
    much memory, and as many chunks.

    The two gradients are to be treated differently:

    - Of the features: W times that of the loss for this rank's rows, so that the mean over ranks of the backbone's
      gradients, which DDP takes, is that of one process.
    - Of the prototypes: that of the loss, from all ranks' images. It must not be averaged: keep the prototypes
      outside the module that DDP wraps, or among those that DDP ignores. A norm of it lacks the other ranks' squares,
      and an inf in it is not theirs.

    Sent: each feature to every rank and the sum of its gradients back; three numbers of each row, in one collective
    per chunk. All of it in the forward pass, where the gradients are made with the value: backward sends nothing, and
    gives them away, so that there is no second. Under autocast the matmuls are done in its dtype, all else in float32
    (float64 is kept). Every rank must want the gradient of the features, or none.
    PASS (arXiv:2203.03931) on top of DINO (arXiv:2104.14294, section 3.1).

    Raises:
        ValueError: the shapes do not fit, there is no pair of different views, or ``chunk_rows`` is below 1.
        RuntimeError: in a second backward.
    """
    _check(features_VBD, prototypes_SD, targets_GIS, chunk_rows)
    arguments = features_VBD, prototypes_SD, targets_GIS.detach(), student_temp, chunk_rows
    if torch.is_grad_enabled() and (features_VBD.requires_grad or prototypes_SD.requires_grad):
        return cast(Tensor, _ShardedCrossEntropy.apply(*arguments))
    with torch.no_grad():
        return _loss_and_gradients(*arguments, (False, False))[0]


class _ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features_VBD: Tensor,
        prototypes_SD: Tensor,
        targets_GIS: Tensor,
        student_temp: float,
        chunk_rows: int,
    ) -> Tensor:
        arguments = features_VBD, prototypes_SD, targets_GIS, student_temp, chunk_rows
        loss, *gradients = _loss_and_gradients(*arguments, ctx.needs_input_grad[:2])
        ctx.gradients = gradients
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.gradients is None:
            raise RuntimeError("sharded_cross_entropy: a second backward; the first was given its gradients")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [None if own is None else own.mul_(grads[0]) for own in gradients]
        return (*scaled, None, None, None)


def _loss_and_gradients(
    features_VBD: Tensor,
    prototypes_SD: Tensor,
    targets_GIS: Tensor,
    student_temp: float,
    chunk_rows: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, and its gradients for this rank's features (times W) and prototypes where ``wanted``, else None."""
    num_views, num_global, num_images = len(features_VBD), *targets_GIS.shape[:2]
    targets = targets_of_views(targets_GIS, num_views)
    num_terms = (num_views - 1) * num_global * num_images
    scale = 1 / (GRADIENT_UNIT * num_terms * student_temp)
    own_VBD, weights_SD = in_matmul_dtype(features_VBD), in_matmul_dtype(prototypes_SD)
    rows_MD = _of_all_ranks(own_VBD).flatten(0, 1)
    d_rows_MD = torch.empty_like(at_least_float32(rows_MD)) if wanted[0] else None
    d_weights_SD = torch.empty_like(at_least_float32(weights_SD)) if wanted[1] else None
    dtype = at_least_float32(rows_MD[:0]).dtype
    buffer_RS = rows_MD.new_empty(min(chunk_rows, len(rows_MD)), len(weights_SD), dtype=dtype)
    loss = buffer_RS.new_zeros(())
    with torch.autocast(rows_MD.device.type, enabled=False):
        for first, rows_RD in zip(range(0, len(rows_MD), chunk_rows), rows_MD.split(chunk_rows), strict=True):
            logits_RS = _scaled_logits(rows_RD, weights_SD, student_temp, buffer_RS[: len(rows_RD)])
            loss += _chunk_loss(list(row_blocks(logits_RS, targets, first)), become_gradients=any(wanted))
            d_logits_RS = logits_RS.to(rows_RD.dtype)
            if d_rows_MD is not None:
                d_rows_MD[first : first + chunk_rows] = product_with_transposed(d_logits_RS, weights_SD.T)
            if d_weights_SD is not None:
                _add_product(d_weights_SD, d_logits_RS.T, rows_RD, scale, is_first=first == 0)
    d_features_VBD = None
    if d_rows_MD is not None:
        d_own_VBD = _sum_of_own_images(d_rows_MD.mul_(scale * world_size()).unflatten(0, (num_views, num_images)))
        d_features_VBD = d_own_VBD.to(features_VBD.dtype)
    d_prototypes_SD = None if d_weights_SD is None else d_weights_SD.to(prototypes_SD.dtype)
    return loss / num_terms, d_features_VBD, d_prototypes_SD


def _chunk_loss(blocks: Sequence[tuple[Tensor, Tensor]], *, become_gradients: bool) -> Tensor:
    """Sum of a chunk's cross-entropies; the logits become its gradient for them, in ``GRADIENT_UNIT``.

    A row's cross-entropy is (sum of targets) * (log-sum-exp of logits) - (sum of targets * logits): three sums over
    columns, of which this rank has its share.
    """
    sums, shifts = zip(*(_row_sums(logits_NS, targets_NS) for logits_NS, targets_NS in blocks), strict=True)
    sums_W3R = all_gather(torch.cat(sums, dim=1)[None])
    log_sum_R, mass_R, product_R = sums_W3R[:, 0].logsumexp(dim=0), sums_W3R[:, 1].sum(dim=0), sums_W3R[:, 2].sum(dim=0)
    if become_gradients:
        factor_R = (torch.cat(shifts) - log_sum_R).exp() * mass_R * GRADIENT_UNIT
        factors = factor_R.split([len(shift_N) for shift_N in shifts])
        for (exp_NS, targets_NS), factor_N in zip(blocks, factors, strict=True):
            exp_NS.mul_(factor_N[:, None]).sub_(targets_NS, alpha=GRADIENT_UNIT)
    return (mass_R * log_sum_R - product_R).sum()


def _row_sums(logits_NS: Tensor, targets_NS: Tensor) -> tuple[Tensor, Tensor]:
    """``(3, N)`` log-sum-exp, sum of targets, sum of targets * logits; and the ``(N,)`` shift of ``_shifted_exp``."""
    product_N = (targets_NS * logits_NS).sum(dim=-1)  # not a matmul, which TF32 would round
    shift_N1, log_sum_N1 = _shifted_exp(logits_NS)
    return torch.stack([log_sum_N1[:, 0], targets_NS.sum(dim=-1), product_N]), shift_N1[:, 0]


def _softmax_over_ranks(logits_GIS: Tensor) -> Tensor:
    """Softmax over all ranks' columns, in place."""
    shift_GI1, log_sum_GI1 = _shifted_exp(logits_GIS)
    return logits_GIS.mul_((shift_GI1 - all_gather(log_sum_GI1[None]).logsumexp(dim=0)).exp())


def _shifted_exp(logits_NS: Tensor) -> tuple[Tensor, Tensor]:
    """The logits become exp(logits - shift); the shift, a row's maximum, and this rank's log-sum-exp, ``(N, 1)``."""
    shift_N1 = logits_NS.amax(dim=-1, keepdim=True)
    logits_NS.sub_(shift_N1).exp_()
    return shift_N1, logits_NS.sum(dim=-1, keepdim=True).log_().add_(shift_N1)


def _teacher_logits(teacher_features_GBD: Tensor, prototypes_SD: Tensor) -> Tensor:
    """Logits ``(G, I, S)`` of all ranks' images, that may be written to."""
    own_GBD, weights_SD = in_matmul_dtype(teacher_features_GBD), in_matmul_dtype(prototypes_SD)
    return at_least_float32(product_with_transposed(_of_all_ranks(own_GBD), weights_SD))


def _of_all_ranks(own_VBD: Tensor) -> Tensor:
    """``(V, I, D)`` of all ranks' images, in rank order."""
    return all_gather(own_VBD.contiguous()[None]).transpose(0, 1).flatten(1, 2)


def _sum_of_own_images(all_VID: Tensor) -> Tensor:
    """``(V, B, D)`` of this rank's images: the sum of what all ranks have for them."""
    if not is_active():
        return all_VID
    parts_WVBD = all_VID.unflatten(1, (world_size(), -1)).transpose(0, 1).contiguous()
    own_VBD = torch.empty_like(parts_WVBD[0])
    dist.reduce_scatter_tensor(own_VBD, parts_WVBD.flatten(0, 1))
    return own_VBD


def _scaled_logits(rows_RD: Tensor, weights_SD: Tensor, student_temp: float, out_RS: Tensor) -> Tensor:
    """Logits over the temperature, in ``out_RS``."""
    return out_RS.copy_(product_with_transposed(rows_RD, weights_SD)).div_(student_temp)


def _add_product(sum_SD: Tensor, left_SR: Tensor, right_RD: Tensor, scale: float, *, is_first: bool) -> None:
    """Add a scaled product to ``sum_SD``, or put it there when it ``is_first``."""
    if right_RD.dtype == sum_SD.dtype:
        sum_SD.addmm_(left_SR, right_RD, beta=0 if is_first else 1, alpha=scale)
    elif is_first:
        sum_SD.copy_(left_SR @ right_RD).mul_(scale)
    else:
        sum_SD.add_(left_SR @ right_RD, alpha=scale)


def _check_center(center_S: Tensor, prototypes_SD: Tensor) -> None:
    if prototypes_SD.shape[:1] != center_S.shape:
        raise ValueError(f"center {tuple(center_S.shape)} does not fit prototypes {tuple(prototypes_SD.shape)}")


def _check(features_VBD: Tensor, prototypes_SD: Tensor, targets_GIS: Tensor, chunk_rows: int) -> None:
    if (
        features_VBD.ndim != 3
        or targets_GIS.ndim != 3
        or features_VBD.shape[-1:] != prototypes_SD.shape[1:]
        or (features_VBD.shape[1] * world_size(), len(prototypes_SD)) != targets_GIS.shape[1:]
        or len(features_VBD) < len(targets_GIS)
    ):
        raise ValueError(
            f"features {tuple(features_VBD.shape)}, prototypes {tuple(prototypes_SD.shape)} and targets "
            f"{tuple(targets_GIS.shape)} on {world_size()} ranks do not fit: expected (V, B, D), (S, D) and "
            "(G, ranks * B, S) with V >= G"
        )
    if len(features_VBD) < 2 or len(targets_GIS) < 1:
        raise ValueError("one global view and no local view make no pair to learn from")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows: expected at least 1, got {chunk_rows}")
