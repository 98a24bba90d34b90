"""A folder of images with a table of labels."""

import csv
from pathlib import Path
from typing import Literal

from passreid_ray.config import Section
from passreid_ray.data.disk import check_present, existing_folder
from passreid_ray.data.rows import Rows, make_rows
from passreid_ray.data.stores import FileStore
from passreid_ray.errors import UserError


class LabelsCsvSource(Section):
    """Images listed in a CSV file with the columns image, person_id, camera_id, split; all but image may be absent."""

    kind: Literal["labels_csv"] = "labels_csv"
    root: Path
    """Folder that holds the table; its column ``image`` is relative to this folder and becomes the image_id."""
    file: str = "labels.csv"
    """Name of the table inside ``root``."""
    split_column: str = "split"
    """Column to take the split from, for tables with several divisions."""
    splits: list[str] | None = None
    """Keep only the rows of these splits; none: all."""


def read_labels_csv(source: LabelsCsvSource) -> Rows:
    """Rows of the table, after the split filter; an empty cell is an unknown value."""
    root = existing_folder(source.root, f"{source.file} and images")
    path = root / source.file
    columns = _read_columns(path)
    has_default_split = source.split_column == LabelsCsvSource.model_fields["split_column"].default
    required = ["image"] if has_default_split and source.splits is None else ["image", source.split_column]
    for name in required:
        if name not in columns:
            raise UserError(f"{path}: no column {name!r}; columns found: {', '.join(columns)}")
    if not columns["image"]:
        raise UserError(f"{path}: no rows below the header")
    if None in columns["image"]:
        raise UserError(f"{path}: row {columns['image'].index(None) + 1} names no image")
    images = [str(image) for image in columns["image"]]
    rows = make_rows(
        FileStore(str(root)),
        images,
        where=str(path),
        person_ids=columns.get("person_id"),
        camera_ids=columns.get("camera_id"),
        splits=columns.get(source.split_column),
    )
    if source.splits is not None:
        rows = rows.with_split(*source.splits, where=str(path))
    check_present(root, list(rows.image_ids), str(path))
    return rows


def _read_columns(path: Path) -> dict[str, list[str | None]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header, *records = csv.reader(file) or [[]]
    except FileNotFoundError:
        raise UserError(f"{path}: no such table of labels") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable CSV file in UTF-8: {error}") from None
    except ValueError:
        raise UserError(f"{path}: empty; expected a header with the column 'image'") from None
    records = [record for record in records if record]
    for number, record in enumerate(records, start=1):
        if len(record) != len(header):
            raise UserError(f"{path}: row {number} has {len(record)} cells, the header has {len(header)}")
    return {name: [record[i] or None for record in records] for i, name in enumerate(header)}
