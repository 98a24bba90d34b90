"""Masks of patches made of rectangles: what is hidden hangs together and cannot be guessed from the patch beside it."""

# Shape letters: N views, A attempts, R rows and C columns of patches.

import math

import numpy as np
import numpy.typing as npt

MIN_BLOCK_PATCHES = 4
MAX_ASPECT = 1 / 0.3
"""Of a block, height to width or width to height."""
ATTEMPTS = 16
"""Blocks that are tried for a mask; those that do not fit are left out. On 16 x 8 patches more found no more."""


def block_masks(
    num_masked_N: npt.NDArray[np.int64],
    grid: tuple[int, int],
    rng: np.random.Generator,
    own: npt.NDArray[np.int64] | slice = slice(None),
) -> npt.NDArray[np.bool_]:
    """Masks ``(N, R, C)`` of a ``grid`` of R x C patches, true where hidden: ``num_masked_N[n]`` patches in mask n.

    Blocks of random area, aspect and place are added as long as they fit into what is left to be hidden; the few
    patches that are then missing are drawn one by one. Only the masks numbered ``own`` are made, each the same as if
    all were. BEiT (arXiv:2106.08254, algorithm 1) with the block sizes of iBOT (arXiv:2111.07832).
    """
    num = len(num_masked_N)
    places_AN4 = rng.random((ATTEMPTS, num, 4), dtype=np.float32)[:, own]
    order_NRC = rng.random((num, *grid), dtype=np.float32)[own]
    num_masked_N = num_masked_N[own]
    masks_NRC = np.zeros(order_NRC.shape, dtype=bool)
    for places_N4 in places_AN4:
        left_N = num_masked_N - masks_NRC.sum(axis=(1, 2))
        added_NRC = _blocks(left_N, grid, places_N4) & ~masks_NRC
        num_added_N = added_NRC.sum(axis=(1, 2))
        is_taken_N = (num_added_N <= left_N) & (left_N >= MIN_BLOCK_PATCHES)
        masks_NRC |= added_NRC & is_taken_N[:, None, None]
    return masks_NRC | _singles(num_masked_N - masks_NRC.sum(axis=(1, 2)), np.where(masks_NRC, 2, order_NRC))


def _blocks(left_N: np.ndarray, grid: tuple[int, int], places_N4: np.ndarray) -> np.ndarray:
    """One rectangle for each view, ``(N, R, C)``: its area, aspect, row and column from four numbers in [0, 1)."""
    area_N, aspect_N, row_N, column_N = places_N4.T
    area_N = MIN_BLOCK_PATCHES + area_N * np.maximum(left_N - MIN_BLOCK_PATCHES, 0)
    aspect_N = np.exp((2 * aspect_N - 1) * math.log(MAX_ASPECT))
    rows_NR = _spans(np.sqrt(area_N * aspect_N), grid[0], row_N)
    columns_NC = _spans(np.sqrt(area_N / aspect_N), grid[1], column_N)
    return rows_NR[:, :, None] & columns_NC[:, None, :]


def _spans(length_N: np.ndarray, size: int, place_N: np.ndarray) -> np.ndarray:
    """True in a run of about ``length_N`` of ``size`` places, ``(N, size)``."""
    length_N = np.clip(np.rint(length_N), 1, size)
    first_N1 = np.floor(place_N * (size - length_N + 1))[:, None]
    places = np.arange(size)
    return (first_N1 <= places) & (places < first_N1 + length_N[:, None])


def _singles(num_N: np.ndarray, order_NRC: np.ndarray) -> np.ndarray:
    """The ``num_N`` patches of each view that come first in ``order_NRC``."""
    ranks_NL = order_NRC.reshape(len(order_NRC), math.prod(order_NRC.shape[1:])).argsort(axis=1).argsort(axis=1)
    return (ranks_NL < num_N[:, None]).reshape(order_NRC.shape)
