"""Images of several sizes in one batch: each fills the top left of a shared canvas with its own grid of patches."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from passreid_ray.errors import UserError
from passreid_ray.models.positions import Grid


def checked_grids(grids_B2: Tensor, batch_size: int, canvas: Grid) -> list[Grid]:
    """The grid of each image, from integers ``(B, 2)``: rows and columns of patches.

    Raises:
        UserError: not one pair of integers per image, or a grid that is empty or larger than the canvas.
    """
    is_integer = not grids_B2.is_floating_point() and grids_B2.dtype != torch.bool
    if grids_B2.shape != (batch_size, 2) or not is_integer:
        raise UserError(
            f"grids_B2: expected integers ({batch_size}, 2), rows and columns of patches of each image; "
            f"found {grids_B2.dtype} {tuple(grids_B2.shape)}"
        )
    grids = [(int(rows), int(columns)) for rows, columns in grids_B2.tolist()]
    for index, (rows, columns) in enumerate(grids):
        if not (1 <= rows <= canvas[0] and 1 <= columns <= canvas[1]):
            raise UserError(
                f"grids_B2: image {index} has {rows}x{columns} patches, the canvas {canvas[0]}x{canvas[1]}; "
                "give every image 1 to as many rows and columns as the canvas has, or pad the batch to a larger canvas"
            )
    return grids


def real_patches(grids: Sequence[Grid], canvas: Grid) -> Tensor:
    """``(B, rows, columns)`` of the canvas, on the CPU: true where a patch belongs to the image."""
    rows_B1, columns_B1 = torch.tensor(grids).reshape(-1, 2, 1).unbind(1)
    return (torch.arange(canvas[0]) < rows_B1)[:, :, None] & (torch.arange(canvas[1]) < columns_B1)[:, None, :]


def without_padding(images_BCHW: Tensor, real_BRC: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """The images with 0 in every pixel of a patch that is not real."""
    # Hiding a patch from attention is not enough: a weight of 0 times a nan in the padding would still be nan.
    real_BHW = real_BRC.repeat_interleave(patch_size[0], dim=1).repeat_interleave(patch_size[1], dim=2)
    return images_BCHW.masked_fill(~real_BHW[:, None], 0)


def positions_on_canvas(grids: Sequence[Grid], canvas: Grid, positions: Callable[[Grid], Tensor]) -> Tensor:
    """Positions ``(B, rows * columns, D)`` of the canvas: each image has those of its own grid, 0 where it is padded.

    ``positions`` gives ``(1, rows * columns, D)`` for a grid. It is called once per distinct grid.
    """
    distinct = sorted(set(grids))
    tables = []
    for rows, columns in distinct:
        map_1RCD = positions((rows, columns)).unflatten(1, (rows, columns))
        tables.append(F.pad(map_1RCD, (0, 0, 0, canvas[1] - columns, 0, canvas[0] - rows)).flatten(1, 2))
    place = {grid: index for index, grid in enumerate(distinct)}
    own_B = torch.tensor([place[grid] for grid in grids])
    return torch.cat(tables)[own_B.to(tables[0].device, non_blocking=True)]
