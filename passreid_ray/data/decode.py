"""Encoded image bytes -> pixels; whatever is wrong with the bytes becomes ``BadImage``."""

from io import BytesIO

import numpy as np
from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

MIN_SIDE_PX = 8
"""An image with a shorter side cannot hold a person and is refused."""

MAX_IMAGE_BYTES = 100_000_000
"""A larger image is refused: before it is read where its store knows the size, else before it is decoded."""


class BadImage(ValueError):
    """An image that cannot be read or decoded; ``reason`` says why in a few words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def refuse_oversized(num_bytes: int) -> None:
    """Raise ``BadImage`` for an encoded image of more than ``MAX_IMAGE_BYTES``."""
    if num_bytes > MAX_IMAGE_BYTES:
        raise BadImage(f"has {num_bytes} bytes; an image has at most {MAX_IMAGE_BYTES}")


def decode_image(data: bytes, *, max_pixels: int = 50_000_000) -> np.ndarray:
    """Pixels of an encoded image: ``(H, W, 3)`` uint8 RGB, upright by its EXIF orientation.

    Reads JPEG, PNG, BMP, GIF, WebP and TIFF; of several frames the first. Grey and palette images become RGB, alpha is
    composited on white, 16 bits are scaled to 8. Colour profiles are ignored. Raises ``BadImage`` for bytes that are
    empty, corrupt, truncated or of another format, for a side below ``MIN_SIDE_PX`` and, before anything is decoded,
    for more than ``max_pixels`` pixels or ``MAX_IMAGE_BYTES`` bytes.
    """
    if not data:
        raise BadImage("empty")
    refuse_oversized(len(data))
    try:
        image = _open(data)
        if image is None:
            raise BadImage("not a JPEG, PNG, BMP, GIF, WebP or TIFF image")
        _check_size(*image.size, max_pixels)
        image.load()
        return np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except BadImage:
        raise
    except Exception as error:  # hostile bytes make Pillow's readers raise anything, IndexError and struct.error too
        raise BadImage(f"cannot be decoded: {error or type(error).__name__}") from error


def _open(data: bytes) -> ImageFile | None:
    # The readers are called by name because Image.open warns about large images through the process-wide warning
    # filters, and would also try formats that no data set holds (PostScript runs an external program).
    file = BytesIO(data)
    match data[:4]:
        case b"\x89PNG":
            return PngImageFile(file)
        case b"RIFF" if data[8:12] == b"WEBP":
            return WebPImageFile(file)
        case b"GIF8":
            return GifImageFile(file)
        case b"II*\0" | b"MM\0*" | b"II+\0" | b"MM\0+":
            return TiffImageFile(file)
        case start if start[:3] == b"\xff\xd8\xff":
            return JpegImageFile(file)
        case start if start[:2] == b"BM":
            return BmpImageFile(file)
        case _:
            return None


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if min(width, height) < MIN_SIDE_PX:
        raise BadImage(f"{width}x{height} pixels; the shorter side needs at least {MIN_SIDE_PX}")
    if width * height > max_pixels:
        raise BadImage(f"{width}x{height} pixels; at most {max_pixels} are decoded")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bits(np.asarray(image))
    if image.mode == "F":
        raise BadImage("floating point pixels have no agreed range")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(grey_HW: np.ndarray) -> Image.Image:
    values = grey_HW.astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadImage(f"grey values from {values.min()} to {values.max()} do not fit 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
