"""A file in a run's storage that a worker must see before it trains: its node may have joined after the run began."""

import time
import uuid
from dataclasses import dataclass

import pyarrow as pa

from passreid_ray.data.storage import below, explained, locate, reason, shown
from passreid_ray.engines.run_folder import RunConfig
from passreid_ray.engines.shared_storage import read, write
from passreid_ray.errors import UserError

MARKER_FOLDER = ".seen_by_workers"


class StorageNotSeen(Exception):
    """A worker's node does not see the storage of its run.

    No ``UserError``, which would end the run: that node is at fault, so this counts as a crash of the worker.
    """


@dataclass(frozen=True)
class StorageMarker:
    """A file that the job wrote into a run's storage for its workers."""

    storage: str
    """Address of the run's checkpoints."""
    name: str

    @property
    def folder(self) -> str:
        """Address of the folder that the file is in."""
        return below(self.storage, MARKER_FOLDER)

    def check(self, address: str, seconds: float | None = None) -> None:
        """Raise ``StorageNotSeen`` when the file does not appear on this node, which has ``address``.

        Waits for it as long as ``shared_storage.read`` does, or for ``seconds``.
        """
        start = time.monotonic()
        try:
            if read(self.folder, self.name, seconds):
                return
            complaint = f"what the job wrote there did not appear within {time.monotonic() - start:.0f} s"
        except (OSError, pa.ArrowException) as error:
            complaint = reason(error)
        except UserError as error:
            complaint = str(error)
        raise StorageNotSeen(
            f"node {address} does not see this run's storage {shown(self.storage)} ({complaint}); mount it there or "
            "mend its access, or take the node out of the cluster"
        )


def leave_marker(run: RunConfig) -> StorageMarker:
    """The marker of this start of ``run``, written in place of earlier ones; ``UserError`` when that fails."""
    # Its name is new each time: a node that has an old copy of the storage has other names there.
    marker = StorageMarker(run.checkpoints.address, uuid.uuid4().hex)
    with explained(marker.storage):
        filesystem, path = locate(marker.folder)
        filesystem.delete_dir_contents(path, missing_dir_ok=True)
        write(marker.folder, marker.name)
    return marker
