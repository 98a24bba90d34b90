"""Folders and buckets by one kind of address."""

from pathlib import Path

import pyarrow.fs as pafs


def is_remote(address: str) -> bool:
    """Whether ``address`` is a bucket's, such as s3://bucket/folder, and not a folder."""
    return "://" in address


def locate(address: str) -> tuple[pafs.FileSystem, str]:
    """File system and path of a folder or of an address such as s3://bucket/folder."""
    if is_remote(address):
        return pafs.FileSystem.from_uri(address)
    return pafs.LocalFileSystem(), str(Path(address).resolve())
