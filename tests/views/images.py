"""Pixels for the tests of this room."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def noisy_image(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Blocks of strong colours under noise, so that every hue, saturation and edge occurs; uint8 (H, W, 3)."""
    rng = np.random.default_rng(seed)
    blocks = Image.fromarray(rng.integers(0, 256, (9, 5, 3), np.uint8))
    smooth = np.asarray(blocks.resize((width, height), Image.Resampling.BILINEAR)).astype(np.int16)
    return np.clip(smooth + rng.integers(-30, 31, smooth.shape), 0, 255).astype(np.uint8)
