"""Finding a data set's files on disk."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from passreid_ray.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def existing_folder(root: Path, what: str) -> Path:
    """``root`` as an absolute path (``~`` expanded), since workers run in other folders; ``UserError`` if not there."""
    path = root.expanduser().resolve()
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise UserError(f"{path}: expected a folder with {what}, found {found} there")
    return path


def files_below(root: Path, suffixes: Sequence[str]) -> list[str]:
    """Paths relative to ``root`` (with ``/``) of the files at any depth whose suffix, in any case, is in ``suffixes``.

    Hidden files and folders are skipped; linked folders are not followed.
    """
    return sorted(_walk(str(root), "", tuple(suffixes)))


def check_present(root: Path, paths: Sequence[str], source: str) -> None:
    """Raise one ``UserError`` that names the first few of the ``paths`` that are no files below ``root``."""
    missing = [path for path in paths if not os.path.isfile(os.path.join(root, path))]
    if missing:
        first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(f"{source}: {len(missing)} of {len(paths)} images are not below {root}: {first}")


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
