"""Where views are cut: body bands and random boxes."""

import math
from typing import NamedTuple

import numpy as np

_TRIES = 10


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


def part_bands(height: int, width: int, num_parts: int, part_height: float) -> list[Box]:
    """The body band of each part, top to bottom: full width, equal heights, evenly spread, in whole pixels.

    With 3 parts of half the height the tops are ``int(0), int(0.25 h), int(0.5 h)`` and the height is ``int(0.5 h)``,
    as in the reference. A single part is the whole image.
    """
    if num_parts == 1:
        return [Box(0, 0, height, width)]
    band_height = max(1, int(part_height * height))  # an image of one row still has bands
    highest_top = height - band_height
    tops = (int(part / (num_parts - 1) * (1 - part_height) * height) for part in range(num_parts))
    return [Box(min(top, highest_top), 0, band_height, width) for top in tops]


def random_box(
    height: int, width: int, scale: tuple[float, float], aspect: tuple[float, float], rng: np.random.Generator
) -> Box:
    """A box of random area (fraction of the image in ``scale``) and random width / height in ``aspect``.

    The rule of torchvision's ``RandomResizedCrop``: ten tries to fit one inside, then ``central_box``.
    """
    log_aspect = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(_TRIES):
        area = height * width * uniform(rng, scale)
        ratio = math.exp(uniform(rng, log_aspect))
        box_width = round(math.sqrt(area * ratio))
        box_height = round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return Box(top, left, box_height, box_width)
    return central_box(height, width, aspect)


def central_box(height: int, width: int, aspect: tuple[float, float]) -> Box:
    """The largest centred box whose width / height lies in ``aspect``; the whole image when its own does."""
    box_height, box_width = height, width
    if width / height < aspect[0]:
        box_height = max(1, round(width / aspect[0]))
    elif width / height > aspect[1]:
        box_width = max(1, round(height * aspect[1]))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def uniform(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    """A number between ``bounds``; several times faster than ``rng.uniform`` for a single one."""
    return bounds[0] + (bounds[1] - bounds[0]) * rng.random()
