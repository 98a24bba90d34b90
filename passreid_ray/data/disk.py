"""Finding a data set's files on a disk or in a bucket."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from passreid_ray.data.storage import absolute, is_remote, locate, parent_and_name, reason, shown
from passreid_ray.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


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
    if not is_remote(root):
        return sorted(_walk(str(root), "", tuple(suffixes)))
    names = (name for name in _remote_names(str(root)) if name.lower().endswith(tuple(suffixes)))
    return sorted(name for name in names if not is_hidden(name))


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder that it lies in, has a name that starts with a dot."""
    return name.startswith(".") or "/." in name


def check_present(root: Path | str, paths: Sequence[str], source: str) -> None:
    """Raise one ``UserError`` that names the first few of the ``paths`` that are no files below ``root``."""
    if is_remote(root):
        # A bucket is listed a thousand names at a time; asking for each costs a request each.
        present = set(_remote_names(str(root)))
        missing = [path for path in paths if path not in present]
    else:
        missing = [path for path in paths if not os.path.isfile(os.path.join(root, path))]
    if missing:
        first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(f"{source}: {len(missing)} of {len(paths)} images are not below {shown(root)}: {first}")


def _file_type(address: Path | str) -> pafs.FileType:
    filesystem, path = locate(address)
    if not is_remote(address):  # names that are no valid Unicode are fine here, and pyarrow refuses them
        is_there = pafs.FileType.File if os.path.exists(path) else pafs.FileType.NotFound
        return pafs.FileType.Directory if os.path.isdir(path) else is_there
    try:
        return filesystem.get_file_info(path).type
    except (OSError, pa.ArrowException) as error:
        raise UserError(_unreachable(address, error)) from None


def _remote_names(root: str) -> Iterator[str]:
    filesystem, base = locate(root)
    try:
        entries = filesystem.get_file_info(pafs.FileSelector(base, recursive=True))
    except (OSError, pa.ArrowException) as error:
        raise UserError(_unreachable(root, error)) from None
    return (entry.path[len(base) + 1 :] for entry in entries if entry.type == pafs.FileType.File)


def _unreachable(address: Path | str, error: Exception) -> str:
    hint = "; check the address, the credentials and the network" if is_remote(address) else ""
    return f"{shown(address)}: cannot be listed: {reason(error)}{hint}"


def _walk(root: str, below: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    with os.scandir(os.path.join(root, below)) as entries:
        for entry in entries:
            path = f"{below}/{entry.name}" if below else entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(root, path, suffixes)
            elif entry.name.lower().endswith(suffixes) and entry.is_file():
                yield path
