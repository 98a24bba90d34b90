from pathlib import Path

import pyarrow.fs as pafs
import pytest
import torch

from passreid_ray.errors import UserError
from passreid_ray.train.checkpoints import CheckpointStore
from passreid_ray.train.state_files import DamagedCheckpoint, UnwrittenCheckpoint, load_state, save_state
from tests.data.s3 import Bucket, bucket, s3_host, s3_keys
from tests.train.full_disk import FullDisk, full_disk

__all__ = ["bucket", "full_disk", "s3_host", "s3_keys"]  # fixtures


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


def entries(store: CheckpointStore) -> list[str]:
    filesystem, root = store.location()
    return sorted(entry.base_name for entry in filesystem.get_file_info(pafs.FileSelector(root)))


def test_a_checkpoint_that_is_set_aside_no_longer_counts_and_is_never_deleted(address: str) -> None:
    store = filled(address, 1, 2)
    assert store.set_aside("step_00000002") == "damaged-step_00000002"
    assert store.names() == ["step_00000001"]
    filled(address, 2, 3)
    assert store.set_aside("step_00000002") == "damaged-step_00000002-again"
    filled(address, 4)
    store.prune(1)
    assert entries(store) == ["damaged-step_00000002", "damaged-step_00000002-again", "step_00000004"]
    _, root = store.location()
    aside = Path(root, "damaged-step_00000002")
    assert sorted(file.name for file in aside.iterdir()) == ["state.json", "state.safetensors"]
    assert load_state(aside)[1]["step"] == 2


def test_what_is_damaged_is_told_by_its_place_and_not_by_that_of_a_copy(address: str) -> None:
    store = filled(address, 5)
    _, path = store.location("step_00000005")
    Path(path, "state.safetensors").write_bytes(b"cut")
    message = rf"^{path}/state\.safetensors: cut short: .*; delete {path} to go on"
    with pytest.raises(DamagedCheckpoint, match=message):
        number_in(store, "step_00000005")


def test_a_checkpoint_in_a_bucket_is_set_aside(bucket: Bucket) -> None:
    store = filled(bucket.address("run"), 1, 2)
    assert store.set_aside("step_00000002") == "damaged-step_00000002"
    assert store.names() == ["step_00000001"]
    assert entries(store) == ["damaged-step_00000002", "step_00000001"]
    assert number_in(store, "damaged-step_00000002") == 2


def test_what_a_full_disk_cut_short_is_gone_and_the_checkpoints_before_stay(full_disk: FullDisk) -> None:
    store = filled(str(full_disk.folder), 1)
    with (
        full_disk.full(),
        pytest.raises(UnwrittenCheckpoint, match="step_00000002: the checkpoint cannot be written: "),
    ):
        store.write(2, lambda folder: save_state(folder, {"large": torch.ones(2**20)}, {}))
    assert entries(store) == ["step_00000001"]
    assert number_in(store, "step_00000001") == 1
    filled(str(full_disk.folder), 2)
    assert number_in(store, "step_00000002") == 2


def test_a_store_below_another_keeps_its_options() -> None:
    assert CheckpointStore("s3://b/run?region=eu").below("best") == CheckpointStore("s3://b/run/best?region=eu")
    assert CheckpointStore("/runs/a").below("best") == CheckpointStore("/runs/a/best")
