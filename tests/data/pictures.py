"""Small pictures with known pixels, and folders full of them."""

from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image


def gradient(height: int = 24, width: int = 16) -> np.ndarray:
    """``(H, W, 3)`` uint8 without any symmetry and smooth enough for JPEG."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([8 * y, 12 * x, 4 * (x + y)], axis=-1).astype(np.uint8)


def encoded(pixels_HWC: np.ndarray, file_format: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels_HWC).save(file, file_format, **options)
    return file.getvalue()


def write_images(root: Path, paths: Iterable[str]) -> Path:
    """Write an image to each path below ``root``; its first pixel's red value tells its position in ``paths``."""
    for number, path in enumerate(paths):
        pixels_HWC = np.full((16, 12, 3), number, np.uint8)
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(encoded(pixels_HWC))
    return root
