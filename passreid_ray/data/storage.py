"""Folders and buckets by one kind of address."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Annotated, BinaryIO, cast

import pyarrow as pa
import pyarrow.fs as pafs
from pydantic import BeforeValidator

from passreid_ray.config.credentials import refuse_credentials
from passreid_ray.errors import UserError

_TRAILING_SLASHES = re.compile(r"(?<=[^:/])/+$")

_OPEN_FILES = 64
"""So many files, at most, a process keeps open to read parts of them."""


def is_remote(address: str | Path) -> bool:
    """Whether ``address`` is a bucket's, such as s3://bucket/folder, and not a folder."""
    return "://" in str(address)


def _user_address(value: object) -> object:
    refuse_credentials(value)
    return Path(value).expanduser() if isinstance(value, str) and not is_remote(value) else value


UserAddress = Annotated[Path | str, BeforeValidator(_user_address)]
"""A path, in which ``~`` is the home folder, or an address such as s3://bucket/folder, which stays text.

An address that holds credentials is refused.
"""


def locate(address: str | Path) -> tuple[pafs.FileSystem, str]:
    """File system and path of a folder or of an address such as s3://bucket/folder; opened once per process.

    An address is read as pyarrow reads it: s3:// and gs://, credentials from the environment, and options such as
    ``?region=...&endpoint_override=host%3Aport&scheme=http``. Raises ``UserError`` for one that it cannot read.
    """
    if not is_remote(address):
        return pafs.LocalFileSystem(), str(Path(address).expanduser().resolve())
    try:
        filesystem, path = _locate_remote(str(address))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{shown(address)}: no address that can be opened: {reason(error)}") from None
    if not path:
        raise UserError(f"{shown(address)}: names no bucket; expected an address such as s3://bucket/folder")
    return filesystem, path


def absolute(address: str | Path) -> str:
    """``address`` as it means the same in every working folder; that of a bucket as it is."""
    return str(address) if is_remote(address) else locate(address)[1]


def shown(address: str | Path, name: str = "") -> str:
    """``address``, or the file ``name`` below it, for people to read: without options."""
    text = str(address)
    if is_remote(text):
        text = _TRAILING_SLASHES.sub("", text.partition("?")[0])
    return f"{text}/{name}" if name else text


def reason(error: Exception) -> str:
    """First line of what ``error`` says."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def explained(address: str | Path) -> Iterator[None]:
    """Raises what a disk, a bucket or the network refuses meanwhile as a ``UserError`` with ``address`` and reason."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        hint = "; check the address, the credentials and the network" if is_remote(address) else ""
        raise UserError(f"{shown(address)}: cannot be read: {reason(error)}{hint}") from None


def address_of(filesystem: pafs.FileSystem, path: str) -> str:
    """What ``locate`` made ``path`` from, for people to read: without options."""
    match filesystem.type_name:
        case "local":
            return path
        case "gcs":
            return f"gs://{path}"
        case scheme:
            return f"{scheme}://{path}"


def below(address: str | Path, name: str) -> str:
    """Address of ``name`` below ``address``; options stay at the end."""
    if not is_remote(address):
        return f"{address}/{name}"
    place, mark, options = str(address).partition("?")
    return _TRAILING_SLASHES.sub("", place) + f"/{name}{mark}{options}"


def parent_and_name(address: str | Path) -> tuple[str, str]:
    """A file's address as that of its folder and the name in it; options stay with the folder."""
    name = locate(address)[1].rpartition("/")[2]
    if not is_remote(address):
        return str(Path(locate(address)[1]).parent), name
    place, mark, options = str(address).partition("?")
    return place.rstrip("/").rpartition("/")[0] + mark + options, name


def read_file(root: str, name: str) -> bytes:
    """Whole content of the file ``name`` below ``root``; raises what pyarrow raises, mostly ``OSError``."""
    filesystem, base = locate(root)
    with filesystem.open_input_stream(f"{base}/{name}") as file:
        return file.read()


@lru_cache(maxsize=_OPEN_FILES)
def open_file(root: str, name: str) -> pa.NativeFile:
    """The file ``name`` below ``root``, kept open by this process; threads may share its ``read_at``."""
    filesystem, base = locate(root)
    return filesystem.open_input_file(f"{base}/{name}")


def buffered_file(root: str, name: str, *, local_buffer_bytes: int, remote_buffer_bytes: int) -> BinaryIO:
    """The file ``name`` below ``root`` as a seekable file of its own.

    A bucket answers every read with a request, so that the buffer decides how many there are.
    """
    filesystem, base = locate(root)
    file = filesystem.open_input_file(f"{base}/{name}")
    buffer_bytes = remote_buffer_bytes if is_remote(root) else local_buffer_bytes
    return io.BufferedReader(cast(io.RawIOBase, file), buffer_bytes)


@lru_cache(maxsize=64)
def _locate_remote(address: str) -> tuple[pafs.FileSystem, str]:
    filesystem, path = pafs.FileSystem.from_uri(address)
    return filesystem, _TRAILING_SLASHES.sub("", path)
