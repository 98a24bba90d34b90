"""Rows of a data set: which images there are, who and which camera they show, and where their pixels lie."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from passreid_ray.data.decode import BadImage, decode_image
from passreid_ray.data.stores import ImageStore, ParquetStore
from passreid_ray.errors import UserError

SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        ("person_id", pa.string()),
        ("camera_id", pa.string()),
        ("split", pa.string()),
        pa.field("store", pa.int32(), nullable=False),
        pa.field("locator", pa.string(), nullable=False),
    ]
)

SIZES = pa.field("size_bytes", pa.int64())
"""Column beside those of ``SCHEMA``, where it is known without reading them how large the encoded images are."""

GROUP_ROWS = 128
"""Rows of a row group where this project writes it, and of a run of neighbours where there are no row groups."""

JUNK_PERSON_ID = "-1"
"""Boxes that count neither as a match nor as a mistake (Market-1501's convention)."""


@dataclass(frozen=True)
class Rows:
    """Rows of a data set without their pixels; small enough to send to workers.

    A source opens them in the order of image_id, or, where neighbours are read together, in that of its files; joined
    sources follow one another. Rows know each other by their number here, so the order is part of the fingerprint.
    """

    table: pa.Table
    """Columns of ``SCHEMA``; person_id, camera_id and split may be null. ``store`` is a position in ``stores``. Where
    sizes are known also ``SIZES``, null for images whose size is not."""
    stores: tuple[ImageStore, ...]

    def __len__(self) -> int:
        return self.table.num_rows

    def __reduce__(self) -> tuple[type["Rows"], tuple[pa.Table, tuple[ImageStore, ...]]]:
        return Rows, (self.table, self.stores)  # the cached columns below stay behind

    @cached_property
    def image_ids(self) -> np.ndarray:
        """``(N,)`` object array of strings."""
        return self._column("image_id")

    @cached_property
    def person_ids(self) -> np.ndarray:
        """``(N,)`` object array of strings, None where unknown."""
        return self._column("person_id")

    @cached_property
    def camera_ids(self) -> np.ndarray:
        """``(N,)`` object array of strings, None where unknown."""
        return self._column("camera_id")

    @cached_property
    def splits(self) -> np.ndarray:
        """``(N,)`` object array of strings, None where there is no split."""
        return self._column("split")

    def image_bytes(self, index: int) -> bytes:
        """Encoded image of a row; raises ``BadImage`` when it cannot be read."""
        store = self.stores[self.table["store"][index].as_py()]
        return store.read(self.table["locator"][index].as_py())

    def image(self, index: int) -> np.ndarray:
        """Pixels of a row, ``(H, W, 3)`` uint8 RGB; raises ``BadImage``."""
        return decode_image(self.image_bytes(index))

    def read_many(self, indices: Sequence[int] | np.ndarray) -> list[bytes | BadImage]:
        """Encoded images of many rows, or why one cannot be read; what lies together is read together."""
        places = self.table.select(["store", "locator"]).take(pa.array(indices))
        locators, stores_N = places["locator"].to_numpy(), places["store"].to_numpy()
        images: list[bytes | BadImage] = [b""] * len(locators)
        for store in np.unique(stores_N):
            own = np.flatnonzero(stores_N == store)
            for place, image in zip(own, self.stores[store].read_many(locators[own].tolist()), strict=True):
                images[place] = image
        return images

    @property
    def reads_in_groups(self) -> bool:
        """Whether reading one image reads its neighbours too, so that they are best read together."""
        return any(isinstance(store, ParquetStore) for store in self.stores)

    @cached_property
    def group_starts(self) -> np.ndarray:
        """First row of every run of rows that lie together: in Parquet files a row group, else ``GROUP_ROWS`` rows."""
        if not self.reads_in_groups:
            return np.arange(0, len(self), GROUP_ROWS)
        row_number = pc.ReplaceSubstringOptions(r":\d+$", "")
        groups = pc.call_function("replace_substring_regex", [self.table["locator"]], row_number).to_numpy()
        stores_N = self.table["store"].to_numpy()
        begins = (groups[1:] != groups[:-1]) | (stores_N[1:] != stores_N[:-1])
        return np.concatenate([[0], 1 + np.flatnonzero(begins)])

    def select(self, indices: Sequence[int] | np.ndarray) -> "Rows":
        """The rows at ``indices``, in their order; ``indices`` may be a boolean mask."""
        indices = np.asarray(indices)
        chosen = np.flatnonzero(indices) if indices.dtype == bool else indices.astype(np.int64)
        return Rows(self.table.take(pa.array(chosen)), self.stores)

    def with_split(self, *names: str, where: str = "data") -> "Rows":
        """The rows of the splits ``names``; raises ``UserError`` with the splits found when one of them has no row.

        ``where`` names the data set in the error.
        """
        splits = self.table["split"]
        found = sorted(splits.unique().drop_null().to_pylist())
        missing = [name for name in names if name not in found]
        if missing:
            raise UserError(f"{where}: no image has split {missing[0]!r}; splits found: {', '.join(found) or 'none'}")
        return Rows(self.table.filter(pc.field("split").isin(names)), self.stores)

    def with_sizes(self, sizes_bytes: Sequence[int] | np.ndarray) -> "Rows":
        """These rows, with the sizes of their encoded images."""
        return Rows(self.table.append_column(SIZES, pa.array(sizes_bytes, SIZES.type)), self.stores)

    def fingerprint(self) -> str:
        """Short hex digest of all rows and of what decides their pixels; the same wherever the files lie.

        No image is read for it. Packed shards enter with the digest of their content, images in zip archives with
        their sizes and CRC-32, in tar archives with their places and sizes, files of a folder or of a table of labels
        with their sizes. Beyond that, other images under the same names are the same data, and where no size is known
        (the known data sets, LMDB, Parquet files that are not packed) names and labels alone tell data apart. Times of
        change never enter, since a copy is the same data.
        """
        digest = hashlib.sha256(json.dumps([store.identity() for store in self.stores]).encode())
        known = [*SCHEMA.names, SIZES.name] if SIZES.name in self.table.column_names else SCHEMA.names
        for column in self.table.select(known).columns:
            _hash_column(digest, column)
        return digest.hexdigest()[:16]

    def _column(self, name: str) -> np.ndarray:
        return self.table[name].to_numpy()


def _hash_column(digest: Any, column: pa.ChunkedArray) -> None:
    """Add all values of a column, and where each ends; how they are chunked or sliced makes no difference."""
    if pa.types.is_integer(column.type):
        digest.update(pc.fill_null(column, -1).to_numpy().tobytes())
        return
    digest.update(pc.fill_null(pc.call_function("binary_length", [column]), -1).to_numpy().tobytes())
    for chunk in pc.fill_null(column, "").chunks:
        offsets = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset :][: len(chunk) + 1]
        digest.update(memoryview(chunk.buffers()[2] or b"")[offsets[0] : offsets[-1]])


def make_rows(
    store: ImageStore,
    locators: Sequence[str] | pa.ChunkedArray,
    *,
    where: str,
    image_ids: Sequence[str] | pa.ChunkedArray | None = None,
    person_ids: Sequence[str | None] | pa.ChunkedArray | None = None,
    camera_ids: Sequence[str | None] | pa.ChunkedArray | None = None,
    splits: Sequence[str | None] | pa.ChunkedArray | None = None,
    sizes_bytes: Sequence[int] | np.ndarray | None = None,
) -> Rows:
    """Rows of one store; ``where`` names the data set in errors, ``image_ids`` default to the locators.

    ``sizes_bytes`` are those of the encoded images, where they are known; they enter the fingerprint. Millions of rows
    are better given as Arrow's strings, which take a fraction of the memory.

    Raises ``UserError`` when two rows share an image_id or a name is not valid Unicode.
    """
    texts = {
        "image_id": locators if image_ids is None else image_ids,
        "person_id": person_ids,
        "camera_id": camera_ids,
        "split": splits,
        "locator": locators,
    }
    unknown = pa.nulls(len(locators), pa.string())
    columns = {name: unknown if values is None else strings(values, where) for name, values in texts.items()}
    columns["store"] = pa.array(np.zeros(len(locators), np.int32))
    table = pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)
    if sizes_bytes is not None:
        table = table.append_column(SIZES, pa.array(sizes_bytes, SIZES.type))
    return ordered_rows(table, (store,), where=where)


def strings(values: Sequence[str | None] | pa.ChunkedArray, where: str) -> pa.Array | pa.ChunkedArray:
    """``values`` as a column of strings; raises ``UserError`` for one that is not valid Unicode."""
    if isinstance(values, pa.ChunkedArray):
        return values
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {error.object!r} is not a valid Unicode name; rename it") from None


def join_rows(sources: Sequence[Rows]) -> Rows:
    """All rows of several sources, source after source, each in its own order.

    With more than one, ids get the prefix ``<position>:`` so that none can collide. The junk label is not an identity
    and stays as it is.
    """
    if len(sources) == 1:
        return sources[0]
    tables: list[pa.Table] = []
    stores: tuple[ImageStore, ...] = ()
    for position, rows in enumerate(sources):
        table = rows.table
        changed = {
            "image_id": _prefixed(position, table["image_id"]),
            "person_id": _prefixed(position, table["person_id"], keep=JUNK_PERSON_ID),
            "camera_id": _prefixed(position, table["camera_id"], keep=JUNK_PERSON_ID),
            "store": pc.call_function("add", [table["store"], pa.scalar(len(stores), pa.int32())]),
        }
        for name, column in changed.items():
            place = table.schema.get_field_index(name)
            table = table.set_column(place, table.schema.field(place), column)
        tables.append(table)
        stores += rows.stores
    joined = pa.concat_tables(tables, promote_options="default")  # with nulls where a source knows no sizes
    return Rows(joined.combine_chunks(), stores)


def _prefixed(position: int, values: pa.ChunkedArray, keep: str | None = None) -> pa.ChunkedArray:
    prefixed = pc.call_function("binary_join_element_wise", [pa.scalar(f"{position}:"), values, pa.scalar("")])
    if keep is None:
        return prefixed
    return pc.call_function("if_else", [pc.call_function("equal", [values, pa.scalar(keep)]), values, prefixed])


def ordered_rows(table: pa.Table, stores: tuple[ImageStore, ...], *, where: str, keep_order: bool = False) -> Rows:
    """Rows of a table, in the order of image_id or, with ``keep_order``, as given.

    The table has the columns of ``SCHEMA`` and, maybe, ``SIZES``. A source keeps the order of its files where
    neighbours are read together: sorted by id, they would lie apart. Raises ``UserError`` when two rows share an
    image_id.
    """
    if not _is_ascending(table["image_id"]):  # else each id comes once, and sorting would change nothing
        _check_unique(table["image_id"], where)
        table = table if keep_order else table.sort_by("image_id")
    return Rows(table.combine_chunks(), stores)


def _is_ascending(ids: pa.ChunkedArray) -> bool:
    """Whether each id is above the one before."""
    if len(ids) < 2:
        return True
    return pc.call_function("all", [pc.call_function("less", [ids[:-1], ids[1:]])]).as_py()


def _check_unique(ids: pa.ChunkedArray, where: str) -> None:
    counts = ids.value_counts()
    repeated = np.flatnonzero(counts.field("counts").to_numpy() > 1)
    if len(repeated):
        example = counts.field("values")[repeated[0]].as_py()
        raise UserError(
            f"{where}: {len(repeated)} image ids are not unique, such as {example!r}; give each row its own"
        )
