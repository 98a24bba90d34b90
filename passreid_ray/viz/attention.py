"""Where CLS and each part token look: a sheet of crops with one attention map per token."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F


def attention_picture(images_BCHW: Tensor, maps_BhTHW: Tensor, path: Path) -> None:
    """Write a PNG with one row per crop: the crop, then every token's attention over it.

    ``images_BCHW`` are RGB in 0..1; ``maps_BhTHW`` are attention weights per head, averaged here, on the patch grid.
    Every map is stretched to its own range, so colours compare within a map, not between maps.
    """
    maps_BTHW = F.interpolate(maps_BhTHW.mean(1), images_BCHW.shape[-2:], mode="bilinear")
    num_images, num_tokens = maps_BTHW.shape[:2]
    aspect = images_BCHW.shape[-1] / images_BCHW.shape[-2]
    figure = Figure(figsize=(1.9 * aspect * (1 + num_tokens) + 0.2, 2.0 * num_images + 0.3), layout="constrained")
    axes = figure.subplots(num_images, 1 + num_tokens, squeeze=False)
    titles = ["crop", "CLS", *(f"part {part}" for part in range(num_tokens - 1))]
    for image, (crop_CHW, maps_THW) in enumerate(zip(images_BCHW, maps_BTHW, strict=True)):
        crop_HWC = crop_CHW.clamp(0, 1).permute(1, 2, 0).numpy()
        for column, title in enumerate(titles):
            axis = axes[image, column]
            axis.set_axis_off()
            axis.imshow(crop_HWC)
            if column:
                axis.imshow(_stretched(maps_THW[column - 1]), cmap="inferno", alpha=0.65, vmin=0, vmax=1)
            if image == 0:
                axis.set_title(title, fontsize=8)
    figure.savefig(path, dpi=120)


def _stretched(map_HW: Tensor) -> np.ndarray:
    low, high = torch.aminmax(map_HW)
    return ((map_HW - low) / (high - low).clamp(min=1e-12)).numpy()
