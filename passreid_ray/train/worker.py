"""What the training function asks of Ray Train: rank, device, the last checkpoint, a way to report."""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import CheckpointUploadMode
from ray.train.torch import get_device

from passreid_ray.data.substitutes import BadImages
from passreid_ray.errors import UserError
from passreid_ray.train.checkpoints import CheckpointStore

READER_SECONDS = 10.0
"""How long a checkpoint waits for the driver to write down what it was told."""


@dataclass(frozen=True)
class WorkerContext:
    """One process of a training run."""

    rank: int
    world_size: int
    device: torch.device
    board: Any
    """Actor handle of the run's board, which the driver reads."""
    checkpoints: CheckpointStore

    @classmethod
    def from_ray(cls, board: Any, checkpoints: CheckpointStore, threads: int) -> "WorkerContext":
        """The context of the Ray Train worker that this is called in; ``threads`` CPU threads compute in it."""
        torch.set_num_threads(threads)
        context = ray.train.get_context()
        device = get_device()
        assert isinstance(device, torch.device)
        return cls(context.get_world_rank(), context.get_world_size(), device, board, checkpoints)

    def resume(self, load: Callable[[Path], None]) -> bool:
        """Call ``load`` with the folder of the newest whole checkpoint, if there is one; whether there was."""
        names = self.checkpoints.names()
        if names:
            self.checkpoints.read(names[-1], load)
        return bool(names)

    def report(self, step: int, save: Callable[[Path], None], keep: int | None, *, together: bool = False) -> None:
        """Save a checkpoint of ``step`` (rank 0 writes it with ``save``) and keep the newest ``keep``.

        ``together``: every worker has pieces of the state, which its ``save`` writes. Every worker must call this; Ray
        Train makes them wait for each other.
        """
        checkpoint = None
        if self.rank == 0:
            self._wait_for_reader()
        if self.rank == 0 or together:
            name = self.checkpoints.write(step, save, together=together)
            if self.rank == 0:
                filesystem, path = self.checkpoints.location(name)
                checkpoint = ray.train.Checkpoint(path, filesystem)
        ray.train.report({"step": step}, checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)
        if self.rank == 0:
            self.checkpoints.prune(keep)

    def _wait_for_reader(self) -> None:
        # A run that is killed goes on after its newest checkpoint: what was told of the steps before must be on disk.
        deadline = time.monotonic() + READER_SECONDS
        while ray.get(self.board.num_waiting.remote()) and time.monotonic() < deadline:
            time.sleep(0.05)

    def post(self, kind: str, **record: Any) -> None:
        """Tell the driver something, without waiting for it."""
        self.board.post.remote({"kind": kind, "rank": self.rank, **record})

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
