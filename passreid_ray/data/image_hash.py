"""Hashes of images: what shows that two files are the same, and that two pictures nearly are."""

import hashlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

HASH_WIDTH, HASH_HEIGHT = 9, 8
"""Nine grey values in a row have eight differences."""
PREFIX_BYTES = 16


def difference_hash(pixels_HWC: NDArray[np.uint8]) -> int:
    """64-bit difference hash of an image; near duplicates differ in few bits, see ``differing_bits``.

    The grey image is shrunk to 9 x 8 means; each bit says whether a mean is brighter than its left neighbour, row by
    row, the first in the highest bit. ``pixels_HWC``: RGB.

    Source: N. Krawetz, "Kind of Like That", hackerfactor.com, 2013.
    """
    grey = Image.fromarray(pixels_HWC).convert("L")
    means_HW = np.asarray(grey.resize((HASH_WIDTH, HASH_HEIGHT), Image.Resampling.BOX))
    return int.from_bytes(np.packbits(means_HW[:, 1:] > means_HW[:, :-1]).tobytes(), "big")


def differing_bits(hash_a: int, hash_b: int) -> int:
    """In how many bits two hashes differ: 0 for the same picture, about 32 for unrelated ones."""
    return (hash_a ^ hash_b).bit_count()


def prefix_of(data: bytes) -> NDArray[np.uint64]:
    """First 16 bytes of the SHA-256 of ``data`` as two numbers ``(2,)``."""
    return np.frombuffer(hashlib.sha256(data).digest()[:PREFIX_BYTES], np.uint64)


def repeats(prefixes_N2: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Rows that repeat an earlier one, ``(M, 2)``: row and the first row with its prefix, in the order of rows.

    Rows of zeros stand for images that could not be read, and repeat nothing. Takes 40 bytes a row at its peak, the
    prefixes' own 16 among them.
    """
    order_N = np.lexsort((prefixes_N2[:, 1], prefixes_N2[:, 0]))  # stable: equal prefixes stay in the order of rows
    is_repeat_N = np.zeros(len(order_N), bool)
    if len(order_N):
        is_repeat_N[1:] = _equals_next(prefixes_N2[:, 0], order_N)
        is_repeat_N[1:] &= _equals_next(prefixes_N2[:, 1], order_N)
    is_read_N = (prefixes_N2[:, 0] != 0) | (prefixes_N2[:, 1] != 0)
    is_repeat_N &= is_read_N[order_N]
    places_M = np.flatnonzero(is_repeat_N)
    starts = np.flatnonzero(~is_repeat_N)
    firsts_M = starts[np.searchsorted(starts, places_M) - 1]
    pairs_M2 = np.stack([order_N[places_M], order_N[firsts_M]], axis=1)
    return pairs_M2[np.argsort(pairs_M2[:, 0])]


def _equals_next(values_N: NDArray[np.uint64], order_N: NDArray[np.int64]) -> NDArray[np.bool_]:
    ordered_N = values_N[order_N]
    return ordered_N[1:] == ordered_N[:-1]
