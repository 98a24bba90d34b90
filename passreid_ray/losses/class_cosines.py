"""Cosines of features to classes, which the margin losses start from, and the two settings that these losses share."""

import torch
import torch.nn.functional as F
from torch import Tensor

from passreid_ray.dtypes import at_least_float32
from passreid_ray.errors import UserError
from passreid_ray.losses.checks import check_ids, check_matrix


def check_scale_and_margin(scale: float, margin: float, *, margin_below: float) -> None:
    """Refuse a scale that is not above 0 and a margin outside 0 .. ``margin_below``, the end left out (UserError)."""
    if not 0 < scale < float("inf"):
        raise UserError(f"identity classifier: scale {scale}; give a number above 0")
    if not 0 <= margin < margin_below:
        raise UserError(f"identity classifier: margin {margin}; give a number from 0 to below {margin_below:.4g}")


def checked_cosines(features_ND: Tensor, weights_CD: Tensor, ids_N: Tensor) -> Tensor:
    """Cosine of each row's feature to each class's weights ``(N, C)``, with gradient to both.

    Float32 even under autocast (float64 is kept). Shapes that do not fit are UserErrors, and so is, on the CPU, an id
    outside 0..C-1.
    """
    check_matrix("identity classifier", "features", features_ND, "(N, D)")
    check_matrix("identity classifier", "weights", weights_CD, "(C, D)")
    if features_ND.shape[1] != weights_CD.shape[1]:
        raise UserError(
            f"identity classifier: features of width {features_ND.shape[1]} beside weights of width "
            f"{weights_CD.shape[1]}; give both the same width"
        )
    check_ids("identity classifier", ids_N, len(features_ND), len(weights_CD))
    with torch.autocast(features_ND.device.type, enabled=False):
        features_ND, weights_CD = at_least_float32(features_ND), at_least_float32(weights_CD)
        dtype = torch.promote_types(features_ND.dtype, weights_CD.dtype)
        return F.normalize(features_ND.to(dtype), dim=1) @ F.normalize(weights_CD.to(dtype), dim=1).T
