"""Colour changes of an image, pixel for pixel what torchvision does to a PIL image, at a fraction of its time."""

from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def adjust_brightness(image: Image.Image, factor: float) -> Image.Image:
    """Scale every channel by ``factor``."""
    return Image.blend(Image.new("RGB", image.size), image, factor)


def adjust_contrast(image: Image.Image, factor: float) -> Image.Image:
    """Scale the distance of every channel from the image's mean grey by ``factor``."""
    mean = int(np.asarray(image.convert("L")).mean(dtype=np.float64) + 0.5)
    return Image.blend(Image.new("RGB", image.size, (mean, mean, mean)), image, factor)


def adjust_saturation(image: Image.Image, factor: float) -> Image.Image:
    """Scale the distance of every pixel from its own grey by ``factor``."""
    return Image.blend(to_grey(image), image, factor)


def to_grey(image: Image.Image) -> Image.Image:
    """The image without its colours, still in three channels."""
    return image.convert("L").convert("RGB")


def shift_hue(image: Image.Image, turns: float) -> Image.Image:
    """Turn every pixel's hue by ``turns`` of the colour circle, by way of PIL's 8-bit HSV.

    PIL's two conversions branch and divide at every pixel, which is the costliest part of colour jitter. Hue follows
    from the brightest channel and two small integers, value * saturation from two: tables read off PIL hold them.
    """
    hue_table, value_saturation_table, weight_tables = _hsv_tables()
    red, green, blue = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    # Masks of the brightest channel, all bits set; red wins ties, then green. (np.where costs ten times as much.)
    is_red = -(red == value).view(np.uint8)
    is_green = -(green == value).view(np.uint8) & ~is_red
    is_blue = ~(is_red | is_green)
    after = (green & is_red) | (blue & is_green) | (red & is_blue)
    before = (blue & is_red) | (red & is_green) | (green & is_blue)
    brightest = (is_green & 1) | (is_blue & 2)
    hue = hue_table.take(((brightest * np.uint32(256) + chroma) << 9) + 256 + after - before)
    value_saturation = value_saturation_table.take(value * np.uint32(256) + chroma)

    shifted = (hue + np.uint8(int(turns * 255) & 255)).astype(np.intp)
    rounded_value = value + np.float32(0.5)
    out = np.empty((*value.shape, 3), np.uint8)
    for channel, weights in enumerate(weight_tables):
        out[:, :, channel] = rounded_value - value_saturation * weights.take(shifted)
    return Image.fromarray(out)


@cache
def _hsv_tables() -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """Hue of (brightest channel, chroma, difference + 256), value * saturation of (value, chroma), and the weight w of
    (channel, hue) for which a channel of the RGB colour is ``value - value * saturation * w``.
    """
    chroma, difference = np.meshgrid(np.arange(256), np.arange(-256, 256), indexing="ij")
    darkest = 255 - chroma
    after = np.clip(darkest + np.maximum(difference, 0), 0, 255)
    before = np.clip(darkest + np.maximum(-difference, 0), 0, 255)
    brightest = np.full_like(chroma, 255)
    orders = [(brightest, after, before), (before, brightest, after), (after, before, brightest)]
    hue = np.stack([_to_hsv(np.stack(order, -1))[..., 0] for order in orders])

    value, chroma = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    darkest = np.clip(value - chroma, 0, 255)
    saturation = _to_hsv(np.stack([value, darkest, darkest], -1))[..., 1] / np.float32(255)

    sixths = np.arange(256) * 6 / 255
    fraction = sixths % 1
    falling, rising, zero, one = 1 - fraction, fraction, np.zeros(256), np.ones(256)
    sector = sixths.astype(np.intp) % 6
    red = np.choose(sector, [zero, rising, one, one, falling, zero])
    green = np.choose(sector, [falling, zero, zero, rising, one, one])
    blue = np.choose(sector, [one, one, falling, zero, zero, rising])
    weights = np.stack([red, green, blue]).astype(np.float32)
    return hue, (value * saturation).astype(np.float32), weights


def _to_hsv(rgb: NDArray[np.integer]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(rgb.astype(np.uint8)).convert("HSV"))
