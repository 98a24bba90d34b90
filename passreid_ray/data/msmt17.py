"""MSMT17 in its two published layouts."""

import re
from pathlib import Path
from typing import Literal

from passreid_ray.config import Section
from passreid_ray.data.disk import check_present, existing_folder
from passreid_ray.data.rows import Rows, make_rows
from passreid_ray.data.stores import FileStore
from passreid_ray.errors import UserError

FOLDERS_OF_HALF = {"train": ("train", "mask_train_v2"), "test": ("test", "mask_test_v2")}
"""Image folders of version 1 and of version 2, whose faces are masked."""

HALF_OF_SPLIT = {"train": "train", "val": "train", "query": "test", "gallery": "test"}

_NAME = re.compile(r"(.*/)?(?P<person>\d+)_\d+_(?P<camera>\d+)_[^/]+")


class MSMT17Source(Section):
    """The lists list_{train,val,query,gallery}.txt of MSMT17 and the images they name."""

    kind: Literal["msmt17"] = "msmt17"
    root: Path
    """Folder that holds the lists beside train and test, or mask_train_v2 and mask_test_v2."""
    splits: list[Literal["train", "val", "query", "gallery"]] | None = None
    """Keep only these splits, the other lists need not be there; none: all. Papers train on train and val."""


def read_msmt17(source: MSMT17Source) -> Rows:
    """Rows with person and camera from names like 0000/0000_000_01_0303morning_0008_0.jpg.

    Both halves count their people from 0000, so that a person_id carries its half: ``train/0000``, ``test/0000``.
    """
    root = existing_folder(source.root, "the lists and folders of MSMT17")
    paths: list[str] = []
    persons: list[str] = []
    cameras: list[str] = []
    splits: list[str] = []
    for split in source.splits or HALF_OF_SPLIT:
        half = HALF_OF_SPLIT[split]
        folder = _folder(root, half)
        list_file = root / f"list_{split}.txt"
        listed = _read_list(list_file)
        check_present(root / folder, listed, str(list_file))
        for path in listed:
            name = _NAME.fullmatch(path)
            if name is None:
                raise UserError(f"{list_file}: names look like 0000/0000_000_01_0303morning_0008_0.jpg; found {path!r}")
            paths.append(f"{folder}/{path}")
            persons.append(f"{half}/{name['person']}")
            cameras.append(name["camera"])
            splits.append(split)
    return make_rows(
        FileStore(str(root)), paths, where=str(root), person_ids=persons, camera_ids=cameras, splits=splits
    )


def _folder(root: Path, half: str) -> str:
    for folder in FOLDERS_OF_HALF[half]:
        if (root / folder).is_dir():
            return folder
    raise UserError(f"{root}: MSMT17 has a folder {' or '.join(FOLDERS_OF_HALF[half])}; found neither")


def _read_list(list_file: Path) -> list[str]:
    try:
        lines = list_file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{list_file}: MSMT17's list of images cannot be read: {error}") from None
    paths = [line.split()[0] for line in lines if line.strip()]
    if not paths:
        raise UserError(f"{list_file}: empty; expected lines like '0000/0000_000_01_0303morning_0008_0.jpg 0'")
    return paths
