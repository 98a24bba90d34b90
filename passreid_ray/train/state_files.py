"""A checkpoint on disk: ``state.safetensors`` beside ``state.json``, whole or not at all.

``state.json`` is written last and holds the size and SHA-256 of the tensors' file, so a checkpoint that was cut short
or edited is told at once. No pickle is ever read or written.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from passreid_ray.errors import UserError

TENSORS_FILE = "state.safetensors"
META_FILE = "state.json"
FOLDER_PREFIX = "step_"


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` steps; names sort by step."""
    return f"{FOLDER_PREFIX}{step:08d}"


def save_state(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write ``tensors`` and JSON-able ``meta`` into ``folder``; raises ``UserError`` when it cannot be written."""
    path = folder / TENSORS_FILE
    # safetensors refuses tensors that share memory; clones of views are cheap beside the write.
    contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / META_FILE).unlink(missing_ok=True)  # no longer whole, until it is written anew
        save_file(contiguous, path)
        record = {"format": 1, "bytes": path.stat().st_size, "sha256": _sha256(path), **meta}
        draft = folder / f"{META_FILE}.part"
        draft.write_text(json.dumps(record, indent=1), encoding="utf-8")
        os.replace(draft, folder / META_FILE)
    except (OSError, SafetensorError) as error:  # the second wraps a full disk
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{folder}: the checkpoint cannot be written: {reason}") from None


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, meta) of a checkpoint folder; raises ``UserError`` when it is missing, cut short or was edited."""
    meta = read_meta(folder)
    path = folder / TENSORS_FILE
    check_size(meta, path.stat().st_size if path.is_file() else 0, str(folder))
    if _sha256(path) != meta["sha256"]:
        raise UserError(f"{path}: damaged: its SHA-256 is not the one in {META_FILE}; {_advice(folder)}")
    try:
        return load_file(path), meta
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error}); {_advice(folder)}") from None


def read_meta(folder: Path) -> dict[str, Any]:
    """What ``save_state`` was given as ``meta``, with the size and checksum of the tensors' file."""
    path = folder / META_FILE
    if not path.is_file():
        raise UserError(f"{folder}: not a checkpoint of this project: no {META_FILE} in it")
    return parse_meta(path.read_bytes(), str(folder))


def parse_meta(content: bytes, folder: str) -> dict[str, Any]:
    """What the ``content`` of a description says; ``UserError`` with the checkpoint's ``folder`` when it is damaged."""
    try:
        meta = json.loads(content)
    except ValueError as error:
        raise UserError(f"{folder}/{META_FILE}: damaged: not valid JSON ({error}); {_advice(folder)}") from None
    if not isinstance(meta, dict) or not {"format", "bytes", "sha256"} <= meta.keys():
        raise UserError(
            f"{folder}/{META_FILE}: damaged: keys 'format', 'bytes' and 'sha256' expected; {_advice(folder)}"
        )
    return meta


def check_size(meta: Mapping[str, Any], found: int, folder: str) -> None:
    """Raise ``UserError`` when the tensors' file of a checkpoint does not have the size that ``meta`` tells."""
    if found != meta["bytes"]:
        raise UserError(
            f"{folder}/{TENSORS_FILE}: cut short: expected {meta['bytes']} bytes, found {found}; {_advice(folder)}"
        )


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder behind ``path``: itself, or the newest whole one of a run folder."""
    if (path / META_FILE).is_file():
        return path
    candidates = sorted(path.glob(f"{FOLDER_PREFIX}*"), reverse=True)
    found = next((folder for folder in candidates if (folder / META_FILE).is_file()), None)
    if found is None:
        raise UserError(f"{path}: no checkpoint found; expected a run folder with {FOLDER_PREFIX}*/{META_FILE}")
    return found


def tensors_below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def require_same_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    """Raise ``UserError`` unless both have the same names and shapes; ``where`` names what was read."""
    for name in sorted(expected.keys() ^ found.keys()):
        has = "has no" if name in expected else "has an unexpected"
        raise UserError(f"{where} {has} tensor {name!r}: the checkpoint is of another model; use another run name")
    for name, value in expected.items():
        if value.shape != found[name].shape:
            raise UserError(
                f"{where}: {name} is {tuple(found[name].shape)}, expected {tuple(value.shape)}: "
                "the checkpoint is of another model; use another run name"
            )


def _advice(folder: Path | str) -> str:
    return f"delete {folder} to go on from the checkpoint before it"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
