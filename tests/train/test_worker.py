"""What a worker does about checkpoints, without Ray Train around it."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from passreid_ray import distributed
from passreid_ray.errors import UserError
from passreid_ray.train.checkpoints import CheckpointStore
from passreid_ray.train.state_files import DamagedCheckpoint, UnwrittenCheckpoint, load_state, save_state
from passreid_ray.train.worker import WorkerContext
from tests.ranks import run_on_ranks
from tests.train.full_disk import FullDisk, full_disk
from tests.train.test_checkpoints import filled, save_number
from tests.train.test_recovery import damage

__all__ = ["full_disk"]  # a fixture


@dataclass
class Posts:
    """Keeps what is posted, where a worker has the handle of an actor."""

    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def post(self) -> Any:
        return SimpleNamespace(remote=self.records.append)

    @property
    def said(self) -> list[str]:
        return [record["text"] for record in self.records]


def worker_of(address: Path) -> WorkerContext:
    rank, world_size = distributed.rank(), distributed.world_size()
    return WorkerContext(rank, world_size, torch.device("cpu"), Posts(), CheckpointStore(str(address)))


def _resume(address: Path) -> tuple[list[int], list[str]]:
    worker, loaded = worker_of(address), []
    worker.resume(lambda folder: loaded.append(load_state(folder)[1]["step"]))
    return loaded, worker.board.said


def test_all_ranks_go_on_from_the_newest_whole_checkpoint_and_one_of_them_tells(tmp_path: Path) -> None:
    store = filled(str(tmp_path), 3, 10)
    damage(store, 10)
    (first, told), *others = run_on_ranks(_resume, tmp_path, world_size=3)
    assert first == [3]
    assert others == [([3], [])] * 2
    (line,) = told
    assert line.endswith("set aside as damaged-step_00000010, going on from step 3: 7 steps are done again")
    assert store.names() == ["step_00000003"]


def _resume_in_vain(address: Path) -> str:
    with pytest.raises(UserError) as caught:
        _resume(address)
    return str(caught.value)


def test_when_all_checkpoints_are_damaged_every_rank_stops_with_the_reason(tmp_path: Path) -> None:
    damage(filled(str(tmp_path), 3), 3)
    for message in run_on_ranks(_resume_in_vain, tmp_path, world_size=2):
        assert "none of the 1 checkpoint(s) is whole" in message


def _resume_behind(address: Path) -> str:
    def load(folder: Path) -> None:
        if distributed.rank() == 1:
            raise DamagedCheckpoint(f"{folder}: cut short", folder)

    try:
        return str(worker_of(address).resume(load))
    except OSError as error:
        return str(error)


def test_a_checkpoint_that_one_rank_alone_cannot_read_is_a_crash_and_no_advice_to_delete_it(tmp_path: Path) -> None:
    store = filled(str(tmp_path), 3)
    first, second = run_on_ranks(_resume_behind, tmp_path, world_size=2)
    assert first == "True"
    assert "cut short; but worker 0 has just read step_00000003 whole" in second
    assert "delete" not in second
    assert store.names() == ["step_00000003"]


def test_a_run_without_checkpoints_begins_at_the_beginning(tmp_path: Path) -> None:
    assert not worker_of(tmp_path / "absent").resume(lambda folder: None)


def test_a_checkpoint_that_cannot_be_written_is_told_with_the_one_that_is_left(full_disk: FullDisk) -> None:
    worker = worker_of(full_disk.folder)
    filled(str(full_disk.folder), 3)
    with full_disk.full():
        assert worker.try_to_write(worker.checkpoints, 10, save_large) is None
    (line,) = worker.board.said
    assert "step_00000010: the checkpoint cannot be written: " in line
    assert line.endswith("(step 10); the newest checkpoint is step_00000003; training goes on")
    assert worker.try_to_write(worker.checkpoints, 10, lambda folder: save_number(folder, 10)) == "step_00000010"


def test_a_checkpoint_that_must_be_written_and_cannot_says_what_to_do(full_disk: FullDisk) -> None:
    worker = worker_of(full_disk.folder)
    message = r"there is no checkpoint yet\. Make room; the same command goes on from there$"
    with full_disk.full(), pytest.raises(UnwrittenCheckpoint, match=message):
        worker.try_to_write(worker.checkpoints, 10, save_large, can_go_on=False)
    assert worker.board.said == []


def save_large(folder: Path) -> None:
    save_state(folder, {"large": torch.ones(2**20)}, {"step": 10})
