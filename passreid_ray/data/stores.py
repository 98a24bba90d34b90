"""Where pixels lie: a store answers a row's locator with an image."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from passreid_ray.data.decode import BadImage, decode_image


class ImageStore(Protocol):
    """What ``Rows`` asks of a store. Stores are small and travel to workers by pickle."""

    def read(self, locator: str) -> bytes:
        """Encoded image; raises ``BadImage`` when it cannot be read."""
        ...

    def pixels(self, locator: str) -> np.ndarray:
        """Decoded image, ``(H, W, 3)`` uint8 RGB; raises ``BadImage``."""
        ...

    def identity(self) -> str:
        """What decides the pixels besides the locators; enters the fingerprint of the rows. Never a machine's path."""
        ...


@dataclass(frozen=True)
class FileStore:
    """Image files; a locator is a path relative to ``root``."""

    root: str

    def read(self, locator: str) -> bytes:
        try:
            return Path(self.root, locator).read_bytes()
        except OSError as error:
            raise BadImage(f"cannot be read: {error}") from error

    def pixels(self, locator: str) -> np.ndarray:
        return decode_image(self.read(locator))

    def identity(self) -> str:
        return "files"


@dataclass(frozen=True)
class ParquetStore:
    """Images in a column of Parquet files; a locator is ``file:row_group:row`` with ``file`` a position in ``files``.

    Reading one row reads its whole row group, of which the last few stay in memory: visit neighbours together.
    """

    root: str
    files: tuple[str, ...]
    column: str

    def read(self, locator: str) -> bytes:
        file, row_group, row = map(int, locator.split(":"))
        path = Path(self.root, self.files[file])
        try:
            cell = _row_group_images(str(path), self.column, row_group)[row].as_py()
        except (OSError, pa.ArrowException) as error:
            raise BadImage(f"cannot be read: {path}: {error}") from error
        return (cell["bytes"] if isinstance(cell, dict) else cell) or b""

    def pixels(self, locator: str) -> np.ndarray:
        return decode_image(self.read(locator))

    def identity(self) -> str:
        return "\n".join(("parquet", self.column, *self.files))


@lru_cache(maxsize=4)
def _row_group_images(path: str, column: str, row_group: int) -> pa.ChunkedArray:
    with pq.ParquetFile(path) as file:
        is_struct = pa.types.is_struct(file.schema_arrow.field(column).type)
        return file.read_row_group(row_group, columns=[f"{column}.bytes" if is_struct else column]).column(0)
