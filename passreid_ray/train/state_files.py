"""A checkpoint on disk: ``state.safetensors`` beside ``state.json``, whole or not at all.

``state.json`` is written last and holds the size and SHA-256 of the tensors' file, and a SHA-256 of all else that it
says, so a checkpoint that was cut short or edited is told at once. No pickle is ever read or written. A state of which
each worker holds pieces is in one file per worker (``sharded_files``); it is read like any other.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from passreid_ray.errors import UserError

TENSORS_SUFFIX = ".safetensors"
TENSORS_FILE = f"state{TENSORS_SUFFIX}"
META_FILE = "state.json"
FOLDER_PREFIX = "step_"
FORMAT = 2
DIGEST = "description_sha256"
"""Key of the checksum of all else in the description; descriptions older than it have none."""


class DamagedCheckpoint(UserError):
    """A checkpoint that is not as it was written; ``folder`` tells which, ``reason`` how that is known."""

    def __init__(self, reason: str, folder: Path | str) -> None:
        super().__init__(reason, str(folder))  # both: an exception goes between processes as its arguments
        self.reason = reason
        self.folder = str(folder)

    def __str__(self) -> str:
        return f"{self.reason}; delete {self.folder} to go on from the checkpoint before it"


class UnwrittenCheckpoint(UserError):
    """A checkpoint that could not be written, mostly because a disk is full: a later one may succeed."""


class FileRecord(TypedDict):
    """What tells a file from one that was cut short or edited."""

    bytes: int
    sha256: str


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after ``step`` steps; names sort by step."""
    return f"{FOLDER_PREFIX}{step:08d}"


def step_of(name: str) -> int:
    """The step in the name of a checkpoint."""
    return int(name.removeprefix(FOLDER_PREFIX))


def save_state(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write ``tensors`` and JSON-able ``meta`` into ``folder``; ``UnwrittenCheckpoint`` when it cannot be written."""
    invalidate(folder)
    write_meta(folder, {TENSORS_FILE: write_tensors(folder, TENSORS_FILE, tensors)}, meta)


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, meta) of a checkpoint folder; raises ``UserError`` when it is missing, cut short or was edited.

    The last two as ``DamagedCheckpoint``.
    """
    meta = read_meta(folder)
    files = [_load_tensors(folder, name, record) for name, record in meta["files"].items()]
    # Pieces are given up as they are joined: a large state is not held twice.
    joined = {name: torch.cat([file.pop(name) for file in files], dim=dim) for name, dim in meta["sharded"].items()}
    return joined | {name: value for file in files for name, value in file.items()}, meta


def invalidate(folder: Path) -> None:
    """Make ``folder``, or make the checkpoint in it one that is not whole, until it has been written anew."""
    with _told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / META_FILE).unlink(missing_ok=True)
        for file in folder.glob(f"state*{TENSORS_SUFFIX}"):  # another number of workers wrote files of other names
            file.unlink()


def write_tensors(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write the file ``name`` of a checkpoint and return what tells it from a damaged one."""
    # safetensors refuses tensors that share memory; clones of views are cheap beside the write.
    contiguous = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    with _told(folder):
        save_file(contiguous, folder / name)
        return FileRecord(bytes=(folder / name).stat().st_size, sha256=_sha256(folder / name))


def write_meta(
    folder: Path, files: Mapping[str, FileRecord], meta: Mapping[str, Any], sharded: Mapping[str, int] | None = None
) -> None:
    """Write the description that makes a checkpoint whole; ``sharded``: dimension along which files hold pieces."""
    record = {"format": FORMAT, "files": dict(files), "sharded": dict(sharded or {}), **meta}
    record = json.loads(json.dumps(record))  # as it will be read
    draft = folder / f"{META_FILE}.part"
    with _told(folder):
        draft.write_text(json.dumps({**record, DIGEST: _digest(record)}, indent=1), encoding="utf-8")
        os.replace(draft, folder / META_FILE)


def _load_tensors(folder: Path, name: str, record: FileRecord) -> dict[str, Tensor]:
    path = folder / name
    check_size(record, path.stat().st_size if path.is_file() else 0, str(path))
    if _sha256(path) != record["sha256"]:
        raise DamagedCheckpoint(f"{path}: damaged: its SHA-256 is not the one in {META_FILE}", folder)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DamagedCheckpoint(f"{path}: not a safetensors file ({error})", folder) from None


def read_meta(folder: Path) -> dict[str, Any]:
    """What ``save_state`` was given as ``meta``, with the size and checksum of the tensors' file."""
    path = folder / META_FILE
    if not path.is_file():
        raise UserError(f"{folder}: not a checkpoint of this project: no {META_FILE} in it")
    return parse_meta(path.read_bytes(), str(folder))


def parse_meta(content: bytes, folder: str) -> dict[str, Any]:
    """What the ``content`` of a description says; raises ``UserError`` with the checkpoint's ``folder``.

    ``DamagedCheckpoint`` when it is not as it was written.
    """
    try:
        meta = json.loads(content)
    except (ValueError, RecursionError) as error:  # the second from lists in lists in lists
        raise DamagedCheckpoint(f"{folder}/{META_FILE}: damaged: not valid JSON ({error})", folder) from None
    if isinstance(meta, dict) and (digest := meta.pop(DIGEST, None)) is not None and digest != _digest(meta):
        raise DamagedCheckpoint(f"{folder}/{META_FILE}: damaged: its SHA-256 is not the one in it", folder)
    if isinstance(meta, dict) and {"bytes", "sha256"} <= meta.keys():  # format 1: one file, not named
        own = FileRecord(bytes=meta.pop("bytes"), sha256=meta.pop("sha256"))
        meta |= {"format": FORMAT, "files": {TENSORS_FILE: own}, "sharded": {}}
    sections = [meta.get(key) for key in ("files", "sharded")] if isinstance(meta, dict) else []
    if not sections or "format" not in meta or not all(isinstance(section, dict) for section in sections):
        raise DamagedCheckpoint(f"{folder}/{META_FILE}: damaged: keys 'format', 'files' and 'sharded' expected", folder)
    if meta["format"] != FORMAT:
        raise UserError(f"{folder}: of format {meta['format']!r}, this version reads {FORMAT} and older: update it")
    # Names come from a file: none may lead out of the folder.
    if any(not re.fullmatch(r"state[0-9a-z-]*\.safetensors", name) for name in meta["files"]):
        reason = f"{folder}/{META_FILE}: damaged: names of files expected such as {TENSORS_FILE}"
        raise DamagedCheckpoint(reason, folder)
    if not all(map(_is_record, meta["files"].values())):
        reason = f"{folder}/{META_FILE}: damaged: 'bytes' and 'sha256' expected of every file"
        raise DamagedCheckpoint(reason, folder)
    if not all(type(dim) is int for dim in meta["sharded"].values()):
        reason = f"{folder}/{META_FILE}: damaged: a dimension expected of every tensor in 'sharded'"
        raise DamagedCheckpoint(reason, folder)
    return meta


def check_size(record: FileRecord, found: int, path: str) -> None:
    """Raise ``DamagedCheckpoint`` when the file at ``path`` does not have the size that its ``record`` tells."""
    if found != record["bytes"]:
        folder = path.rpartition("/")[0]
        raise DamagedCheckpoint(f"{path}: cut short: expected {record['bytes']} bytes, found {found}", folder)


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


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:  # the second wraps a full disk
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UnwrittenCheckpoint(f"{folder}: the checkpoint cannot be written: {reason}") from None


def _is_record(record: object) -> bool:
    match record:
        case {"bytes": int(), "sha256": str()}:
            return True
        case _:
            return False


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
