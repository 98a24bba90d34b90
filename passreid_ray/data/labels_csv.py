"""A folder of images with a table of labels."""

import csv
import io
from typing import Literal

import pyarrow as pa

from passreid_ray.config import Section
from passreid_ray.data.disk import check_present, existing_root
from passreid_ray.data.rows import Rows, make_rows
from passreid_ray.data.storage import UserAddress, read_file, reason, shown
from passreid_ray.data.stores import FileStore
from passreid_ray.errors import UserError


class LabelsCsvSource(Section):
    """Images listed in a CSV file with the columns image, person_id, camera_id, split; all but image may be absent."""

    kind: Literal["labels_csv"] = "labels_csv"
    root: UserAddress
    """Folder, or address such as s3://bucket/folder, that holds the table; its column ``image`` is relative to it and
    becomes the image_id."""
    file: str = "labels.csv"
    """Name of the table inside ``root``."""
    split_column: str = "split"
    """Column to take the split from, for tables with several divisions."""
    splits: list[str] | None = None
    """Keep only the rows of these splits; none: all."""


def read_labels_csv(source: LabelsCsvSource) -> Rows:
    """Rows of the table, after the split filter; an empty cell is an unknown value."""
    root = existing_root(source.root, f"{source.file} and images")
    path = shown(root, source.file)
    columns = _read_columns(root, source.file)
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
        FileStore(root),
        images,
        where=path,
        person_ids=columns.get("person_id"),
        camera_ids=columns.get("camera_id"),
        splits=columns.get(source.split_column),
    )
    if source.splits is not None:
        rows = rows.with_split(*source.splits, where=path)
    check_present(root, list(rows.image_ids), path)
    return rows


def _read_columns(root: str, name: str) -> dict[str, list[str | None]]:
    path = shown(root, name)
    try:
        text = read_file(root, name).decode("utf-8-sig")
        header, *records = csv.reader(io.StringIO(text, newline=""))
    except FileNotFoundError:
        raise UserError(f"{path}: no such table of labels") from None
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable CSV file in UTF-8: {reason(error)}") from None
    except ValueError:
        raise UserError(f"{path}: empty; expected a header with the column 'image'") from None
    records = [record for record in records if record]
    for number, record in enumerate(records, start=1):
        if len(record) != len(header):
            raise UserError(f"{path}: row {number} has {len(record)} cells, the header has {len(header)}")
    return {name: [record[i] or None for record in records] for i, name in enumerate(header)}
