"""Encoded images of many rows, read a few at a time, so that a task holds little however large they are."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from passreid_ray.data import BadImage, Rows

PIECE_BYTES = 16_000_000
"""A piece is to hold about so much."""
PIECE_ROWS = 64
"""And at most so many rows: enough to keep a bucket's requests under way."""
FIRST_ROWS = 16
"""Of the first piece, when nothing is known of the images."""


def read_in_pieces(rows: Rows, numbers_N: NDArray[np.int64]) -> Iterator[bytes | BadImage]:
    """The images of the rows ``numbers_N`` in this order; where one cannot be read, why.

    The mean size in a piece decides how many rows the next one has.
    """
    start, piece_rows = 0, FIRST_ROWS
    while start < len(numbers_N):
        images = rows.read_many(numbers_N[start : start + piece_rows])
        start += piece_rows
        piece_rows = next_piece_rows(images)
        yield from images
        del images  # else it is held while the next piece is read


def next_piece_rows(images: list[bytes | BadImage]) -> int:
    """Rows of the piece after ``images``."""
    sizes = [len(image) for image in images if not isinstance(image, BadImage)]
    mean_bytes = max(1, sum(sizes) // max(1, len(sizes)))
    return min(PIECE_ROWS, max(1, PIECE_BYTES // mean_bytes))
