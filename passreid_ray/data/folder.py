"""A folder of images without labels."""

from typing import Literal

from passreid_ray.config import Section
from passreid_ray.data.disk import IMAGE_SUFFIXES, existing_root, sized_files_below
from passreid_ray.data.rows import Rows, make_rows
from passreid_ray.data.storage import UserAddress, shown
from passreid_ray.data.stores import FileStore
from passreid_ray.errors import UserError


class FolderSource(Section):
    """Every image below a folder, at any depth; hidden files are skipped."""

    kind: Literal["folder"] = "folder"
    root: UserAddress
    """Folder to search, or an address such as s3://bucket/folder; image ids are paths relative to it."""


def read_folder(source: FolderSource) -> Rows:
    """Rows without person, camera and split."""
    root = existing_root(source.root, "images")
    paths, sizes_N = sized_files_below(root, IMAGE_SUFFIXES)
    if not paths:
        raise UserError(f"{shown(root)}: no image at any depth; looked for {' '.join(IMAGE_SUFFIXES)}")
    return make_rows(FileStore(root), paths, where=shown(root), sizes_bytes=sizes_N)
