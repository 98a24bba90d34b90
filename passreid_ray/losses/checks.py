"""What the losses ask of their input. ``loss``, the name of what was called, begins the message of every UserError."""

from typing import Any, get_args

import torch
from torch import Tensor

from passreid_ray.errors import UserError


def check_matrix(loss: str, name: str, matrix: Tensor, sides: str) -> None:
    """Refuse what is not a matrix of at least one row and one column; ``sides`` are its letters, like ``(N, D)``."""
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise UserError(f"{loss}: {name} of shape {tuple(matrix.shape)}; give {sides}, both above 0")


def check_ids(loss: str, ids_N: Tensor, num_rows: int, num_classes: int | None = None) -> None:
    """Refuse ids that are not one integer per row and, on the CPU, ids outside 0..``num_classes`` - 1 if that is given.

    A look at values on a GPU would make every step wait for it.
    """
    is_integer = not (ids_N.is_floating_point() or ids_N.is_complex() or ids_N.dtype == torch.bool)
    if ids_N.shape != (num_rows,) or not is_integer:
        raise UserError(
            f"{loss}: ids of shape {tuple(ids_N.shape)} and {ids_N.dtype} beside {num_rows} rows; "
            "give one integer id per row"
        )
    if num_classes is not None and ids_N.device.type == "cpu":
        outside = ids_N[(ids_N < 0) | (ids_N >= num_classes)]
        if len(outside):
            raise UserError(
                f"{loss}: id {int(outside[0])} with {num_classes} classes; number the identities of the "
                f"training set 0..{num_classes - 1} and leave other rows out of the batch"
            )


def check_choice(setting: str, value: str, choices: Any) -> None:
    """Refuse a value that is none of ``choices``, a ``Literal``; the message begins with ``setting``."""
    if value not in get_args(choices):
        raise UserError(f"{setting}: {value!r}; choose one of {', '.join(get_args(choices))}")
