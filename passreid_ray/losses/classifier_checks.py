"""What the losses of an identity classifier ask of their input, and the cosines that most of them start from."""

import torch
import torch.nn.functional as F
from torch import Tensor

from passreid_ray.dtypes import at_least_float32
from passreid_ray.errors import UserError


def check_logits(logits_NC: Tensor, ids_N: Tensor) -> None:
    """Refuse logits that are not ``(N, C)``, both above 0, and ids that do not fit them (UserError)."""
    if logits_NC.ndim != 2 or 0 in logits_NC.shape:
        raise UserError(f"identity classifier: logits of shape {tuple(logits_NC.shape)}; give (N, C), both above 0")
    _check_ids(ids_N, *logits_NC.shape)


def check_scale_and_margin(scale: float, margin: float, *, margin_below: float) -> None:
    """Refuse a scale that is not above 0 and a margin outside 0 .. ``margin_below``, the end left out (UserError)."""
    if not 0 < scale < float("inf"):
        raise UserError(f"identity classifier: scale {scale}; give a number above 0")
    if not 0 <= margin < margin_below:
        raise UserError(f"identity classifier: margin {margin}; give a number from 0 to below {margin_below:.4g}")


def checked_cosines(features_ND: Tensor, weights_CD: Tensor, ids_N: Tensor) -> Tensor:
    """Cosine of each row's feature to each class's weights ``(N, C)``, with gradient to both.

    At least float32; call it where autocast is off, or the product is in half precision again. Shapes that do not fit
    are UserErrors, and so is, on the CPU, an id outside 0..C-1. A look at ids on a GPU would make every step wait.
    """
    if features_ND.ndim != 2 or weights_CD.ndim != 2 or 0 in features_ND.shape or 0 in weights_CD.shape:
        raise UserError(
            f"identity classifier: features of shape {tuple(features_ND.shape)} and weights of shape "
            f"{tuple(weights_CD.shape)}; give (N, D) and (C, D), all above 0"
        )
    if features_ND.shape[1] != weights_CD.shape[1]:
        raise UserError(
            f"identity classifier: features of width {features_ND.shape[1]} beside weights of width "
            f"{weights_CD.shape[1]}; give both the same width"
        )
    _check_ids(ids_N, len(features_ND), len(weights_CD))
    features_ND, weights_CD = at_least_float32(features_ND), at_least_float32(weights_CD)
    dtype = torch.promote_types(features_ND.dtype, weights_CD.dtype)
    return F.normalize(features_ND.to(dtype), dim=1) @ F.normalize(weights_CD.to(dtype), dim=1).T


def _check_ids(ids_N: Tensor, num_rows: int, num_classes: int) -> None:
    is_integer = not (ids_N.is_floating_point() or ids_N.is_complex() or ids_N.dtype == torch.bool)
    if ids_N.shape != (num_rows,) or not is_integer:
        raise UserError(
            f"identity classifier: ids of shape {tuple(ids_N.shape)} and {ids_N.dtype} beside {num_rows} rows; "
            "give one integer id per row"
        )
    if ids_N.device.type == "cpu":
        outside = ids_N[(ids_N < 0) | (ids_N >= num_classes)]
        if len(outside):
            raise UserError(
                f"identity classifier: id {int(outside[0])} with {num_classes} classes; number the identities of the "
                f"training set 0..{num_classes - 1} and leave other rows out of the batch"
            )
