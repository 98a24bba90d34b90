"""Rows of a data set: which images there are, who and which camera they show, and where their pixels lie."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from passreid_ray.data.stores import ImageStore
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

JUNK_PERSON_ID = "-1"
"""Boxes that count neither as a match nor as a mistake (Market-1501's convention)."""


@dataclass(frozen=True)
class Rows:
    """Rows of a data set without their pixels, opened in the order of image_id; small enough to be pickled to workers."""

    table: pa.Table
    """Columns of ``SCHEMA``; person_id, camera_id and split may be null. ``store`` is a position in ``stores``."""
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
        store, locator = self._place(index)
        return store.read(locator)

    def image(self, index: int) -> np.ndarray:
        """Pixels of a row, ``(H, W, 3)`` uint8 RGB; raises ``BadImage``."""
        store, locator = self._place(index)
        return store.pixels(locator)

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
        return self.select(pc.is_in(splits, pa.array(names, pa.string())).to_numpy())

    def fingerprint(self) -> str:
        """Short hex digest of all rows and of what decides their pixels; the same wherever the files lie."""
        digest = hashlib.sha256()
        for store in self.stores:
            digest.update(store.identity().encode() + b"\0")
        for name in self.table.column_names:
            column = self.table[name].combine_chunks()
            digest.update(np.asarray(column.is_null()).tobytes())
            if name == "store":
                digest.update(column.to_numpy().tobytes())
                continue
            column = column.fill_null("")
            digest.update(pc.binary_length(column).to_numpy().tobytes())
            digest.update(pc.binary_join(pa.LargeListArray.from_arrays([0, len(column)], column), "")[0].as_buffer())
        return digest.hexdigest()[:16]

    def _column(self, name: str) -> np.ndarray:
        return self.table[name].to_numpy()

    def _place(self, index: int) -> tuple[ImageStore, str]:
        return self.stores[self.table["store"][index].as_py()], self.table["locator"][index].as_py()


def make_rows(
    store: ImageStore,
    locators: Sequence[str],
    *,
    where: str,
    image_ids: Sequence[str] | None = None,
    person_ids: Sequence[str | None] | None = None,
    camera_ids: Sequence[str | None] | None = None,
    splits: Sequence[str | None] | None = None,
) -> Rows:
    """Rows of one store; ``where`` names the data set in errors, ``image_ids`` default to the locators.

    Raises ``UserError`` when two rows share an image_id or a name is not valid Unicode.
    """
    unknown = [None] * len(locators)
    columns = {
        "image_id": locators if image_ids is None else image_ids,
        "person_id": unknown if person_ids is None else person_ids,
        "camera_id": unknown if camera_ids is None else camera_ids,
        "split": unknown if splits is None else splits,
        "store": np.zeros(len(locators), np.int32),
        "locator": locators,
    }
    try:
        table = pa.table(columns, schema=SCHEMA)
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {error.object!r} is not a valid Unicode name; rename it") from None
    return ordered_rows(table, (store,), where=where)


def join_rows(sources: Sequence[Rows]) -> Rows:
    """All rows of several sources; with more than one, ids get the prefix ``<position>:`` so that none can collide.

    The junk label is not an identity and stays as it is.
    """
    if len(sources) == 1:
        return sources[0]
    tables, stores = [], []
    for position, rows in enumerate(sources):
        table = rows.table
        for name in ("image_id", "person_id", "camera_id"):
            prefixed = pc.binary_join_element_wise(str(position), table[name], ":")
            if name == "person_id":
                prefixed = pc.if_else(pc.equal(table[name], JUNK_PERSON_ID), table[name], prefixed)
            table = table.set_column(SCHEMA.get_field_index(name), SCHEMA.field(name), prefixed)
        shifted = pc.add(table["store"], pa.scalar(len(stores), pa.int32()))
        tables.append(table.set_column(SCHEMA.get_field_index("store"), SCHEMA.field("store"), shifted))
        stores += rows.stores
    return ordered_rows(pa.concat_tables(tables), tuple(stores), where="joined")


def ordered_rows(table: pa.Table, stores: tuple[ImageStore, ...], *, where: str) -> Rows:
    """Rows of a table with the columns of ``SCHEMA``; raises ``UserError`` when two rows share an image_id."""
    table = table.sort_by("image_id").combine_chunks()
    ids = table["image_id"]
    repeated = ids.slice(1).filter(pc.equal(ids.slice(1), ids.slice(0, max(len(ids) - 1, 0))))
    if len(repeated):
        example = repeated[0].as_py()
        raise UserError(f"{where}: {len(repeated)} rows repeat an image_id, such as {example!r}; give each row its own")
    return Rows(table, stores)
