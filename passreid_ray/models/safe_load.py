"""Reads checkpoint files without running anything that is in them."""

import argparse
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from passreid_ray.errors import UserError

# What the reference's files hold beside tensors and containers: its parsed command line and a best mAP as a numpy
# scalar (whose constructor got another module path in numpy 2). All of it is data.
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]
_ALLOWED_GLOBALS: list[Any] = [
    argparse.Namespace,
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64")),
]


def read_state(path: str | Path) -> dict[str, Any]:
    """Content of a checkpoint file, on the CPU; nothing in the file is executed.

    Reads ``.safetensors``, and everything else as a torch file restricted to tensors, containers, numbers, numpy
    scalars and ``argparse.Namespace``.

    Raises:
        UserError: no such file, not a checkpoint, or a pickle that asks for anything else; names what it asked for.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: a checkpoint is a dict of tensors; found a {type(content).__name__}")
    return content


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from error


def _read_torch(path: Path) -> object:
    try:
        with torch.serialization.safe_globals(_ALLOWED_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle stream raises whatever its opcodes stumble over
        refused = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise UserError(
                f"{path}: refused, the file was not executed: it asks for {refused[1]}, which is not plain data; "
                "if you trust it, save its tensors as .safetensors where it was made"
            ) from error
        raise UserError(f"{path}: not a readable torch checkpoint ({type(error).__name__})") from error
