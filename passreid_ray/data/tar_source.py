"""Images in tar archives, WebDataset shards among them, read where they lie."""

import json
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, Literal, cast

import pyarrow as pa

from passreid_ray.config import Section
from passreid_ray.data.archives import id_prefix, is_image_name, member_name
from passreid_ray.data.decode import BadImage, refuse_oversized
from passreid_ray.data.disk import file_or_files_below
from passreid_ray.data.rows import Rows, make_rows
from passreid_ray.data.storage import UserAddress, absolute, buffered_file, open_file, reason, shown
from passreid_ray.data.stores import read_each, threads_for
from passreid_ray.errors import UserError

COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
COMPRESSED_STARTS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
"""First bytes of gzip, bzip2, xz and Zstandard."""

LABELS = ("person_id", "camera_id", "split")

MAX_SIDECAR_BYTES = 1_000_000
"""A larger ``.json`` is not read."""

# Headers of small members lie close together: in a bucket, reading on is cheaper than a request for each.
REMOTE_BUFFER_BYTES = 1 << 20
LOCAL_BUFFER_BYTES = 4096


class TarSource(Section):
    """Images in uncompressed tar archives; WebDataset's ``<key>.json`` beside an image gives its labels."""

    kind: Literal["tar"] = "tar"
    path: UserAddress
    """One archive, or a folder whose *.tar files, at any depth, are read as one data set; s3://bucket/folder too. Image
    ids are the members' names, after the archive's name where there are several."""
    splits: list[str] | None = None
    """Keep only the rows of these splits; none: all."""


@dataclass(frozen=True)
class TarStore:
    """Images in tar archives; a locator is ``file:offset:size`` with ``file`` a position in ``files``."""

    root: str
    files: tuple[str, ...]

    def read(self, locator: str) -> bytes:
        file, offset, size = _place(locator)
        name = self.files[file]
        refuse_oversized(size)
        try:
            data = open_file(self.root, name).read_at(size, offset)
        except (OSError, pa.ArrowException) as error:
            raise BadImage(f"cannot be read: {shown(self.root, name)}: {reason(error)}") from error
        if len(data) < size:
            raise BadImage(f"cannot be read: {shown(self.root, name)} ends at byte {offset + len(data)}")
        return data

    def read_many(self, locators: Sequence[str]) -> list[bytes | BadImage]:
        return read_each(self.read, locators, place=_place, threads=threads_for(self.root))

    def identity(self) -> str:
        return "\n".join(("tar", *self.files))


def read_tar(source: TarSource) -> Rows:
    """Rows of all archives, whose headers and sidecars are read here.

    A sidecar is a JSON object with person_id, camera_id or split, as text or whole numbers; all else in it is ignored,
    and so is a ``.json`` that holds something else than an object or belongs to no image. Raises ``UserError`` for an
    archive that is compressed, cut off or broken, for members that are links, devices, sparse or lie outside of the
    archive, and for an image's sidecar that is no JSON, holds other labels or is larger than ``MAX_SIDECAR_BYTES``.
    An image larger than ``MAX_IMAGE_BYTES`` is a row whose image is bad.
    """
    root, files = file_or_files_below(source.path, [".tar", *COMPRESSED_SUFFIXES], ".tar")
    where = shown(absolute(source.path))
    with ThreadPoolExecutor(threads_for(root)) as pool:
        images = [image for found in pool.map(partial(_images, root), files) for image in found]
    if not images:
        raise UserError(f"{where}: no image in {len(files)} tar archives")
    position_of = {file: position for position, file in enumerate(files)}
    rows = make_rows(
        TarStore(root, tuple(files)),
        [f"{position_of[image.file]}:{image.offset}:{image.size}" for image in images],
        where=where,
        image_ids=[id_prefix(image.file, len(files)) + image.name for image in images],
        person_ids=[image.labels.get("person_id") for image in images],
        camera_ids=[image.labels.get("camera_id") for image in images],
        splits=[image.labels.get("split") for image in images],
    )
    return rows if source.splits is None else rows.with_split(*source.splits, where=where)


@dataclass(frozen=True, slots=True)
class _Image:
    file: str
    name: str
    offset: int
    size: int
    labels: dict[str, str | None]


def _images(root: str, file: str) -> list[_Image]:
    """The images of one archive with the labels that their sidecars give them."""
    archive = shown(root, file)
    members: list[tuple[str, int, int]] = []
    labels_of: dict[str, dict[str, str | None]] = {}
    faults: dict[str, UserError] = {}
    try:
        with buffered_file(
            root, file, local_buffer_bytes=LOCAL_BUFFER_BYTES, remote_buffer_bytes=REMOTE_BUFFER_BYTES
        ) as stream:
            _check_uncompressed(stream, archive)
            for member in _members(stream, archive):
                name = member_name(member.name, archive)
                if is_image_name(name):
                    members.append((name, member.offset_data, member.size))
                elif name.endswith(".json"):
                    try:
                        labels_of[_key(name)] = _labels(_sidecar(stream, member, archive), f"{archive}: {name}")
                    except UserError as error:
                        faults.setdefault(_key(name), error)
    except tarfile.TarError as error:
        raise UserError(f"{archive}: not a whole tar archive: {error}; copy or pack it again") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{archive}: cannot be read: {reason(error)}") from None
    # Only now is it known which .json lies beside an image; the others are none of ours.
    for name, _, _ in members if faults else []:
        if (fault := faults.get(_key(name))) is not None:
            raise fault
    unknown: dict[str, str | None] = {}
    return [_Image(file, name, offset, size, labels_of.get(_key(name), unknown)) for name, offset, size in members]


def _members(stream: BinaryIO, archive: str) -> Iterator[tarfile.TarInfo]:
    """The files in the archive; folders are passed over, all else is refused."""
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        while (member := tar.next()) is not None:
            if tar.offset <= member.offset:  # a negative size, which would lead round in a circle
                raise tarfile.ReadError(f"the size of member {member.name!r} is below zero")
            cast(Any, tar).members.clear()  # else millions of headers stay in memory
            if member.issparse() or not (member.isfile() or member.isdir()):
                kind = "sparse" if member.issparse() else "a link" if member.issym() or member.islnk() else "a device"
                raise UserError(f"{archive}: member {member.name!r} is {kind}; pack the images as ordinary files")
            if member.isfile():
                yield member
        # tarfile takes a header that it cannot read for the end; the real one is a block of zeros.
        stream.seek(tar.offset)
        block = stream.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"cut off at byte {tar.offset + len(block)}, without an end mark")
        if any(block):
            raise tarfile.ReadError(f"no header at byte {tar.offset}")


def _check_uncompressed(stream: BinaryIO, archive: str) -> None:
    start = stream.read(max(map(len, COMPRESSED_STARTS)))
    if start.startswith(COMPRESSED_STARTS):
        raise UserError(f"{archive}: compressed, so that no image can be read by itself; decompress it to a .tar file")
    stream.seek(0)


def _sidecar(stream: BinaryIO, member: tarfile.TarInfo, archive: str) -> bytes:
    if member.size > MAX_SIDECAR_BYTES:
        raise UserError(
            f"{archive}: {member.name} has {member.size} bytes; an image's labels have at most {MAX_SIDECAR_BYTES}; "
            f"keep {', '.join(LABELS)} in a .json of their own, or give the other file another suffix"
        )
    stream.seek(member.offset_data)
    return stream.read(member.size)


def _labels(text: bytes, where: str) -> dict[str, str | None]:
    """Labels that a sidecar gives; none where it holds a list, a number or a text, which are not ours."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        return {}
    return {name: _label(values[name], f"{where}: {name}") for name in LABELS if name in values}


def _label(value: Any, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"{where}: expected text or a whole number, found {value!r}")


def _key(name: str) -> str:
    """WebDataset's key: everything before the first dot of the last part of the name."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _place(locator: str) -> tuple[int, int, int]:
    file, offset, size = map(int, locator.split(":"))
    return file, offset, size
