"""CosFace: the formula of AM-Softmax, found at the same time, with the scale that its paper uses."""

from torch import Tensor

from passreid_ray.losses.am_softmax import am_softmax_loss


def cosface_loss(
    features_ND: Tensor, weights_CD: Tensor, ids_N: Tensor, scale: float = 64.0, margin: float = 0.35
) -> Tensor:
    """``am_softmax_loss`` with a scale of 64. CosFace (arXiv:1801.09414, eq. 4)."""
    return am_softmax_loss(features_ND, weights_CD, ids_N, scale, margin)
