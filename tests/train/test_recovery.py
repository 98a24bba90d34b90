from pathlib import Path

import pytest

from passreid_ray.errors import UserError
from passreid_ray.train.checkpoints import CheckpointStore
from passreid_ray.train.recovery import newest_whole, set_damaged_aside
from tests.train.test_checkpoints import filled, number_in


def damage(store: CheckpointStore, step: int) -> None:
    """Flip a bit of the tensors."""
    _, path = store.location(f"step_{step:08d}")
    file = Path(path, "state.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 16
    file.write_bytes(content)


def test_the_newest_checkpoint_that_can_be_read_is_found_and_those_after_it_are_set_aside(tmp_path: Path) -> None:
    store = filled(str(tmp_path), 3, 10, 20)
    damage(store, 10)
    damage(store, 20)
    found = newest_whole(store, lambda name: number_in(store, name))
    assert found is not None
    assert (found.name, found.value) == ("step_00000003", 3)
    assert store.names() == ["step_00000003", "step_00000010", "step_00000020"]  # so far nothing is renamed
    lines = set_damaged_aside(store, found)
    assert [line.rpartition("; ")[2] for line in lines] == [
        "set aside as damaged-step_00000020, going on from step 3: 17 steps are done again",
        "set aside as damaged-step_00000010, going on from step 3: 7 steps are done again",
    ]
    assert all("damaged: its SHA-256" in line and "\n" not in line for line in lines)
    assert store.names() == ["step_00000003"]


def test_where_there_is_no_checkpoint_none_is_found(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path / "absent"))
    assert newest_whole(store, store.meta) is None


def test_only_damaged_checkpoints_are_an_error_and_stay_where_they_are(tmp_path: Path) -> None:
    store = filled(str(tmp_path), 3)
    damage(store, 3)
    with pytest.raises(UserError, match=r"none of the 1 checkpoint\(s\) is whole.*or give another run\.name"):
        newest_whole(store, lambda name: number_in(store, name))
    assert store.names() == ["step_00000003"]


def test_a_mistake_that_is_no_damage_is_not_passed_over(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise UserError("of other data")

    with pytest.raises(UserError, match="of other data"):
        newest_whole(filled(str(tmp_path), 3, 10), refuse)
