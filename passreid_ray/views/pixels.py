"""Between arrays of pixels, PIL images and network input."""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from passreid_ray.errors import UserError
from passreid_ray.views.config import PixelStatistics


def to_image(image_HWC: NDArray[np.uint8]) -> Image.Image:
    """A PIL image of the pixels. Raises ``UserError`` unless they are a non-empty uint8 RGB image ``(H, W, 3)``."""
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3 or image_HWC.size == 0:
        raise UserError(
            f"image: expected uint8 RGB pixels of shape (height, width, 3), got {image_HWC.dtype} {image_HWC.shape}; "
            "decode it as RGB first"
        )
    return Image.fromarray(image_HWC)


def normalize(pixels: Tensor, statistics: PixelStatistics) -> Tensor:
    """Network input of uint8 pixels ``(..., 3, H, W)``: ``(pixels / 255 - mean) / std``, float32, on their device.

    Equal to torchvision's ToTensor and Normalize to the last bit, on every device.
    """
    # Divisors are tensors on the device: CUDA multiplies by the rounded reciprocal of a number, which is not the same.
    constants = torch.tensor(((255.0,) * 3, statistics.mean, statistics.std), dtype=torch.float32)
    scale, mean, std = constants.to(pixels.device, non_blocking=True)[:, :, None, None]
    return pixels.to(torch.float32).div_(scale).sub_(mean).div_(std)
