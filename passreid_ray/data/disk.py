"""Finding a data set's files on a disk or in a bucket."""

import os
import stat
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
from numpy.typing import NDArray

from passreid_ray.data.storage import absolute, is_remote, locate, parent_and_name, reason, shown
from passreid_ray.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")

NUM_NAMED = 3
"""So many of the missing files are named."""

_NO_FILE = -1


def existing_folder(root: Path, what: str) -> Path:
    """``root`` as an absolute path (``~`` expanded), since workers run in other folders; ``UserError`` if not there."""
    return Path(existing_root(root, what))


def existing_root(root: Path | str, what: str) -> str:
    """A folder as an absolute path, or a bucket's address as it is; ``UserError`` if there is no folder."""
    kind = _file_type(root)
    if kind != pafs.FileType.Directory:
        found = "nothing" if kind == pafs.FileType.NotFound else "a file"
        raise UserError(f"{shown(absolute(root))}: expected a folder with {what}, found {found} there")
    return absolute(root)


def file_or_files_below(address: Path | str, suffixes: Sequence[str], what: str) -> tuple[str, list[str]]:
    """Root and names below it: of the one file at ``address``, or of the files with ``suffixes`` at any depth there.

    Raises ``UserError`` when nothing is there; ``what`` names such a file in it.
    """
    match _file_type(address):
        case pafs.FileType.NotFound:
            raise UserError(f"{shown(absolute(address))}: no such {what} file or folder")
        case pafs.FileType.Directory:
            root = absolute(address)
            names = files_below(root, suffixes)
            if not names:
                raise UserError(f"{shown(root)}: no *{suffixes[0]} file at any depth")
            return root, names
        case _:
            root, name = parent_and_name(address)
            return root, [name]


def files_below(root: Path | str, suffixes: Sequence[str]) -> list[str]:
    """Paths relative to ``root`` (with ``/``) of the files at any depth whose suffix, in any case, is in ``suffixes``.

    Hidden files and folders are skipped; linked folders are not followed.
    """
    return sorted(path for path, _ in _found(root, tuple(suffixes)))


def sized_files_below(root: Path | str, suffixes: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """The paths that ``files_below`` finds, in any order, and the files' sizes in bytes."""
    paths: list[str] = []
    sizes = array("q")
    for path, entry in _found(root, tuple(suffixes)):
        paths.append(path)
        sizes.append(_size_bytes(entry))
    return paths, np.array(sizes, np.int64)


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder that it lies in, has a name that starts with a dot."""
    return name.startswith(".") or "/." in name


def check_present(root: Path | str, paths: Iterable[str], source: str) -> None:
    """Raise one ``UserError`` that names the first few of the ``paths`` that are no files below ``root``."""
    file_sizes(root, paths, source)


def file_sizes(root: Path | str, paths: Iterable[str], source: str) -> NDArray[np.int64]:
    """Sizes in bytes of the files ``paths`` below ``root``; raises what ``check_present`` raises, and a ``UserError``
    for a path that is absolute or leads out of ``root`` by ``..``."""
    # A bucket is listed a thousand names at a time; asking for each costs a request each.
    known = {name: entry.size for name, entry in _remote_files(str(root))} if is_remote(root) else None
    sizes = array("q")
    first: list[str] = []
    for path in paths:
        if _leads_outside(path):
            raise UserError(f"{source}: {path!r} leads out of {shown(root)}; name images relative to it, without ..")
        size = _file_size(os.path.join(root, path)) if known is None else known.get(path, _NO_FILE)
        if size == _NO_FILE and len(first) < NUM_NAMED:
            first.append(path)
        sizes.append(size)
    sizes_N = np.array(sizes, np.int64)
    if first:
        num_missing = int((sizes_N == _NO_FILE).sum())
        names = ", ".join(first) + (", ..." if num_missing > NUM_NAMED else "")
        raise UserError(f"{source}: {num_missing} of {len(sizes)} images are not below {shown(root)}: {names}")
    return sizes_N


def _file_type(address: Path | str) -> pafs.FileType:
    filesystem, path = locate(address)
    if not is_remote(address):  # names that are no valid Unicode are fine here, and pyarrow refuses them
        is_there = pafs.FileType.File if os.path.exists(path) else pafs.FileType.NotFound
        return pafs.FileType.Directory if os.path.isdir(path) else is_there
    try:
        return filesystem.get_file_info(path).type
    except (OSError, pa.ArrowException) as error:
        raise UserError(_unreachable(address, error)) from None


def _remote_files(root: str) -> Iterator[tuple[str, pafs.FileInfo]]:
    filesystem, base = locate(root)
    try:
        entries = filesystem.get_file_info(pafs.FileSelector(base, recursive=True))
    except (OSError, pa.ArrowException) as error:
        raise UserError(_unreachable(root, error)) from None
    return ((entry.path[len(base) + 1 :], entry) for entry in entries if entry.type == pafs.FileType.File)


def _unreachable(address: Path | str, error: Exception) -> str:
    hint = "; check the address, the credentials and the network" if is_remote(address) else ""
    return f"{shown(address)}: cannot be listed: {reason(error)}{hint}"


def _found(root: Path | str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, "os.DirEntry[str] | pafs.FileInfo"]]:
    """What ``files_below`` promises, in any order."""
    if not is_remote(root):
        return _walk(str(root), "", suffixes)
    files = ((name, entry) for name, entry in _remote_files(str(root)) if name.lower().endswith(suffixes))
    return ((name, entry) for name, entry in files if not is_hidden(name))


def _walk(root: str, below: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, "os.DirEntry[str]"]]:
    with os.scandir(os.path.join(root, below)) as entries:
        for entry in entries:
            path = f"{below}/{entry.name}" if below else entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(root, path, suffixes)
            elif entry.name.lower().endswith(suffixes) and entry.is_file():
                yield path, entry


def _size_bytes(entry: "os.DirEntry[str] | pafs.FileInfo") -> int:
    if not isinstance(entry, os.DirEntry):
        return entry.size
    try:
        return entry.stat().st_size
    except OSError:  # went away just now: reading it will tell
        return _NO_FILE


def _leads_outside(path: str) -> bool:
    return path.startswith("/") or (".." in path and ".." in path.replace("\\", "/").split("/"))


def _file_size(path: str) -> int:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return _NO_FILE
    return status.st_size if stat.S_ISREG(status.st_mode) else _NO_FILE
