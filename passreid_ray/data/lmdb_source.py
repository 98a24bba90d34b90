"""Images in an LMDB environment, as LUPerson is often kept."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any, Literal

from passreid_ray.config import Section
from passreid_ray.data.decode import BadImage, refuse_oversized
from passreid_ray.data.rows import Rows, make_rows
from passreid_ray.data.storage import UserAddress, absolute, is_remote, reason, shown
from passreid_ray.data.stores import read_each
from passreid_ray.errors import UserError

_HEX = "hex:"
"""Begins a locator whose key is not text."""

_OPENING = Lock()

_DEATHS = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)
"""What a damaged page leads to: a failed assertion, or a read outside of the file."""

_START_BYTES = 12
_WALK = f"""
import sys, lmdb
path, is_folder = sys.argv[1], sys.argv[2] == "folder"
with lmdb.open(path, subdir=is_folder, readonly=True, lock=False, readahead=False) as environment:
    with environment.begin(buffers=True) as transaction:
        for _, value in transaction.cursor():
            bytes(value[:{_START_BYTES}])
"""
"""A program that visits the pages that ``list_keys`` visits."""
_IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class LmdbSource(Section):
    """Encoded images in an LMDB environment, by key; no labels. Other values, such as counts and lists, are skipped."""

    kind: Literal["lmdb"] = "lmdb"
    path: UserAddress
    """Folder that holds data.mdb, or one file. Image ids are the keys: as text where they are, else in hexadecimal."""


@dataclass(frozen=True)
class LmdbStore:
    """Images in an LMDB environment; a locator is the key, in hexadecimal after ``hex:`` where it is not text."""

    path: str

    def read(self, locator: str) -> bytes:
        try:
            environment = _environment(self.path)
            # With buffers a value is not copied before its size is known.
            with environment.begin(buffers=True) as transaction:
                value = transaction.get(_key(locator))
                if value is None:
                    raise BadImage("cannot be read: its key is no longer in the LMDB")
                refuse_oversized(len(value))
                return bytes(value)
        except (UserError, _lmdb().Error) as error:
            raise BadImage(f"cannot be read: {error}") from error

    def read_many(self, locators: Sequence[str]) -> list[bytes | BadImage]:
        return read_each(self.read, locators, place=_key)

    def identity(self) -> str:
        return "lmdb"


@dataclass(frozen=True)
class LmdbKeys:
    """What the keys of an environment hold, in their order."""

    image_ids: list[str]
    locators: list[str]
    num_skipped: int
    """Values that are no image."""


def read_lmdb(source: LmdbSource) -> Rows:
    """Rows without person, camera and split; of the values only the first bytes are read here.

    Raises ``UserError`` when there is no LMDB, when it is cut off, damaged, empty, without an image or in a bucket,
    and when the library ``lmdb`` is not installed.
    """
    if is_remote(source.path):
        raise UserError(
            f"{shown(source.path)}: an LMDB is mapped into memory and cannot be read from a bucket; copy it to a disk, "
            "or pack its images as tar or Parquet"
        )
    path = absolute(source.path)
    keys = list_keys(path)
    if not keys.image_ids:
        found = f"none of {keys.num_skipped} values is an encoded image" if keys.num_skipped else "no key in it"
        raise UserError(f"{path}: {found}; expected an LMDB of JPEG, PNG or other encoded images, by key")
    return make_rows(LmdbStore(path), keys.locators, where=path, image_ids=keys.image_ids)


def list_keys(path: str) -> LmdbKeys:
    """Keys of the images in the environment at ``path``; a value is an image if it begins like one.

    Raises ``UserError`` when a page that must be read for that is damaged. All of them are read twice, since LMDB may
    end the process that comes upon one: first by a process that can be spared.
    """
    environment = _environment(path)
    _check_walk(path)
    try:
        return _listed(environment)
    except _lmdb().Error as error:
        raise _damaged(path, reason(error)) from None


def _listed(environment: Any) -> LmdbKeys:
    image_ids: list[str] = []
    locators: list[str] = []
    num_skipped = 0
    # With buffers a value is not copied, so that only the page of its first bytes is read from the disk.
    with environment.begin(buffers=True) as transaction:
        for key, value in transaction.cursor():
            if not begins_like_an_image(bytes(value[:_START_BYTES])):
                num_skipped += 1
                continue
            image_id, locator = _names(bytes(key))
            image_ids.append(image_id)
            locators.append(locator)
    return LmdbKeys(image_ids, locators, num_skipped)


def begins_like_an_image(start: bytes) -> bool:
    """Whether the first bytes, at least 12 of them, are those of a format that ``decode_image`` reads."""
    return start.startswith(_IMAGE_STARTS) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")


def _names(key: bytes) -> tuple[str, str]:
    """image_id and locator."""
    try:
        text = key.decode()
    except UnicodeDecodeError:
        text = ""
    if not text.isprintable() or not text:
        return key.hex(), _HEX + key.hex()
    return text, _HEX + key.hex() if text.startswith(_HEX) else text


def _key(locator: str) -> bytes:
    return bytes.fromhex(locator.removeprefix(_HEX)) if locator.startswith(_HEX) else locator.encode()


def _lmdb() -> ModuleType:
    try:
        import lmdb
    except ImportError:
        raise UserError("data.kind=lmdb: the library lmdb is not installed; run pip install lmdb") from None
    return lmdb


def _environment(path: str) -> Any:
    # Once per process, whatever its threads do: LMDB refuses, or breaks, when an environment is opened twice in one.
    with _OPENING:
        return _open_environment(path)


@lru_cache(maxsize=8)
def _open_environment(path: str) -> Any:
    lmdb = _lmdb()
    if not Path(path).exists():
        raise UserError(f"{path}: no such LMDB folder or file")
    try:
        environment = lmdb.open(path, subdir=Path(path).is_dir(), readonly=True, lock=False, readahead=False)
    except (lmdb.Error, OSError) as error:
        raise UserError(f"{path}: not an LMDB: {error}; expected a folder with data.mdb, or such a file") from None
    try:
        _check_whole(path, environment)
    except lmdb.Error as error:
        environment.close()
        raise _damaged(path, reason(error)) from None
    return environment


def _check_whole(path: str, environment: Any) -> None:
    # Reading mapped memory past the end of the file ends the process with SIGBUS.
    data = Path(path, "data.mdb") if Path(path).is_dir() else Path(path)
    needed_bytes = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    found_bytes = data.stat().st_size
    if found_bytes < needed_bytes:
        environment.close()
        raise UserError(f"{data}: cut off: {found_bytes} bytes of {needed_bytes}; copy it again")


def _check_walk(path: str) -> None:
    kind = "folder" if Path(path).is_dir() else "file"
    walk = subprocess.run([sys.executable, "-c", _WALK, path, kind], capture_output=True, check=False)
    # What it raised is told by ``list_keys``, which comes to the same page.
    if -walk.returncode in _DEATHS:
        raise _damaged(path, f"reading its keys ended a process by {signal.Signals(-walk.returncode).name}")


def _damaged(path: str, found: str) -> UserError:
    return UserError(f"{path}: damaged: {found}; copy it again")
