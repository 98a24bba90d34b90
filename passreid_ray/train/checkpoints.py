"""The checkpoints of a run, in a folder or in a bucket: the names of the whole ones are all that is known of them.

Ray keeps a list of its own beside them, but writes it late and not in one piece: after a kill it can miss the newest
checkpoint, name one that is gone, or be cut short. Here a checkpoint counts once its description, written last, is
there.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from passreid_ray.data.storage import below, is_remote, locate
from passreid_ray.distributed import agreed, rank
from passreid_ray.train.state_files import (
    FOLDER_PREFIX,
    META_FILE,
    TENSORS_SUFFIX,
    DamagedCheckpoint,
    UnwrittenCheckpoint,
    check_size,
    checkpoint_name,
    parse_meta,
)

ASIDE_PREFIX = "damaged-"
"""Before the name of a checkpoint that was set aside."""


@dataclass(frozen=True)
class CheckpointStore:
    """Checkpoints of one run below ``address``, a folder that all workers share or an address such as s3://bucket/run."""

    address: str

    @property
    def is_remote(self) -> bool:
        """Whether ``address`` is not a folder."""
        return is_remote(self.address)

    def below(self, name: str) -> "CheckpointStore":
        """Checkpoints of another kind, in the run's folder ``name``."""
        return CheckpointStore(below(self.address, name))

    def location(self, name: str = "") -> tuple[pafs.FileSystem, str]:
        """File system and path of a checkpoint, or of the run."""
        filesystem, root = locate(self.address)
        return filesystem, f"{root}/{name}".rstrip("/")

    def names(self) -> list[str]:
        """Names of the whole checkpoints, oldest first."""
        filesystem, root = self.location()
        entries = filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True))
        folders = sorted(entry.base_name for entry in entries if entry.base_name.startswith(FOLDER_PREFIX))
        metas = filesystem.get_file_info([f"{root}/{name}/{META_FILE}" for name in folders])
        return [name for name, meta in zip(folders, metas, strict=True) if meta.type == pafs.FileType.File]

    def meta(self, name: str) -> dict[str, Any]:
        """Description of a checkpoint, without reading its tensors; ``DamagedCheckpoint`` when it was cut short."""
        filesystem, path = self.location(name)
        with filesystem.open_input_stream(f"{path}/{META_FILE}") as file:
            meta = parse_meta(file.read(), path)
        for file, record in meta["files"].items():
            check_size(record, filesystem.get_file_info(f"{path}/{file}").size or 0, f"{path}/{file}")
        return meta

    def write(self, step: int, save: Callable[[Path], None], *, together: bool = False) -> str:
        """Let ``save`` write the checkpoint of ``step``; its name.

        ``together``: every rank calls this, with a ``save`` that writes the rank's pieces; what fails on one of them
        fails on all. Raises ``UnwrittenCheckpoint`` when a disk refuses, ``OSError`` when a bucket does; the
        checkpoints before stay.
        """
        name = checkpoint_name(step)
        filesystem, path = self.location(name)
        if not self.is_remote:
            try:
                save(Path(path))
            except UnwrittenCheckpoint:
                if rank() == 0:  # what is there of it would only help to keep the disk full
                    shutil.rmtree(path, ignore_errors=True)
                raise
            return name
        with tempfile.TemporaryDirectory() as draft:
            save(Path(draft))
            is_describing = (Path(draft) / META_FILE).is_file()  # one rank's draft has the description

            def begin() -> None:
                filesystem.create_dir(path, recursive=True)
                if is_describing:
                    filesystem.delete_dir_contents(path, missing_dir_ok=True)  # not whole, until it is written anew

            def copy_tensors() -> None:
                for file in Path(draft).glob(f"*{TENSORS_SUFFIX}"):
                    pafs.copy_files(str(file), f"{path}/{file.name}", pafs.LocalFileSystem(), filesystem)

            def describe() -> None:  # last, because it makes the checkpoint whole
                if is_describing:
                    pafs.copy_files(f"{draft}/{META_FILE}", f"{path}/{META_FILE}", pafs.LocalFileSystem(), filesystem)

            for work in (begin, copy_tensors, describe):
                if together:
                    agreed(work)
                else:
                    work()
        return name

    def read(self, name: str, load: Callable[[Path], None]) -> None:
        """Call ``load`` with a local folder that holds the checkpoint ``name``; damage is told by its own address."""
        filesystem, path = self.location(name)
        if not self.is_remote:
            load(Path(path))
            return
        with tempfile.TemporaryDirectory() as copy:
            pafs.copy_files(path, copy, filesystem, pafs.LocalFileSystem())
            try:
                load(Path(copy))
            except DamagedCheckpoint as error:  # the copy is gone when somebody reads this
                raise DamagedCheckpoint(error.reason.replace(copy, path), path) from None

    def set_aside(self, name: str) -> str:
        """Rename the checkpoint ``name``, so that it neither counts nor is ever deleted; its new name."""
        filesystem, root = self.location()
        taken = {entry.base_name for entry in filesystem.get_file_info(pafs.FileSelector(root))}
        aside = f"{ASIDE_PREFIX}{name}"
        while aside in taken:
            aside += "-again"
        if not self.is_remote:
            filesystem.move(f"{root}/{name}", f"{root}/{aside}")
            return aside
        # Buckets move files, not folders. The description goes first: without it the checkpoint does not count.
        filesystem.create_dir(f"{root}/{aside}", recursive=True)
        files = [entry.base_name for entry in filesystem.get_file_info(pafs.FileSelector(f"{root}/{name}"))]
        for file in sorted(files, key=lambda file: file != META_FILE):
            filesystem.move(f"{root}/{name}/{file}", f"{root}/{aside}/{file}")
        if filesystem.get_file_info(f"{root}/{name}").type == pafs.FileType.Directory:
            filesystem.delete_dir(f"{root}/{name}")
        return aside

    def prune(self, keep: int | None) -> None:
        """Delete all but the newest ``keep`` whole checkpoints, and unfinished ones that are older than those."""
        names = self.names()
        if keep is None or len(names) <= keep:
            return
        filesystem, root = self.location()
        for entry in filesystem.get_file_info(pafs.FileSelector(root)):
            if entry.base_name.startswith(FOLDER_PREFIX) and entry.base_name < names[-keep]:
                filesystem.delete_dir(entry.path)
