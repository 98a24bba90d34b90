"""Images in zip archives, read where they lie."""

import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import pyarrow as pa

from passreid_ray.config import Section
from passreid_ray.data.archives import id_prefix, is_image_name, member_name
from passreid_ray.data.decode import BadImage
from passreid_ray.data.disk import file_or_files_below
from passreid_ray.data.rows import Rows, make_rows
from passreid_ray.data.storage import UserAddress, absolute, buffered_file, reason, shown
from passreid_ray.data.stores import read_each
from passreid_ray.errors import UserError

MAX_IMAGE_BYTES = 100_000_000
"""An entry that says it unpacks to more is refused."""

OPEN_ARCHIVES = 16
"""So many archives, with their lists of entries, a process keeps open."""

_ENCRYPTED_FLAG = 1

# An image's header and content lie together: in a bucket a buffer fetches both with one request.
_REMOTE_BUFFER_BYTES = 1 << 16
_LOCAL_BUFFER_BYTES = 1 << 13

_READ_ERRORS = (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, pa.ArrowException)


class ZipSource(Section):
    """Images in zip archives, stored or deflated; no labels."""

    kind: Literal["zip"] = "zip"
    path: UserAddress
    """One archive, or a folder whose *.zip files, at any depth, are read as one data set; s3://bucket/folder too. Image
    ids are the entries' names, after the archive's name where there are several."""


@dataclass(frozen=True)
class ZipStore:
    """Images in zip archives; a locator is ``file:name`` with ``file`` a position in ``files``.

    Each process keeps the archives, and with them their lists of entries, in memory.
    """

    root: str
    files: tuple[str, ...]

    def read(self, locator: str) -> bytes:
        file, _, name = locator.partition(":")
        archive = self.files[int(file)]
        try:
            opened = _open_archive(self.root, archive)
            entry = opened.getinfo(name)
            with opened.open(entry) as content:
                return content.read(entry.file_size)  # a size, since a broken entry may unpack to more than it says
        except KeyError:
            raise BadImage(f"cannot be read: {shown(self.root, archive)} no longer holds it") from None
        except _READ_ERRORS as error:
            raise BadImage(f"cannot be read: {shown(self.root, archive)}: {reason(error)}") from error

    def read_many(self, locators: Sequence[str]) -> list[bytes | BadImage]:
        return read_each(self.read, locators, place=self._place)

    def identity(self) -> str:
        return "\n".join(("zip", *self.files))

    def _place(self, locator: str) -> tuple[int, int]:
        file, _, name = locator.partition(":")
        try:
            return int(file), _open_archive(self.root, self.files[int(file)]).getinfo(name).header_offset
        except (KeyError, *_READ_ERRORS):
            return int(file), 0  # ``read`` says what is wrong


def read_zip(source: ZipSource) -> Rows:
    """Rows without person, camera and split; only the archives' lists of entries are read here.

    Raises ``UserError`` for an archive that is cut off or broken, and for images that are encrypted, packed by another
    method than store and deflate, larger than ``MAX_IMAGE_BYTES``, links, or outside of the archive.
    """
    root, files = file_or_files_below(source.path, [".zip"], ".zip")
    where = shown(absolute(source.path))
    image_ids: list[str] = []
    locators: list[str] = []
    for position, file in enumerate(files):
        prefix = id_prefix(file, len(files))
        for name, entry in _image_entries(root, file):
            image_ids.append(prefix + name)
            locators.append(f"{position}:{entry}")
    if not image_ids:
        raise UserError(f"{where}: no image in {len(files)} zip archives")
    return make_rows(ZipStore(root, tuple(files)), locators, where=where, image_ids=image_ids)


def _image_entries(root: str, file: str) -> Iterator[tuple[str, str]]:
    """Name to show and name in the archive, of every image."""
    archive = shown(root, file)
    try:
        entries = _open_archive(root, file).infolist()
    except _READ_ERRORS as error:
        raise UserError(f"{archive}: not a whole zip archive: {reason(error)}; copy or pack it again") from None
    for entry in entries:
        name = member_name(entry.filename, archive)
        if not entry.is_dir() and is_image_name(name):
            _check_readable(entry, archive)
            yield name, entry.filename


def _check_readable(entry: zipfile.ZipInfo, archive: str) -> None:
    what = f"{archive}: entry {entry.filename!r}"
    if entry.flag_bits & _ENCRYPTED_FLAG:
        raise UserError(f"{what} is encrypted; pack the images without a password")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"{what} is packed by method {entry.compress_type}; pack the images stored or deflated")
    if entry.file_size > MAX_IMAGE_BYTES:
        raise UserError(f"{what} unpacks to {entry.file_size} bytes; an image has at most {MAX_IMAGE_BYTES}")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise UserError(f"{what} is a link; pack the images as ordinary files")


@lru_cache(maxsize=OPEN_ARCHIVES)
def _open_archive(root: str, file: str) -> zipfile.ZipFile:
    stream = buffered_file(root, file, local_buffer_bytes=_LOCAL_BUFFER_BYTES, remote_buffer_bytes=_REMOTE_BUFFER_BYTES)
    return zipfile.ZipFile(stream)
