"""The checkpoints of a run, in a folder or in a bucket: the names of the whole ones are all that is known of them.

Ray keeps a list of its own beside them, but writes it late and not in one piece: after a kill it can miss the newest
checkpoint, name one that is gone, or be cut short. Here a checkpoint counts once its description, written last, is
there.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from passreid_ray.data.storage import below, is_remote, locate
from passreid_ray.distributed import barrier
from passreid_ray.train.state_files import (
    FOLDER_PREFIX,
    META_FILE,
    TENSORS_SUFFIX,
    check_size,
    checkpoint_name,
    parse_meta,
)


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
        """Description of a checkpoint, without reading its tensors; ``UserError`` when it is damaged or cut short."""
        filesystem, path = self.location(name)
        with filesystem.open_input_stream(f"{path}/{META_FILE}") as file:
            meta = parse_meta(file.read(), path)
        for file, record in meta["files"].items():
            check_size(record, filesystem.get_file_info(f"{path}/{file}").size or 0, f"{path}/{file}")
        return meta

    def write(self, step: int, save: Callable[[Path], None], *, together: bool = False) -> str:
        """Let ``save`` write the checkpoint of ``step``; its name.

        ``together``: every rank calls this, with a ``save`` that writes the rank's pieces.
        """
        name = checkpoint_name(step)
        filesystem, path = self.location(name)
        if not self.is_remote:
            save(Path(path))
            return name
        with tempfile.TemporaryDirectory() as draft:
            save(Path(draft))
            filesystem.create_dir(path, recursive=True)
            is_describing = (Path(draft) / META_FILE).is_file()  # one rank's draft has the description
            if is_describing:
                filesystem.delete_dir_contents(path, missing_dir_ok=True)  # no longer whole, until it is written anew
            if together:
                barrier()
            for file in Path(draft).glob(f"*{TENSORS_SUFFIX}"):
                pafs.copy_files(str(file), f"{path}/{file.name}", pafs.LocalFileSystem(), filesystem)
            if together:
                barrier()
            if is_describing:  # last, because it makes the checkpoint whole
                pafs.copy_files(f"{draft}/{META_FILE}", f"{path}/{META_FILE}", pafs.LocalFileSystem(), filesystem)
        if together:
            barrier()
        return name

    def read(self, name: str, load: Callable[[Path], None]) -> None:
        """Call ``load`` with a local folder that holds the checkpoint ``name``."""
        filesystem, path = self.location(name)
        if not self.is_remote:
            load(Path(path))
            return
        with tempfile.TemporaryDirectory() as copy:
            pafs.copy_files(path, copy, filesystem, pafs.LocalFileSystem())
            load(Path(copy))

    def prune(self, keep: int | None) -> None:
        """Delete all but the newest ``keep`` whole checkpoints, and unfinished ones that are older than those."""
        names = self.names()
        if keep is None or len(names) <= keep:
            return
        filesystem, root = self.location()
        for entry in filesystem.get_file_info(pafs.FileSelector(root)):
            if entry.base_name.startswith(FOLDER_PREFIX) and entry.base_name < names[-keep]:
                filesystem.delete_dir(entry.path)
