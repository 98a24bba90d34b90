"""The folder that shards are packed into: marked with what it is for, and how far it is."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from passreid_ray.data.manifest import CLAIM_FILE, MANIFEST_FILE, Sidecar, parse_sidecar
from passreid_ray.data.packed import DRAFT, read_file, shard_name, sidecar_name, write_whole
from passreid_ray.data.storage import absolute, locate, shown
from passreid_ray.errors import UserError

READ_THREADS = 16
ADVICE = "give another output, or delete that folder"


@dataclass(frozen=True)
class PackFolder:
    """Where the shards of one data set with one set of settings go."""

    filesystem: pafs.FileSystem
    root: str
    address: str
    """What ``locate`` takes in any working folder."""
    settings: str
    """Digest of the data and the settings."""

    def path(self, name: str) -> str:
        """Path of a file in it."""
        return f"{self.root}/{name}"

    def read(self, name: str) -> bytes | None:
        """Content of a small file in it; None when it is not there."""
        is_there = self.filesystem.get_file_info(self.path(name)).type == pafs.FileType.File
        return read_file(self.filesystem, self.path(name)) if is_there else None

    def write(self, name: str, content: bytes) -> None:
        """Write a small file; readers see all of it or what was there before."""
        write_whole(self.filesystem, self.path(name), content)

    def whole_shards(self, num_shards: int) -> dict[int, Sidecar]:
        """Sidecars, by number, of the shards that are there in the size that was written."""
        sizes = {entry.base_name: entry.size for entry in _entries(self.filesystem, self.root)}
        numbers = [number for number in range(num_shards) if sidecar_name(number) in sizes]
        with ThreadPoolExecutor(READ_THREADS) as pool:  # a bucket answers slowly
            contents = list(pool.map(lambda number: self.read(sidecar_name(number)), numbers))
        return {
            number: sidecar
            for number, content in zip(numbers, contents, strict=True)
            if content is not None
            and (sidecar := parse_sidecar(content)) is not None
            and sidecar.settings == self.settings
            and sidecar.shard.file == shard_name(number)
            and sizes.get(sidecar.shard.file) == sidecar.shard.bytes
        }

    def finished(self, num_shards: int) -> dict[int, Sidecar]:
        """``whole_shards``; unless these are all, the manifest is removed: it is the mark of a whole data set."""
        sidecars = self.whole_shards(num_shards)
        manifest = self.path(MANIFEST_FILE)
        if len(sidecars) < num_shards and self.filesystem.get_file_info(manifest).type == pafs.FileType.File:
            self.filesystem.delete_file(manifest)
        return sidecars


def pack_folder(address: Path | str, fingerprint: str, settings: dict[str, Any]) -> PackFolder:
    """The folder at ``address`` for the data with this fingerprint, packed with these settings; nothing is touched."""
    text = json.dumps(_claim_content(fingerprint, settings), sort_keys=True)
    return PackFolder(*locate(address), absolute(address), hashlib.sha256(text.encode()).hexdigest()[:16])


def claim(address: Path | str, fingerprint: str, settings: dict[str, Any]) -> PackFolder:
    """The folder at ``address``, marked as that of the data with this fingerprint, packed with these settings.

    Removes what a killed run left half written. Raises ``UserError`` when the folder is of other data or settings or
    holds something else, ``OSError`` when it cannot be written.
    """
    folder = pack_folder(address, fingerprint, settings)
    content = _claim_content(fingerprint, settings)
    folder.filesystem.create_dir(folder.root, recursive=True)
    names = [entry.base_name for entry in _entries(folder.filesystem, folder.root)]
    drafts = [name for name in names if DRAFT.fullmatch(name)]
    known = folder.read(CLAIM_FILE)
    if known is not None:
        _check_claim(known, content, shown(address))
    elif len(names) > len(drafts):
        raise UserError(f"output: {shown(address)} is not empty and holds no {CLAIM_FILE}; give another output")
    for name in drafts:
        folder.filesystem.delete_file(folder.path(name))
    # Written again when it is there: a folder that cannot be written shows now, not after the first shard.
    folder.write(CLAIM_FILE, json.dumps(content, indent=1).encode())
    return folder


def _claim_content(fingerprint: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {"format": 1, "fingerprint": fingerprint, "settings": settings}


def _entries(filesystem: pafs.FileSystem, root: str) -> list[pafs.FileInfo]:
    return filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True))


def _check_claim(known: bytes, content: dict[str, Any], where: str) -> None:
    try:
        found = json.loads(known)
        old_settings, old_fingerprint = dict(found["settings"]), found["fingerprint"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"output: {where}/{CLAIM_FILE} is damaged; {ADVICE}") from None
    settings, fingerprint = content["settings"], content["fingerprint"]
    for key in sorted(settings.keys() | old_settings.keys()):
        old, new = old_settings.get(key), settings.get(key)
        if old != new:
            raise UserError(f"output: {where} was packed with {key} = {old!r}, now it is {new!r}; {ADVICE}")
    if old_fingerprint != fingerprint:
        raise UserError(
            f"output: {where} was packed from other data (fingerprint {old_fingerprint}, now {fingerprint}); {ADVICE}"
        )
