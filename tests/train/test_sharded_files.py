import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from passreid_ray import distributed
from passreid_ray.errors import UserError
from passreid_ray.train.checkpoints import CheckpointStore
from passreid_ray.train.pass_state import PassState
from passreid_ray.train.pass_step import StepSettings, train_step
from passreid_ray.train.sharded_files import save_pieces
from passreid_ray.train.sharing import Strategy, average_gradients
from passreid_ray.train.state_files import UnwrittenCheckpoint, load_state
from tests.ranks import run_on_ranks
from tests.train.pass_fixtures import RATES, random_views, rank_slice, tiny_state

SETTINGS = StepSettings()
STEPS_BEFORE, STEPS_AFTER = 2, 3


def train(state: PassState, steps: int) -> list[float]:
    """Losses of the next steps of a global batch of 8, by as many workers as there are ranks."""
    state.forward, losses = average_gradients(state.forward), []
    for step in range(state.step, state.step + steps):
        views = rank_slice(random_views(8, seed=step), distributed.rank(), distributed.world_size())
        losses.append(float(train_step(state, views, RATES, SETTINGS)["loss"]))
    return losses


def train_and_save(strategy: Strategy, address: str) -> str:
    state = tiny_state(strategy=strategy)
    train(state, STEPS_BEFORE)
    store = CheckpointStore(address)
    name = store.write(state.step, lambda folder: save_pieces(folder, state.tensors(), state.meta()), together=True)
    assert store.names() == [name]
    return name


def load_and_train(strategy: Strategy, address: str, name: str) -> list[float]:
    state, store = tiny_state(strategy=strategy), CheckpointStore(address)
    assert store.meta(name)["step"] == STEPS_BEFORE
    store.read(name, lambda folder: state.load(*load_state(folder), str(folder)))
    return train(state, STEPS_AFTER)


@pytest.fixture(scope="module")
def unbroken() -> list[float]:
    """Losses of a run on one worker after the steps of the checkpoint."""
    return train(tiny_state(), STEPS_BEFORE + STEPS_AFTER)[STEPS_BEFORE:]


@pytest.mark.parametrize(
    ("strategy", "is_remote"), [("fsdp", False), ("sharded_prototypes", True)], ids=["fsdp", "prototypes-in-a-bucket"]
)
def test_pieces_of_two_ranks_load_on_one_two_and_four(
    strategy: Strategy, is_remote: bool, unbroken: list[float], tmp_path: Path
) -> None:
    address = f"file://{tmp_path}" if is_remote else str(tmp_path)
    names = run_on_ranks(train_and_save, strategy, address, world_size=2)
    folder = tmp_path / names[0]
    assert sorted(path.name for path in folder.iterdir()) == [
        "state-00000-of-00002.safetensors",
        "state-00001-of-00002.safetensors",
        "state.json",
    ]
    np.testing.assert_allclose(load_and_train("copies", address, names[0]), unbroken, rtol=1e-9)
    for other, world_size in (("copies", 2), (strategy, 4)):
        for losses in run_on_ranks(load_and_train, other, address, names[0], world_size=world_size):
            np.testing.assert_allclose(losses, unbroken, rtol=1e-9)


def _save_numbers(folder: Path) -> None:
    tensor = distributed.sharded_like(torch.arange(7.0), tiny_state(strategy="fsdp").student.backbone.cls_token)
    save_pieces(folder, {"numbers": tensor, "whole": torch.ones(2)}, {"step": 1})


def test_uneven_pieces_are_joined_in_order_and_one_that_is_cut_short_is_told(tmp_path: Path) -> None:
    run_on_ranks(_save_numbers, tmp_path, world_size=3)
    tensors, meta = load_state(tmp_path)
    assert tensors["numbers"].tolist() == list(range(7))
    assert tensors["whole"].tolist() == [1, 1]
    assert meta["step"] == 1
    piece = tmp_path / "state-00001-of-00003.safetensors"
    piece.write_bytes(piece.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{piece}: cut short"):
        load_state(tmp_path)


def _save_on_a_disk_that_is_full_for_rank_1(folder: Path) -> str:
    tensor = distributed.sharded_like(torch.arange(7.0), tiny_state(strategy="fsdp").student.backbone.cls_token)
    store = CheckpointStore(str(folder))
    if distributed.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(UnwrittenCheckpoint) as caught:
        store.write(1, lambda place: save_pieces(place, {"numbers": tensor}, {"step": 1}), together=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    distributed.barrier()  # all have left the first one, and the folder is as it was
    return str(caught.value) + str(store.write(2, lambda place: save_pieces(place, {"numbers": tensor}, {"step": 2})))


def test_a_piece_that_cannot_be_written_is_told_on_every_rank_and_none_waits(tmp_path: Path) -> None:
    (told,) = set(run_on_ranks(_save_on_a_disk_that_is_full_for_rank_1, tmp_path, world_size=2))
    assert "step_00000001: the checkpoint cannot be written: " in told
    assert CheckpointStore(str(tmp_path)).names() == ["step_00000002"]
    assert load_state(tmp_path / "step_00000002")[0]["numbers"].tolist() == list(range(7))
