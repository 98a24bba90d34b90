"""The one view that evaluation sees."""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from passreid_ray.views.config import PixelStatistics
from passreid_ray.views.pixels import normalize, to_image


def evaluation_pixels(image_HWC: NDArray[np.uint8], size_px: tuple[int, int]) -> NDArray[np.uint8]:
    """The whole image resized to ``size_px`` = (height, width), uint8 ``(3, H, W)``; bicubic, antialiased, as PIL."""
    height, width = size_px
    image = to_image(image_HWC).resize((width, height), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def evaluation_view(image_HWC: NDArray[np.uint8], size_px: tuple[int, int], statistics: PixelStatistics) -> Tensor:
    """``evaluation_pixels`` as network input: ``(3, H, W)`` float32, normalised with mean and std."""
    return normalize(torch.from_numpy(evaluation_pixels(image_HWC, size_px)), statistics)
