"""Images packed into Parquet files."""

from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from passreid_ray.config import Section
from passreid_ray.data.disk import file_or_files_below
from passreid_ray.data.extension_types import only_field, refuse_extension_types
from passreid_ray.data.packed import check_shards, read_manifest
from passreid_ray.data.rows import SCHEMA, Rows, ordered_rows
from passreid_ray.data.storage import UserAddress, absolute, locate, reason, shown
from passreid_ray.data.stores import ParquetStore, damaged_shard, is_checksum_failure
from passreid_ray.errors import UserError


class ParquetSource(Section):
    """Parquet files with one encoded image per row; person, camera and split columns are taken where they exist."""

    kind: Literal["parquet"] = "parquet"
    path: UserAddress
    """One file, or a folder whose *.parquet files, at any depth, are read as one data set; s3://bucket/folder too."""
    image_column: str = "image"
    """Column of encoded images: binary, or a struct with a binary field ``bytes``."""
    image_id_column: str = "image_id"
    """Column of unique keys."""
    person_id_column: str = "person_id"
    """Column of identities."""
    camera_id_column: str = "camera_id"
    """Column of cameras."""
    split_column: str = "split"
    """Column of splits."""
    splits: list[str] | None = None
    """Keep only the rows of these splits; none: all."""


def read_parquet(source: ParquetSource) -> Rows:
    """Rows of all files in their order; only the label columns are read here, images when they are asked for.

    Raises ``UserError`` for files without the columns, and for packed shards that are not as their manifest says
    or whose labels are not as they were packed.
    """
    where = shown(absolute(source.path))
    filesystem, base = locate(absolute(source.path))
    manifest = read_manifest(filesystem, base)
    if manifest is None:
        root, files = file_or_files_below(source.path, [".parquet"], "Parquet")
    else:
        check_shards(manifest, filesystem, base)
        root, files = absolute(source.path), [shard.file for shard in manifest.shards]
    tables = [
        _read_rows(root, name, position, source, is_packed=manifest is not None) for position, name in enumerate(files)
    ]
    table = pa.concat_tables(tables)
    if not len(table):
        raise UserError(f"{where}: no row in {len(files)} Parquet files")
    fingerprint = None if manifest is None else manifest.fingerprint
    store = ParquetStore(root, tuple(files), source.image_column, fingerprint)
    rows = ordered_rows(table, (store,), where=where, keep_order=True)
    return rows if source.splits is None else rows.with_split(*source.splits, where=where)


def _read_rows(root: str, name: str, position: int, source: ParquetSource, *, is_packed: bool) -> pa.Table:
    column_of = {
        "image_id": source.image_id_column,
        "person_id": source.person_id_column,
        "camera_id": source.camera_id_column,
        "split": source.split_column,
    }
    filesystem, base = locate(root)
    path = shown(root, name)
    try:
        with pq.ParquetFile(f"{base}/{name}", filesystem=filesystem, page_checksum_verification=True) as file:
            _check_columns(path, file.schema_arrow, source)
            known = [column for column in column_of.values() if column in file.schema_arrow.names]
            refuse_extension_types(file.schema_arrow, known, path)
            labels = file.read(columns=known)
            group_sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    except UserError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:  # the second from Ray's types, when they are damaged
        if is_packed and is_checksum_failure(error):
            raise damaged_shard(root, name, "a column of labels") from None
        raise UserError(f"{path}: not a readable Parquet file: {reason(error)}") from None
    columns: dict[str, object] = {
        name: pc.cast(labels[column], pa.string()) if column in known else pa.nulls(len(labels), pa.string())
        for name, column in column_of.items()
    }
    columns["store"] = np.zeros(len(labels), np.int32)
    columns["locator"] = [f"{position}:{group}:{row}" for group, size in enumerate(group_sizes) for row in range(size)]
    if labels[source.image_id_column].null_count:
        raise UserError(f"{path}: column {source.image_id_column!r} holds nulls; every row needs an id")
    return pa.table(columns, schema=SCHEMA)


def _check_columns(path: str, schema: pa.Schema, source: ParquetSource) -> None:
    for name in (source.image_column, source.image_id_column):
        if name not in schema.names:
            raise UserError(f"{path}: no column {name!r}; columns found: {', '.join(schema.names)}")
    image_type = only_field(schema, source.image_column, path).type
    if not _holds_bytes(image_type):
        raise UserError(
            f"{path}: column {source.image_column!r} is {image_type}; expected encoded images as binary or as a struct "
            "with a binary field 'bytes'"
        )


def _holds_bytes(type_: pa.DataType) -> bool:
    if pa.types.is_struct(type_):
        fields = [field.type for field in type_.fields if field.name == "bytes"]
        return len(fields) == 1 and not pa.types.is_struct(fields[0]) and _holds_bytes(fields[0])
    return pa.types.is_binary(type_) or pa.types.is_large_binary(type_)
