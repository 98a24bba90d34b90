"""What the training function asks of Ray Train: rank, device, the last checkpoint, a way to report."""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.train
import torch
from ray.train import CheckpointUploadMode
from ray.train.torch import get_device

from passreid_ray.data.storage import reason
from passreid_ray.data.substitutes import BadImages
from passreid_ray.distributed import agreed, barrier
from passreid_ray.errors import UserError
from passreid_ray.train.checkpoints import CheckpointStore
from passreid_ray.train.pulse import CHECKPOINT, pulse
from passreid_ray.train.recovery import newest_whole, set_damaged_aside
from passreid_ray.train.state_files import DamagedCheckpoint, UnwrittenCheckpoint

READER_SECONDS = 10.0
"""How long a checkpoint waits for the driver to write down what it was told."""
MAX_UNWRITTEN = 3
"""So many checkpoints in a row that cannot be written end a run: it would go on at the risk of all its work."""


@dataclass(frozen=True)
class WorkerContext:
    """One process of a training run."""

    rank: int
    world_size: int
    device: torch.device
    board: Any
    """Actor handle of the run's board, which the driver reads."""
    checkpoints: CheckpointStore
    unwritten: list[int] = field(default_factory=list)
    """Steps of the last checkpoints in a row, where they could not be written."""

    @classmethod
    def from_ray(cls, board: Any, checkpoints: CheckpointStore, threads: int) -> "WorkerContext":
        """The context of the Ray Train worker that this is called in; ``threads`` CPU threads compute in it."""
        torch.set_num_threads(threads)
        context = ray.train.get_context()
        device = get_device()
        assert isinstance(device, torch.device)
        return cls(context.get_world_rank(), context.get_world_size(), device, board, checkpoints)

    def resume(self, load: Callable[[Path], None]) -> bool:
        """Call ``load`` with the folder of the newest whole checkpoint, if there is one; whether there was.

        Damaged ones after it are set aside, which the driver is told; raises ``UserError`` when all are damaged. Every
        worker must call this: rank 0 reads first, and the others what it could read. ``OSError`` where another cannot.
        """
        name = agreed(lambda: self._load_newest(load) if self.rank == 0 else None)[0]
        if name is not None and self.rank != 0:
            self._load_as_rank_0_did(name, load)
        return name is not None

    def _load_as_rank_0_did(self, name: str, load: Callable[[Path], None]) -> None:
        try:
            self.checkpoints.read(name, load)
        except UserError as error:
            # Not the user's to mend, by deleting it least of all: a crash, after which workers are started again.
            reason = error.reason if isinstance(error, DamagedCheckpoint) else error
            raise OSError(
                f"worker {self.rank}: {reason}; but worker 0 has just read {name} whole: this node sees another state "
                "of the shared storage"
            ) from None

    def _load_newest(self, load: Callable[[Path], None]) -> str | None:
        found = newest_whole(self.checkpoints, lambda name: self.checkpoints.read(name, load))
        if found is None:
            return None
        for line in set_damaged_aside(self.checkpoints, found):
            self.post("say", text=line)
        return found.name

    @pulse.doing(CHECKPOINT)
    def report(
        self,
        step: int,
        save: Callable[[Path], None],
        keep: int | None,
        *,
        together: bool = False,
        is_last: bool = False,
        tell_ray: bool = True,
    ) -> None:
        """Save a checkpoint of ``step`` (rank 0 writes it with ``save``) and keep the newest ``keep``.

        ``together``: every worker has pieces of the state, which its ``save`` writes. Every worker must call this; they
        wait for each other. ``tell_ray``: not where Ray Train's controller stands still until the checkpoint is there.

        One that cannot be written, mostly because the disk is full, is told and training goes on: the next may work.
        The last of a run must be written, and so must one of ``MAX_UNWRITTEN`` in a row; else this raises.
        """
        checkpoint = None
        if self.rank == 0:
            self._wait_for_reader()
        if self.rank == 0 or together:
            can_go_on = not is_last and len(self.unwritten) + 1 < MAX_UNWRITTEN
            name = self.try_to_write(self.checkpoints, step, save, together=together, can_go_on=can_go_on)
            self.unwritten[:] = [] if name is not None else [*self.unwritten, step]
            if name is not None and self.rank == 0:
                filesystem, path = self.checkpoints.location(name)
                checkpoint = ray.train.Checkpoint(path, filesystem)
        if tell_ray:
            ray.train.report({"step": step}, checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)
        else:
            barrier()
        if checkpoint is not None:
            self.checkpoints.prune(keep)

    def try_to_write(
        self,
        store: CheckpointStore,
        step: int,
        save: Callable[[Path], None],
        *,
        together: bool = False,
        can_go_on: bool = True,
    ) -> str | None:
        """Name of the checkpoint of ``step``, written to ``store``; None when it cannot be written, which is told.

        Raises the reason instead where the run cannot go on.
        """
        try:
            return store.write(step, save, together=together)
        except (UnwrittenCheckpoint, OSError, pa.ArrowException) as error:
            line = f"{reason(error)} (step {step}); {_kept(self.checkpoints)}"
            if not can_go_on and isinstance(error, UnwrittenCheckpoint):
                raise UnwrittenCheckpoint(f"{line}. Make room; the same command goes on from there") from None
            if not can_go_on:
                raise  # a bucket's trouble: restarted workers may find it over
            if self.rank == 0:
                self.post("say", text=f"{line}; training goes on")
            return None

    def _wait_for_reader(self) -> None:
        # A run that is killed goes on after its newest checkpoint: what was told of the steps before must be on disk.
        deadline = time.monotonic() + READER_SECONDS
        while ray.get(self.board.num_waiting.remote()) and time.monotonic() < deadline:
            time.sleep(0.05)

    def post(self, kind: str, **record: Any) -> None:
        """Tell the driver something, without waiting for it."""
        self.board.post.remote({"kind": kind, "rank": self.rank, **record})
        pulse.get_on()
        if kind == "start":
            pulse.first_step = record["step"]

    def post_bad(self, images: BadImages) -> None:
        """Tell the driver which images could not be used."""
        if images:
            self.post("bad", images=images)

    def stop_if_told(self) -> None:
        """Raise ``UserError`` when the driver found a reason to stop."""
        reason = ray.get(self.board.stop_reason.remote())
        if reason is not None:
            raise UserError(reason)

    def peak_memory_bytes(self) -> int:
        """The most memory this worker has used: of its GPU where it has one, else of its process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _kept(store: CheckpointStore) -> str:
    try:
        names = store.names()
    except (OSError, pa.ArrowException):
        return "the checkpoints before it are as they were"
    return f"the newest checkpoint is {names[-1]}" if names else "there is no checkpoint yet"
