"""Images in zip archives, read where they lie."""

import stat
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import pyarrow as pa

from passreid_ray.config import Section
from passreid_ray.data.archives import id_prefix, is_image_name, member_name
from passreid_ray.data.decode import BadImage, refuse_oversized
from passreid_ray.data.disk import file_or_files_below
from passreid_ray.data.rows import Rows, make_rows, strings
from passreid_ray.data.storage import UserAddress, absolute, buffered_file, open_file, reason, shown
from passreid_ray.data.stores import read_each, threads_for
from passreid_ray.errors import UserError

_ENCRYPTED_FLAG = 1

_HEADER = struct.Struct("<4s22xHH")
"""Of an entry, before its name, its extra field and its content: the signature, and the lengths of these two."""
_HEADER_SIGNATURE = b"PK\x03\x04"
_NAME_AND_EXTRA_BYTES = 512
"""So much is read with the content, so that one request is enough for all but odd entries."""

# The list of entries lies together at the end of an archive.
_REMOTE_BUFFER_BYTES = 1 << 20
_LOCAL_BUFFER_BYTES = 1 << 13

_OPEN_ERRORS = (OSError, zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, pa.ArrowException)


class ZipSource(Section):
    """Images in zip archives, stored or deflated; no labels."""

    kind: Literal["zip"] = "zip"
    path: UserAddress
    """One archive, or a folder whose *.zip files, at any depth, are read as one data set; s3://bucket/folder too. Image
    ids are the entries' names, after the archive's name where there are several."""


class _Place(NamedTuple):
    """A locator of ``ZipStore``, taken apart."""

    file: int
    offset: int
    """Of the entry's header."""
    packed_bytes: int
    size_bytes: int
    method: int
    crc: int


@dataclass(frozen=True)
class ZipStore:
    """Images in zip archives; a locator is ``file:offset:packed_bytes:size_bytes:method:crc``, ``file`` a position in
    ``files`` and the rest as the archive's list of entries has it, which no process keeps.
    """

    root: str
    files: tuple[str, ...]

    def read(self, locator: str) -> bytes:
        place = _place(locator)
        name = self.files[place.file]
        refuse_oversized(max(place.packed_bytes, place.size_bytes))
        try:
            image = _unpacked(self._packed(name, place), place)
        except (OSError, OverflowError, zlib.error, pa.ArrowException) as error:
            raise BadImage(f"cannot be read: {shown(self.root, name)}: {reason(error)}") from error
        if image is None:
            raise BadImage(
                f"cannot be read: {shown(self.root, name)}: the entry at byte {place.offset} is damaged or was "
                "replaced (its size or CRC-32 is another)"
            )
        return image

    def read_many(self, locators: Sequence[str]) -> list[bytes | BadImage]:
        return read_each(self.read, locators, place=_place, threads=threads_for(self.root))

    def identity(self) -> str:
        return "\n".join(("zip", *self.files))

    def _packed(self, name: str, place: _Place) -> bytes:
        """Content of an entry as it is packed. Raises ``BadImage`` where no entry begins."""
        file = open_file(self.root, name)
        start = file.read_at(_HEADER.size + _NAME_AND_EXTRA_BYTES + place.packed_bytes, place.offset)
        signature, name_bytes, extra_bytes = _HEADER.unpack(start[: _HEADER.size].ljust(_HEADER.size, b"\0"))
        if signature != _HEADER_SIGNATURE:
            raise BadImage(f"cannot be read: {shown(self.root, name)} no longer has an entry at byte {place.offset}")
        # The list at the end has an extra field of its own: only the header says where the content begins.
        first = _HEADER.size + name_bytes + extra_bytes
        if first > _HEADER.size + _NAME_AND_EXTRA_BYTES:
            return file.read_at(place.packed_bytes, place.offset + first)
        return start[first : first + place.packed_bytes]


def read_zip(source: ZipSource) -> Rows:
    """Rows without person, camera and split; only the archives' lists of entries are read here.

    Raises ``UserError`` for an archive that is cut off or broken, and for images that are encrypted, packed by another
    method than store and deflate, links, or outside of the archive. An image larger than ``MAX_IMAGE_BYTES``, packed or
    not, is a row whose image is bad.
    """
    root, files = file_or_files_below(source.path, [".zip"], ".zip")
    where = shown(absolute(source.path))
    image_ids: list[pa.Array | pa.ChunkedArray] = []
    locators: list[pa.Array | pa.ChunkedArray] = []
    for position, file in enumerate(files):
        # As Arrow's strings, archive after archive: Python's would take several times the memory.
        entries = _image_entries(root, file, position, id_prefix(file, len(files)))
        image_ids.append(strings([image_id for image_id, _ in entries], where))
        locators.append(strings([locator for _, locator in entries], where))
    if not any(map(len, image_ids)):
        raise UserError(f"{where}: no image in {len(files)} zip archives")
    return make_rows(
        ZipStore(root, tuple(files)), pa.chunked_array(locators), where=where, image_ids=pa.chunked_array(image_ids)
    )


def _image_entries(root: str, file: str, position: int, prefix: str) -> list[tuple[str, str]]:
    """image_id and locator of every image in an archive."""
    archive = shown(root, file)
    try:
        with (
            buffered_file(
                root, file, local_buffer_bytes=_LOCAL_BUFFER_BYTES, remote_buffer_bytes=_REMOTE_BUFFER_BYTES
            ) as stream,
            zipfile.ZipFile(stream) as opened,
        ):
            entries = opened.infolist()
    except _OPEN_ERRORS as error:
        raise UserError(f"{archive}: not a whole zip archive: {reason(error)}; copy or pack it again") from None
    found: list[tuple[str, str]] = []
    for entry in entries:
        name = member_name(entry.filename, archive)
        if not entry.is_dir() and is_image_name(name):
            _check_readable(entry, archive)
            found.append((prefix + name, _locator(position, entry)))
    return found


def _check_readable(entry: zipfile.ZipInfo, archive: str) -> None:
    what = f"{archive}: entry {entry.filename!r}"
    if entry.flag_bits & _ENCRYPTED_FLAG:
        raise UserError(f"{what} is encrypted; pack the images without a password")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"{what} is packed by method {entry.compress_type}; pack the images stored or deflated")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise UserError(f"{what} is a link; pack the images as ordinary files")


def _locator(position: int, entry: zipfile.ZipInfo) -> str:
    place = _Place(position, entry.header_offset, entry.compress_size, entry.file_size, entry.compress_type, entry.CRC)
    return ":".join(map(str, place))


def _place(locator: str) -> _Place:
    return _Place(*map(int, locator.split(":")))


def _unpacked(packed: bytes, place: _Place) -> bytes | None:
    """The image; None when its size or CRC-32 is not as the archive's list says."""
    image = packed
    if place.method == zipfile.ZIP_DEFLATED:
        # One byte more than it should have, since a broken entry may unpack to gigabytes.
        image = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, place.size_bytes + 1)
    return image if len(image) == place.size_bytes and zlib.crc32(image) == place.crc else None
