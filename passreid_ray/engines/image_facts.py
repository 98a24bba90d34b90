"""What is known of an image once it was read: a record of 46 bytes, so that millions of them fit in memory."""

import numpy as np
from numpy.typing import NDArray

from passreid_ray.data import BadImage, Rows, decode_image
from passreid_ray.data.image_hash import difference_hash, prefix_of
from passreid_ray.engines.image_pieces import read_in_pieces

FORMATS = ("bad", "JPEG", "PNG", "BMP", "GIF", "WebP", "TIFF")
FACTS = np.dtype(
    [
        ("width_px", np.int32),
        ("height_px", np.int32),
        ("bytes", np.uint32),
        ("format", np.uint8),  # position in FORMATS; 0: cannot be used, and all but bytes is 0
        ("is_grey", np.bool_),
        ("brightness", np.float32),  # mean of the grey image, 0 to 255
        ("contrast", np.float32),  # its standard deviation
        ("prefix", np.uint64, 2),  # first 16 bytes of the SHA-256
        ("dhash", np.uint64),
    ]
)
GREY_SPREAD = 3.0
"""Below this mean difference of largest and smallest channel an image is grey; JPEG tints grey ones by 1 or 2."""
MAX_MEASURED_PX = 256
"""Brightness, contrast and colour are measured on at most so many rows and columns, spread over the image."""


def look_at_rows(
    block: slice, rows: Rows, numbers_N: NDArray[np.int64]
) -> tuple[NDArray[np.void], list[tuple[int, str]]]:
    """``(N,)`` ``FACTS`` of the rows ``numbers_N[block]``, and (row number, reason) of those that cannot be used."""
    numbers = numbers_N[block]
    facts_N = np.zeros(len(numbers), FACTS)
    bad: list[tuple[int, str]] = []
    for position, data in enumerate(read_in_pieces(rows, numbers)):
        try:
            if isinstance(data, BadImage):
                raise data
            facts_N[position]["bytes"] = len(data)
            facts_N[position] = look_at(data)
        except BadImage as error:
            bad.append((int(numbers[position]), error.reason))
    return facts_N, bad


def look_at(data: bytes) -> NDArray[np.void]:
    """``FACTS`` of an encoded image; raises ``BadImage`` when it cannot be decoded."""
    pixels_HWC = decode_image(data)
    height_px, width_px, _ = pixels_HWC.shape
    steps = -(-height_px // MAX_MEASURED_PX), -(-width_px // MAX_MEASURED_PX)
    # Channels apart: reducing over a last axis of three took longer than decoding the image.
    red_HW, green_HW, blue_HW = np.ascontiguousarray(pixels_HWC[:: steps[0], :: steps[1]].transpose(2, 0, 1))
    largest_HW = np.maximum(np.maximum(red_HW, green_HW), blue_HW)
    smallest_HW = np.minimum(np.minimum(red_HW, green_HW), blue_HW)
    grey_HW = np.float32(0.299) * red_HW + np.float32(0.587) * green_HW + np.float32(0.114) * blue_HW
    facts = np.zeros((), FACTS)
    facts["width_px"], facts["height_px"], facts["bytes"] = width_px, height_px, len(data)
    facts["format"] = _format(data)
    facts["is_grey"] = (largest_HW - smallest_HW).mean() < GREY_SPREAD
    facts["brightness"], facts["contrast"] = grey_HW.mean(), grey_HW.std()
    facts["prefix"] = prefix_of(data)
    facts["dhash"] = difference_hash(pixels_HWC)
    return facts


def _format(data: bytes) -> int:
    """Position in ``FORMATS`` of an image that was decoded, so that a few bytes tell it."""
    match data[:2]:
        case b"\xff\xd8":
            return FORMATS.index("JPEG")
        case b"\x89P":
            return FORMATS.index("PNG")
        case b"BM":
            return FORMATS.index("BMP")
        case b"GI":
            return FORMATS.index("GIF")
        case b"RI":
            return FORMATS.index("WebP")
        case _:
            return FORMATS.index("TIFF")
