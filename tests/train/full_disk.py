"""A disk that is full for a while."""

import contextlib
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest

DISK_BYTES = 64 * 2**20
LEFT_BYTES = 256 * 2**10
"""What is left of a full disk: a little, so that a file begins and is cut short."""


@dataclass(frozen=True)
class FullDisk:
    """A folder on a file system of its own where this user may mount one; else limited by the size of files."""

    folder: Path
    is_mounted: bool

    def full(self) -> AbstractContextManager[None]:
        """While this lasts, a file of more than ``LEFT_BYTES`` cannot be written."""
        return self._filled() if self.is_mounted else _limited()

    @contextlib.contextmanager
    def _filled(self) -> Iterator[None]:
        ballast, space = self.folder / "ballast", os.statvfs(self.folder)
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize - LEFT_BYTES)
        try:
            yield
        finally:
            ballast.unlink()


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LEFT_BYTES, hard))  # Python ignores the signal, the write fails
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[FullDisk]:
    """A disk with room, that a test can fill."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with contextlib.suppress(FileNotFoundError):
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True).returncode == 0:
            yield FullDisk(folder, is_mounted=True)
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
            return
    yield FullDisk(folder, is_mounted=False)
