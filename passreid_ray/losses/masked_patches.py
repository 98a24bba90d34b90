"""Predicting what a hidden patch shows: distillation of patch tokens that the student cannot see."""

# Shape letters: M masked patches of this rank, D bottleneck width, K prototypes.

import torch
from torch import Tensor

from passreid_ray.distributed import all_reduce_sum
from passreid_ray.dtypes import at_least_float32
from passreid_ray.losses.prototype_distillation import CHUNK_ROWS, cross_entropy_of_rows


def masked_patch_loss(
    features_MD: Tensor,
    weight_v_KD: Tensor,
    weight_g_K1: Tensor | None,
    targets_MK: Tensor,
    weights_M: Tensor,
    *,
    student_temp: float,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """Weighted sum of the cross-entropies of masked patches with the teacher's targets for them; a scalar.

    ``features_MD`` are the student's bottlenecks of patches that it did not see, ``targets_MK`` the teacher's
    distributions for the same patches, which it saw. With 1 / (masked patches of the view) / (masked views) as
    ``weights_M`` the loss is the mean over masked views of the mean over their patches. Values and gradients are made
    as in ``prototype_cross_entropy``: logits exist for ``chunk_rows`` rows at a time, and there is one backward.
    Without any row the loss is 0, and so are the gradients: no rank waits for another's in DDP.
    iBOT (arXiv:2111.07832, eq. 2), weighted as in DINOv2 (arXiv:2304.07193).

    Raises:
        ValueError: the shapes do not fit, or ``chunk_rows`` is below 1.
        RuntimeError: in a second backward.
    """
    _check(features_MD, weight_v_KD, weight_g_K1, targets_MK, weights_M, chunk_rows)
    if len(features_MD) == 0:
        own = [features_MD, weight_v_KD] if weight_g_K1 is None else [features_MD, weight_v_KD, weight_g_K1]
        return torch.stack([at_least_float32(tensor[:0]).sum() for tensor in own]).sum()
    # Weights near 1 inside: the gradients of logits go through a matmul in half precision.
    weights_M = weights_M.to(targets_MK.dtype)
    mean = weights_M.mean()
    return cross_entropy_of_rows(
        features_MD[None],
        weight_v_KD,
        weight_g_K1,
        [targets_MK.detach()],
        weights_M / mean,
        1 / mean,
        student_temp,
        chunk_rows,
    )


@torch.no_grad()
def masked_patch_entropy(targets_MK: Tensor, weights_M: Tensor) -> Tensor:
    """Entropy (nats) of the teacher's targets, weighted as in ``masked_patch_loss``, summed over all ranks.

    Every rank must call this.
    """
    entropy_M = -torch.xlogy(targets_MK, targets_MK).sum(dim=-1)
    return all_reduce_sum((entropy_M * weights_M.to(entropy_M.dtype)).sum())


def _check(
    features_MD: Tensor,
    weight_v_KD: Tensor,
    weight_g_K1: Tensor | None,
    targets_MK: Tensor,
    weights_M: Tensor,
    chunk_rows: int,
) -> None:
    num_rows, num_prototypes = len(weights_M), len(weight_v_KD)
    if (
        features_MD.shape != (num_rows, weight_v_KD.shape[1])
        or targets_MK.shape != (num_rows, num_prototypes)
        or (weight_g_K1 is not None and weight_g_K1.shape != (num_prototypes, 1))
    ):
        lengths = "none" if weight_g_K1 is None else tuple(weight_g_K1.shape)
        raise ValueError(
            f"features {tuple(features_MD.shape)}, prototypes {tuple(weight_v_KD.shape)}, their lengths {lengths}, "
            f"targets {tuple(targets_MK.shape)} and weights {tuple(weights_M.shape)} do not fit: expected (M, D), "
            "(K, D), (K, 1) or none, (M, K) and (M,)"
        )
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows: expected at least 1, got {chunk_rows}")
