"""Distances between features."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from passreid_ray.errors import UserError


def cosine_distance(features_ND: Any, others_MD: Any) -> NDArray[np.floating]:
    """``1 - cosine`` of every pair, ``(N, M)``, 0 = same direction, 2 = opposite; numpy or tensors in, numpy out.

    float64 stays float64, anything else is computed in float32. An all-zero feature is at distance 1 from everything.
    Raises ``UserError`` for features that are not finite, not a matrix, or of different widths.
    """
    features_ND, others_MD = normalized(features_ND, "features"), normalized(others_MD, "others")
    if features_ND.shape[1] != others_MD.shape[1]:
        raise UserError(f"features are {features_ND.shape[1]} and {others_MD.shape[1]} wide; they must be of one model")
    return 1 - features_ND @ others_MD.T


def as_array(values: Any) -> NDArray[Any]:
    """``values`` as numpy; tensors of any device and numpy's own types are taken."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values  # numpy has no bfloat16
    return np.asarray(values)


def normalized(features_ND: Any, name: str) -> NDArray[np.floating]:
    """Finite L2-normalised rows; an all-zero row stays zero. ``name`` is what an error calls them."""
    features_ND = as_array(features_ND)
    if features_ND.dtype != np.float64:
        features_ND = features_ND.astype(np.float32)
    if features_ND.ndim != 2:
        raise UserError(f"{name}: expected a matrix with one feature per row, got shape {features_ND.shape}")
    norms_N1 = np.linalg.norm(features_ND, axis=1, keepdims=True)
    if not np.isfinite(norms_N1).all():
        row = int(np.flatnonzero(~np.isfinite(norms_N1))[0])
        raise UserError(f"{name}: row {row} is not finite; check the weights and the images they were extracted with")
    return features_ND / np.where(norms_N1 > 0, norms_N1, 1)
