from pathlib import Path

import pyarrow.fs as pafs
import pytest
import torch

from passreid_ray.errors import UserError
from passreid_ray.train.checkpoints import CheckpointStore
from passreid_ray.train.state_files import load_state, save_state


def save_number(folder: Path, number: int) -> None:
    save_state(folder, {"number": torch.tensor(number)}, {"step": number})


def filled(address: str, *steps: int) -> CheckpointStore:
    store = CheckpointStore(address)
    for step in steps:
        store.write(step, lambda folder, step=step: save_number(folder, step))
    return store


def number_in(store: CheckpointStore, name: str) -> int:
    found = []
    store.read(name, lambda folder: found.append(int(load_state(folder)[0]["number"])))
    return found[0]


@pytest.fixture(params=["folder", "address"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run's place, once as a folder and once as an address: file:// is Arrow's stand-in for a bucket."""
    place = tmp_path / "run"
    return str(place) if request.param == "folder" else f"file://{place}"


def test_a_run_that_has_not_begun_has_no_checkpoints(address: str) -> None:
    store = CheckpointStore(address)
    assert store.names() == []
    store.prune(2)


def test_what_is_written_is_read(address: str) -> None:
    store = filled(address, 5, 40)
    assert store.names() == ["step_00000005", "step_00000040"]
    assert [number_in(store, name) for name in store.names()] == [5, 40]
    assert store.meta("step_00000040")["step"] == 40


def test_a_checkpoint_without_its_description_does_not_count(address: str) -> None:
    store = filled(address, 5, 40)
    filesystem, path = store.location("step_00000040")
    filesystem.delete_file(f"{path}/state.json")
    assert store.names() == ["step_00000005"]


def test_only_the_newest_are_kept_and_older_unfinished_ones_go(address: str) -> None:
    store = filled(address, 1, 2, 3, 4)
    filesystem, path = store.location("step_00000002")
    filesystem.delete_file(f"{path}/state.json")
    store.prune(2)
    _, root = store.location()
    left = filesystem.get_file_info(pafs.FileSelector(root))
    assert sorted(entry.base_name for entry in left) == ["step_00000003", "step_00000004"]


def test_without_a_limit_all_are_kept(address: str) -> None:
    store = filled(address, 1, 2, 3)
    store.prune(None)
    assert len(store.names()) == 3


def test_pruning_leaves_other_files_alone(tmp_path: Path) -> None:
    store = filled(str(tmp_path), 1, 2)
    (tmp_path / "metrics.jsonl").write_text("mine")
    store.prune(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "step_00000002"]


@pytest.mark.parametrize(("file", "message"), [("state.safetensors", "cut short"), ("state.json", "not valid JSON")])
def test_a_checkpoint_cut_short_is_told_from_its_description(address: str, file: str, message: str) -> None:
    store = filled(address, 7)
    _, path = store.location("step_00000007")
    whole = Path(path, file).read_bytes()
    Path(path, file).write_bytes(whole[:-3])
    with pytest.raises(UserError, match=f"{file}.*{message}.*; delete {path} to go on from the checkpoint before it"):
        store.meta("step_00000007")


def test_a_write_that_fails_leaves_no_checkpoint(address: str) -> None:
    def fail(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "state.safetensors").write_bytes(b"half")
        raise UserError("disk full")

    store = filled(address, 1)
    with pytest.raises(UserError, match="disk full"):
        store.write(2, fail)
    assert store.names() == ["step_00000001"]


def test_a_store_below_another_keeps_its_options() -> None:
    assert CheckpointStore("s3://b/run?region=eu").below("best") == CheckpointStore("s3://b/run/best?region=eu")
    assert CheckpointStore("/runs/a").below("best") == CheckpointStore("/runs/a/best")
