"""A folder of images with a table of labels."""

import csv
import io
from collections.abc import Iterator
from typing import Literal

import pyarrow as pa
import pyarrow.csv as pa_csv

from passreid_ray.config import Section
from passreid_ray.data.disk import existing_root, file_sizes
from passreid_ray.data.rows import Rows, make_rows
from passreid_ray.data.storage import UserAddress, read_file, reason, shown
from passreid_ray.data.stores import FileStore
from passreid_ray.errors import UserError

_TEXTS_AT_A_TIME = 65536


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
    images = columns["image"]
    if not len(images):
        raise UserError(f"{path}: no rows below the header")
    if images.null_count:
        raise UserError(f"{path}: row {images.is_null().index(True).as_py() + 1} names no image")
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
    return rows.with_sizes(file_sizes(root, _texts(rows.table["image_id"]), path))


def _read_columns(root: str, name: str) -> dict[str, pa.ChunkedArray]:
    """Columns of the table as text, null where a cell is empty."""
    path = shown(root, name)
    wrong: list[pa_csv.InvalidRow] = []

    def pass_over(row: pa_csv.InvalidRow) -> str:
        wrong.append(row)
        return "skip"

    try:
        text = read_file(root, name) + b"\n"  # else a header alone counts as an empty file
        header = next(csv.reader(io.TextIOWrapper(io.BytesIO(text), "utf-8-sig", newline="")))
        if not header:
            raise UserError(f"{path}: empty; expected a header with the column 'image'")
        table = pa_csv.read_csv(
            pa.BufferReader(text),
            read_options=pa_csv.ReadOptions(use_threads=False),  # with threads, rows have no numbers
            parse_options=pa_csv.ParseOptions(newlines_in_values=True, invalid_row_handler=pass_over),
            convert_options=pa_csv.ConvertOptions(
                column_types={column: pa.string() for column in header}, null_values=[""], strings_can_be_null=True
            ),
        )
    except FileNotFoundError:
        raise UserError(f"{path}: no such table of labels") from None
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable CSV file in UTF-8: {reason(error)}") from None
    if wrong:
        row = wrong[0]
        raise UserError(
            f"{path}: row {row.number - 1} has {row.actual_columns} cells, the header has {row.expected_columns}"
        )
    return dict(zip(table.column_names, table.columns, strict=True))


def _texts(column: pa.ChunkedArray) -> Iterator[str]:
    """The values one after another, without a list of all."""
    for first in range(0, len(column), _TEXTS_AT_A_TIME):
        yield from column.slice(first, _TEXTS_AT_A_TIME).to_pylist()
