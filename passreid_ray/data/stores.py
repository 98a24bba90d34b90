"""Where pixels lie: a store answers a row's locator with an image."""

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from passreid_ray.data.decode import BadImage, refuse_oversized
from passreid_ray.data.extension_types import refuse_extension_types
from passreid_ray.data.storage import is_remote, locate, reason, shown
from passreid_ray.errors import UserError

BUCKET_THREADS = 16
"""Requests that one ``read_many`` has under way in a bucket: nearly all of an image's time there is waiting."""


Question = TypeVar("Question")
Answer = TypeVar("Answer")


_CHECKSUM_FAILED = "CRC checksum"
"""In Arrow's message about a page whose bytes are not those that were written."""


class ImageStore(Protocol):
    """What ``Rows`` asks of a store. Stores are small and travel to workers by pickle."""

    def read(self, locator: str) -> bytes:
        """Encoded image; raises ``BadImage`` when it cannot be read."""
        ...

    def read_many(self, locators: Sequence[str]) -> list[bytes | BadImage]:
        """Encoded images in the order of ``locators``, read in the order that is cheapest; a failure is an entry."""
        ...

    def identity(self) -> str:
        """What decides the pixels besides the locators; enters the fingerprint of the rows. Never a machine's path."""
        ...


def read_each(
    read: Callable[[str], bytes],
    locators: Sequence[str],
    *,
    place: Callable[[str], Any] | None = None,
    threads: int = 1,
) -> list[bytes | BadImage]:
    """``read_many`` for a store that reads one by one: in the order of ``place``, by so many threads."""
    visits = list(range(len(locators)))
    if place is not None:
        visits.sort(key=lambda index: place(locators[index]))

    def visit(index: int) -> bytes | BadImage:
        try:
            return read(locators[index])
        except BadImage as error:
            return error

    images: list[bytes | BadImage] = [b""] * len(visits)
    for index, image in zip(visits, _answers(visit, visits, threads), strict=True):
        images[index] = image
    return images


def _answers(ask: Callable[[Question], Answer], questions: Sequence[Question], threads: int) -> list[Answer]:
    if threads == 1 or len(questions) < 2:
        return [ask(question) for question in questions]
    with ThreadPoolExecutor(min(threads, len(questions))) as pool:
        return list(pool.map(ask, questions))


def threads_for(root: str) -> int:
    """Threads that reading below ``root`` is worth."""
    return BUCKET_THREADS if is_remote(root) else 1


def is_checksum_failure(error: Exception) -> bool:
    """Whether pyarrow raised ``error`` because a Parquet page does not hold the bytes that were written."""
    return _CHECKSUM_FAILED in str(error)


def damaged_shard(root: str, name: str, part: str) -> UserError:
    """What the user is told of a packed shard when the checksum of ``part`` is not that of its bytes."""
    return UserError(
        f"{shown(root, name)}: {part} was edited or damaged since it was packed (its checksum is another); delete this "
        "shard and pack again, the others are kept"
    )


@dataclass(frozen=True)
class FileStore:
    """Image files; a locator is a path relative to ``root``, a folder or a bucket's address."""

    root: str

    def read(self, locator: str) -> bytes:
        try:
            if is_remote(self.root):
                return _read_object(self.root, locator)
            return _read_image(Path(self.root, locator))
        except (OSError, pa.ArrowException) as error:
            raise BadImage(f"cannot be read: {reason(error)}") from error

    def read_many(self, locators: Sequence[str]) -> list[bytes | BadImage]:
        return read_each(self.read, locators, threads=threads_for(self.root))

    def identity(self) -> str:
        return "files"


def _read_image(path: Path) -> bytes:
    with path.open("rb") as file:
        refuse_oversized(os.fstat(file.fileno()).st_size)
        return file.read()


def _read_object(root: str, name: str) -> bytes:
    filesystem, base = locate(root)
    # Opened with a size: S3 is asked for it in any case, so this costs no request more.
    with filesystem.open_input_file(f"{base}/{name}") as file:
        refuse_oversized(file.size())
        return file.read()


@dataclass(frozen=True)
class ParquetStore:
    """Images in a column of Parquet files; a locator is ``file:row_group:row`` with ``file`` a position in ``files``.

    Reading one row reads its whole row group, of which the last few stay in memory: visit neighbours together.
    """

    root: str
    files: tuple[str, ...]
    column: str
    packed_fingerprint: str | None = None
    """Of the content, where the files are shards with a manifest: they may not change."""

    def read(self, locator: str) -> bytes:
        image = self.read_many([locator])[0]
        if isinstance(image, BadImage):
            raise image
        return image

    def read_many(self, locators: Sequence[str]) -> list[bytes | BadImage]:
        """Each row group is read once. Raises ``UserError`` where a packed one is not what was written."""
        places_of: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        rows = []
        for place, locator in enumerate(locators):
            file, row_group, row = map(int, locator.split(":"))
            places_of[file, row_group].append(place)
            rows.append(row)

        def take(group: tuple[int, int]) -> Sequence[bytes | BadImage]:
            return self._take(*group, [rows[place] for place in places_of[group]])

        groups = sorted(places_of)
        images: list[bytes | BadImage] = [b""] * len(locators)
        for group, found in zip(groups, _answers(take, groups, threads_for(self.root)), strict=True):
            for place, image in zip(places_of[group], found, strict=True):
                images[place] = image
        return images

    def identity(self) -> str:
        return self.packed_fingerprint or "\n".join(("parquet", self.column, *self.files))

    def _take(self, file: int, row_group: int, rows: list[int]) -> Sequence[bytes | BadImage]:
        name = self.files[file]
        try:
            cells = _row_group_images(self.root, name, self.column, row_group).take(pa.array(rows)).to_pylist()
        except UserError:
            raise
        except (OSError, ValueError, pa.ArrowException) as error:  # the second from Ray's types, when they are damaged
            if self.packed_fingerprint is not None and is_checksum_failure(error):
                raise damaged_shard(self.root, name, f"row group {row_group}") from None
            return [BadImage(f"cannot be read: {shown(self.root, name)}: {reason(error)}")] * len(rows)
        return [_sized(cell or b"") for cell in cells]


def _sized(image: bytes) -> bytes | BadImage:
    try:
        refuse_oversized(len(image))
    except BadImage as error:
        return error
    return image


@lru_cache(maxsize=4)
def _row_group_images(root: str, name: str, column: str, row_group: int) -> pa.ChunkedArray:
    filesystem, base = locate(root)
    path, footer = f"{base}/{name}", _footer(root, name)
    options = {"pre_buffer": is_remote(root), "page_checksum_verification": True}
    with pq.ParquetFile(path, metadata=footer, filesystem=filesystem, **options) as file:
        refuse_extension_types(file.schema_arrow, [column], shown(root, name))  # another file since it was listed
        is_struct = pa.types.is_struct(file.schema_arrow.field(column).type)
        images = file.read_row_group(row_group, columns=[f"{column}.bytes" if is_struct else column]).column(0)
    return images.flatten()[0] if is_struct else images


@lru_cache(maxsize=64)
def _footer(root: str, name: str) -> pq.FileMetaData:
    # With small row groups, parsing the footer takes ten times as long as reading one of them.
    filesystem, base = locate(root)
    return pq.read_metadata(f"{base}/{name}", filesystem=filesystem)
