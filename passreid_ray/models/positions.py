"""Positions of the patch grid: which grid a stored table has, and the resamplings that carry it to another grid."""

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]
"""Rows and columns of patches."""


def resize_positions(positions_1ND: Tensor, old: Grid, new: Grid, mode: Literal["bicubic", "bilinear"]) -> Tensor:
    """Positions ``(1, N, D)`` of the grid ``old`` resampled to exactly the grid ``new``; untouched when they agree."""
    if old == new:
        return positions_1ND
    return _flat(F.interpolate(_map(positions_1ND, old), size=new, mode=mode, align_corners=False))


def resize_positions_as_reference(positions_1ND: Tensor, old: Grid, new: Grid) -> Tensor:
    """Positions resampled the way the PASS pre-training code does it, which changes them even when ``old == new``.

    The reference compares the grid with a count that includes the prefix tokens, so it always resamples; and it adds
    0.1 to the new size before dividing, so the sampling points are off by 0.1 / size (16.1 / 16 at 256 x 128).
    """
    scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
    resized = F.interpolate(_map(positions_1ND, old), scale_factor=scale, mode="bicubic", align_corners=False)
    assert resized.shape[-2:] == new
    return _flat(resized)


def stored_grid(num_patches: int, like: Grid) -> Grid | None:
    """The grid that a stored table of ``num_patches`` positions most likely has; None when there is none.

    In this order: the model's own grid ``like``, twice as high as wide (every PASS and TransReID-SSL file), square
    (ImageNet), the shape of ``like`` at another scale.
    """
    if num_patches == like[0] * like[1]:
        return like
    if num_patches < 1:
        return None
    for rows, columns in ((2, 1), (1, 1), like):
        unit = math.gcd(rows, columns)
        rows, columns = rows // unit, columns // unit
        scale = math.isqrt(num_patches // (rows * columns))
        if scale and scale * scale * rows * columns == num_patches:
            return rows * scale, columns * scale
    return None


def _map(positions_1ND: Tensor, grid: Grid) -> Tensor:
    return positions_1ND.reshape(1, *grid, -1).permute(0, 3, 1, 2)


def _flat(map_1DHW: Tensor) -> Tensor:
    return map_1DHW.flatten(2).transpose(1, 2)
