"""Market-1501 and what else uses its folders and file names."""

import re
from pathlib import Path
from typing import Literal

from passreid_ray.config import Section
from passreid_ray.data.disk import IMAGE_SUFFIXES, existing_folder, files_below
from passreid_ray.data.rows import Rows, make_rows
from passreid_ray.data.stores import FileStore
from passreid_ray.errors import UserError

FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}

_NAME = re.compile(r"(?P<person>-1|\d+)_c(?P<camera>\d+)(s\d+)?_[\w.]+")


class Market1501Source(Section):
    """The folders bounding_box_train, query and bounding_box_test (splits train, query, gallery) of Market-1501."""

    kind: Literal["market1501"] = "market1501"
    root: Path
    """Folder that holds the three folders; image ids are paths relative to it."""
    splits: list[Literal["train", "query", "gallery"]] | None = None
    """Keep only these splits, the other folders need not be there; none: all."""


def read_market1501(source: Market1501Source) -> Rows:
    """Rows with person and camera from names like 0002_c1s1_000451_03.jpg; person -1 is junk, 0000 a distractor."""
    root = existing_folder(source.root, "the folders of Market-1501")
    paths: list[str] = []
    splits: list[str] = []
    for split in source.splits or FOLDERS:
        folder = existing_folder(root / FOLDERS[split], f"Market-1501 images of split {split}")
        found = [f"{FOLDERS[split]}/{path}" for path in files_below(folder, IMAGE_SUFFIXES)]
        if not found:
            raise UserError(f"{folder}: no image; looked for {' '.join(IMAGE_SUFFIXES)}")
        paths += found
        splits += [split] * len(found)
    names = [_parse(root, path) for path in paths]
    return make_rows(
        FileStore(str(root)),
        paths,
        where=str(root),
        person_ids=[name["person"] for name in names],
        camera_ids=[name["camera"] for name in names],
        splits=splits,
    )


def _parse(root: Path, path: str) -> re.Match[str]:
    name = _NAME.fullmatch(Path(path).name)
    if name is None:
        raise UserError(
            f"{root / path}: Market-1501 names look like 0002_c1s1_000451_03.jpg; rename or remove this file"
        )
    return name
