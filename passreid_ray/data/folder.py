"""A folder of images without labels."""

from pathlib import Path
from typing import Literal

from passreid_ray.config import Section
from passreid_ray.data.disk import IMAGE_SUFFIXES, existing_folder, files_below
from passreid_ray.data.rows import Rows, make_rows
from passreid_ray.data.stores import FileStore
from passreid_ray.errors import UserError


class FolderSource(Section):
    """Every image below a folder, at any depth; hidden files are skipped."""

    kind: Literal["folder"] = "folder"
    root: Path
    """Folder to search; image ids are paths relative to it."""


def read_folder(source: FolderSource) -> Rows:
    """Rows without person, camera and split."""
    root = existing_folder(source.root, "images")
    paths = files_below(root, IMAGE_SUFFIXES)
    if not paths:
        raise UserError(f"{root}: no image at any depth; looked for {' '.join(IMAGE_SUFFIXES)}")
    return make_rows(FileStore(str(root)), paths, where=str(root))
