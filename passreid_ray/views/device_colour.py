"""Changes of the pixels of many views at once, on their device, to the level what Pillow does to one.

Shape letters: M views of one size, H, W pixels. Views are uint8 ``(M, 3, H, W)``; what differs between them comes as
one number for each view, on the same device. Nothing waits for the device.
"""

from functools import cache

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from passreid_ray.views.colour import _hsv_tables

_BLUR_PASSES = 3
_BLUR_BITS = 24
"""Pillow's weights of a box blur are whole multiples of 2^-24."""


def adjust_brightness(views_M3HW: Tensor, factor_M: Tensor) -> Tensor:
    """Scale every channel by ``factor_M`` (float32)."""
    return _blend(torch.zeros_like(views_M3HW[:1, :1, :1, :1]), views_M3HW, factor_M)


def adjust_contrast(views_M3HW: Tensor, factor_M: Tensor) -> Tensor:
    """Scale the distance of every channel from its view's mean grey by ``factor_M`` (float32)."""
    grey_M1HW = _luma(views_M3HW)
    num_pixels = grey_M1HW[0].numel()
    total_M111 = grey_M1HW.sum((1, 2, 3), dtype=torch.int64, keepdim=True)
    mean_M111 = torch.div(2 * total_M111 + num_pixels, 2 * num_pixels, rounding_mode="floor")
    return _blend(mean_M111, views_M3HW, factor_M)


def adjust_saturation(views_M3HW: Tensor, factor_M: Tensor) -> Tensor:
    """Scale the distance of every pixel from its own grey by ``factor_M`` (float32)."""
    return _blend(_luma(views_M3HW), views_M3HW, factor_M)


def shift_hue(views_M3HW: Tensor, steps_M: Tensor) -> Tensor:
    """Turn every pixel's hue by ``steps_M`` (int32) of the 256 steps of an 8-bit HSV colour; see ``hue_steps``."""
    hue_table, value_saturation_table, weight_tables = _tables(views_M3HW.device)
    red, green, blue = views_M3HW.to(torch.int32).unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    is_red, is_green = red == value, green == value  # red wins ties, then green
    difference = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green))
    brightest = torch.where(is_red, 0, torch.where(is_green, 1, 2))
    hue = hue_table[((brightest * 256 + chroma) << 9) + 256 + difference]
    value_saturation = value_saturation_table[(value << 8) + chroma]
    shifted = (hue.to(torch.int32) + steps_M[:, None, None]) & 255
    rounded_value = value.to(torch.float32).add_(0.5)
    channels = [rounded_value - value_saturation * weights[shifted] for weights in weight_tables]
    return torch.stack(channels, dim=1).to(torch.uint8)


def hue_steps(turns: ArrayLike) -> NDArray[np.int32]:
    """Turns of the colour circle as the steps of an 8-bit hue, 0..255: truncated towards 0, then wrapped."""
    return np.trunc(np.asarray(turns, np.float64) * 255).astype(np.int32) & 255


def to_grey(views_M3HW: Tensor) -> Tensor:
    """The views without their colours, still in three channels."""
    return _luma(views_M3HW).to(torch.uint8).expand_as(views_M3HW)


def solarize(views_M3HW: Tensor) -> Tensor:
    """The views with every channel value from 128 on inverted."""
    return torch.minimum(views_M3HW, 255 - views_M3HW)


def gaussian_blur(views_M3HW: Tensor, weights_MK: Tensor) -> Tensor:
    """Views blurred as Pillow's ``GaussianBlur`` does, by three box blurs along each side; see ``blur_weights``."""
    blurred_M3WH = _box_blurs(views_M3HW.to(torch.int32), weights_MK).transpose(2, 3)
    return _box_blurs(blurred_M3WH, weights_MK).transpose(2, 3).to(torch.uint8)


def blur_weights(radius_M: ArrayLike) -> NDArray[np.int32]:
    """``(M, K)``: weights of the pixels at distance 0, 1 .. K - 1 in one box blur, times 2^24.

    ``radius_M``: standard deviations in pixels. The box has the width that makes three of them as wide as the Gaussian;
    it is no whole number, so the outermost pixels count in part (Gwosdek et al., "Theoretical Foundations of Gaussian
    Convolution by Extended Box Filtering", 2011). In Pillow's float32 arithmetic.
    """
    one = np.float32(1)
    variance_M = np.asarray(radius_M, np.float32) ** 2 / np.float32(_BLUR_PASSES)
    length_M = np.sqrt(12.0 * variance_M.astype(np.float64) + 1.0).astype(np.float32)
    whole_M = np.floor((length_M.astype(np.float64) - 1) / 2).astype(np.float32)
    part_M = (2 * whole_M + one) * (whole_M * (whole_M + one) - 3 * variance_M)
    part_M /= 6 * (variance_M - (whole_M + one) * (whole_M + one))
    box_radius_M = whole_M + part_M

    reach_M = box_radius_M.astype(np.int64)
    inner_M = (np.float32(1 << _BLUR_BITS) / (box_radius_M * 2 + one)).astype(np.int64)
    outer_M = ((1 << _BLUR_BITS) - (2 * reach_M + 1) * inner_M) // 2
    distance_K = np.arange(reach_M.max(initial=0) + 2)
    is_inner_MK = distance_K <= reach_M[:, None]
    is_outer_MK = distance_K == reach_M[:, None] + 1
    return (is_inner_MK * inner_M[:, None] + is_outer_MK * outer_M[:, None]).astype(np.int32)


def _box_blurs(views_M3HW: Tensor, weights_MK: Tensor) -> Tensor:
    """Three box blurs along the last axis, each rounded to 8 bits; int32 in and out."""
    width, reach = views_M3HW.shape[-1], weights_MK.shape[1] - 1
    weights_KM111 = weights_MK.T[:, :, None, None, None]
    # Pixels beyond the edge repeat the last one.
    columns = torch.arange(-reach, width + reach, device=views_M3HW.device).clamp_(0, width - 1)
    for _ in range(_BLUR_PASSES):
        padded = views_M3HW.index_select(-1, columns)
        total = views_M3HW * weights_KM111[0]
        for distance in range(1, reach + 1):
            left = padded[..., reach - distance : reach - distance + width]
            right = padded[..., reach + distance : reach + distance + width]
            total += (left + right).mul_(weights_KM111[distance])
        # The sum needs 32 bits: int32 wraps round, and the mask undoes what the sign does to the shift.
        total += 1 << (_BLUR_BITS - 1)
        views_M3HW = total.bitwise_right_shift_(_BLUR_BITS).bitwise_and_(255)
    return views_M3HW


def _luma(views_M3HW: Tensor) -> Tensor:
    """Grey ``(M, 1, H, W)``, int32: Pillow's weights of R, G, B, which are whole multiples of 2^-16."""
    red, green, blue = views_M3HW.to(torch.int32).split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _blend(start: Tensor, views_M3HW: Tensor, factor_M: Tensor) -> Tensor:
    """``start + factor * (views - start)``, cut to 0..255 and truncated to a whole number."""
    start = start.to(torch.float32)
    # Two roundings, as in Pillow: lerp and addcmul would round once.
    blended = (views_M3HW.to(torch.float32) - start).mul_(factor_M[:, None, None, None]).add_(start)
    return blended.clamp_(0, 255).to(torch.uint8)


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    hue, value_saturation, weights = (torch.tensor(table, device=device) for table in _hsv_tables())
    return hue.flatten(), value_saturation.flatten(), weights
