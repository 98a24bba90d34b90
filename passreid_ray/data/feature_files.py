"""Features of rows as Parquet: written shard by shard, each whole or not at all, and read again by anyone.

Columns: ``image_id``, ``feature`` (fixed-size list of float32; null where the image could not be used) and ``reason``
(why it could not; else null).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from passreid_ray.data.extension_types import refuse_extension_types
from passreid_ray.data.storage import locate
from passreid_ray.errors import UserError

SHARD_ROWS = 8192
MIN_SHARDS = 16
"""So many that several processes find work in small data too."""
SUFFIX = ".parquet"
OPTIONAL_COLUMNS = ("person_id", "camera_id")
READ_COLUMNS = ("image_id", "feature", "reason", *OPTIONAL_COLUMNS)


@dataclass(frozen=True)
class Features:
    """Features by image_id."""

    image_ids: NDArray[np.object_]
    features_ND: NDArray[np.float32]
    """NaN where there is no feature."""
    usable_N: NDArray[np.bool_]
    """Rows that have a feature; one that is not finite is no reason to have none."""
    reasons: dict[str, str]
    """image_id -> why the image could not be used."""
    person_ids: NDArray[np.object_] | None = None
    camera_ids: NDArray[np.object_] | None = None


@dataclass(frozen=True)
class FeatureFiles:
    """Shards of rows below ``address``, a folder or an address such as s3://bucket/features."""

    address: str
    num_rows: int

    def shards(self) -> list[slice]:
        """Rows of every shard."""
        size = max(1, min(SHARD_ROWS, -(-self.num_rows // MIN_SHARDS)))
        return [slice(first, min(first + size, self.num_rows)) for first in range(0, self.num_rows, size)]

    def missing(self) -> list[slice]:
        """Rows of the shards that are not written yet."""
        filesystem, root = locate(self.address)
        entries = filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True))
        written = {entry.base_name for entry in entries}
        return [rows for rows in self.shards() if self._name(rows) not in written]

    def write(
        self,
        rows: slice,
        image_ids: Sequence[str],
        features_RD: NDArray[np.float32],
        reasons: Sequence[str | None],
    ) -> None:
        """Write the shard of ``rows``; readers see all of it or nothing."""
        filesystem, root = locate(self.address)
        filesystem.create_dir(root, recursive=True)
        values = pa.array(np.ascontiguousarray(features_RD, np.float32).ravel())
        unusable = pa.array([reason is not None for reason in reasons])
        features = pa.FixedSizeListArray.from_arrays(values, features_RD.shape[1], mask=unusable)
        table = pa.table({"image_id": list(image_ids), "feature": features, "reason": pa.array(reasons, pa.string())})
        path = f"{root}/{self._name(rows)}"
        pq.write_table(table, f"{path}.part", filesystem=filesystem)
        filesystem.move(f"{path}.part", path)

    def read(self) -> Features:
        """All shards, in the order of their rows."""
        return read_features(self.address, keep_order=True)

    def delete(self) -> None:
        """Delete all shards."""
        filesystem, root = locate(self.address)
        filesystem.delete_dir(root)

    def _name(self, rows: slice) -> str:
        return f"rows_{rows.start:010d}_{rows.stop:010d}{SUFFIX}"


def read_features(address: str, *, keep_order: bool = False) -> Features:
    """Features of a Parquet file or of all ``*.parquet`` files of a folder, in the order of image_id.

    With ``keep_order`` they stay as the files, in the order of their names, have them.

    Reads ``image_id``, ``feature`` (a list of numbers) and, where they exist, ``reason``, ``person_id`` and
    ``camera_id``. Raises ``UserError`` when columns are missing, ids are repeated or widths differ.
    """
    filesystem, root = locate(address)
    info = filesystem.get_file_info(root)
    if info.type == pafs.FileType.NotFound:
        raise UserError(f"{address}: no such feature file or folder")
    paths = [root]
    if info.type == pafs.FileType.Directory:
        entries = filesystem.get_file_info(pafs.FileSelector(root))
        paths = sorted(entry.path for entry in entries if entry.path.endswith(SUFFIX))
    if not paths:
        raise UserError(f"{address}: no *{SUFFIX} file in it")
    table = pa.concat_tables([_read_table(filesystem, path) for path in paths])
    if not len(table):
        raise UserError(f"{address}: no row in it")
    image_ids = table["image_id"].to_numpy()
    usable_N = table["feature"].is_valid().to_numpy()
    features_ND = _matrix(table["feature"], address)
    columns = {name: table[name].to_numpy() for name in ("reason", *OPTIONAL_COLUMNS) if name in table.column_names}
    ordered_ids = image_ids
    if not (image_ids[1:] > image_ids[:-1]).all():
        order = np.argsort(image_ids, kind="stable")
        ordered_ids = image_ids[order]
        if not keep_order:
            image_ids, features_ND, usable_N = ordered_ids, features_ND[order], usable_N[order]
            columns = {name: values[order] for name, values in columns.items()}
    repeated = np.flatnonzero(ordered_ids[1:] == ordered_ids[:-1])
    if len(repeated):
        example = ordered_ids[repeated[0]]
        raise UserError(
            f"{address}: {len(repeated)} image ids are not unique, such as {example!r}; give each row its own"
        )
    reasons = columns.get("reason", np.full(len(image_ids), None))
    return Features(
        image_ids,
        features_ND,
        usable_N,
        {str(image_ids[i]): reasons[i] for i in np.flatnonzero([reason is not None for reason in reasons])},
        columns.get("person_id"),
        columns.get("camera_id"),
    )


def _read_table(filesystem: pafs.FileSystem, path: str) -> pa.Table:
    try:
        with filesystem.open_input_file(path) as stream, pq.ParquetFile(stream) as file:
            names = file.schema_arrow.names
            missing = [name for name in ("image_id", "feature") if name not in names]
            if missing:
                raise UserError(f"{path}: no column {missing[0]!r}; columns found: {', '.join(names)}")
            columns = [name for name in names if name in READ_COLUMNS]
            refuse_extension_types(file.schema_arrow, columns, path)
            kind = file.schema_arrow.field("feature").type
            if not _holds_numbers(kind):
                raise UserError(f"{path}: column 'feature' is {kind}; expected a list of numbers in every row")
            table = file.read(columns=columns)
    except UserError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:  # the second from Ray's types, when they are damaged
        raise UserError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None
    texts = [name for name in ("image_id", *OPTIONAL_COLUMNS) if name in table.column_names]
    for name in texts:
        table = table.set_column(table.column_names.index(name), name, pc.cast(table[name], pa.string()))
    return table


def _holds_numbers(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind)
    return is_list and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))


def _matrix(column: pa.ChunkedArray, address: str) -> NDArray[np.float32]:
    """Features of every row, NaN where there is none; ``UserError`` when they are not of one width."""
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    is_known = [chunk.is_valid().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    widths = sorted({int(width) for chunk in column.chunks for width in np.unique(_lengths(chunk))})
    if len(widths) != 1:
        found = ", ".join(map(str, widths)) or "nothing"
        raise UserError(f"{address}: features are {found} wide; they must all be of one model")
    features_ND = np.full((len(column), widths[0]), np.nan, np.float32)
    first = 0
    for values, known in zip(parts, is_known, strict=True):
        features_ND[first : first + len(known)][known] = values.reshape(-1, widths[0])
        first += len(known)
    return features_ND


def _lengths(chunk: pa.Array) -> NDArray[np.int64]:
    """Numbers in every row that is not null."""
    if isinstance(chunk, pa.FixedSizeListArray):
        return np.full(1, chunk.type.list_size)
    known = chunk.is_valid().to_numpy(zero_copy_only=False)
    return np.diff(chunk.offsets.to_numpy())[known]
