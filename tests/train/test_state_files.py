import json
import pickle
from pathlib import Path

import pytest
import torch

from passreid_ray.errors import UserError
from passreid_ray.train.state_files import (
    DamagedCheckpoint,
    checkpoint_name,
    find_checkpoint,
    load_state,
    read_meta,
    save_state,
)

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save_state(tmp_path, TENSORS | {"view": TENSORS["a"][:, 1]}, {"step": 7})
    tensors, meta = load_state(tmp_path)
    assert torch.equal(tensors["a"], TENSORS["a"])
    assert torch.equal(tensors["view"], TENSORS["a"][:, 1])
    assert meta["step"] == 7
    assert sorted(file.name for file in tmp_path.iterdir()) == ["state.json", "state.safetensors"]


def test_a_checkpoint_cut_short_is_told(tmp_path: Path) -> None:
    save_state(tmp_path, TENSORS, {})
    file = tmp_path / "state.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match=f"cut short: expected {size} bytes, found {size - 5}; delete"):
        load_state(tmp_path)


def test_an_edited_checkpoint_is_told(tmp_path: Path) -> None:
    save_state(tmp_path, TENSORS, {})
    file = tmp_path / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="damaged: its SHA-256"):
        load_state(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        pytest.param("[" * 100_000, "not valid JSON", id="nested"),
        ("[]", "keys 'format'"),
        ('{"format": 2, "files": 5, "sharded": {}}', "keys 'format'"),
        ('{"format": 2, "files": {"state.safetensors": 5}, "sharded": {}}', "'bytes' and 'sha256' expected"),
        ('{"format": 2, "files": {"state.safetensors": {"bytes": "5", "sha256": ""}}, "sharded": {}}', "'bytes' and"),
        ('{"format": 2, "files": {"state.safetensors": {"bytes": 5}}, "sharded": {}}', "'bytes' and 'sha256' expected"),
        ('{"format": 1, "bytes": 5, "sha256": null}', "'bytes' and 'sha256' expected"),
        ('{"format": 2, "files": {}, "sharded": {"weight": "0"}}', "a dimension expected"),
        ('{"format": 3, "files": {}, "sharded": {}}', "of format 3, this version reads 2 and older"),
    ],
)
def test_a_damaged_description_is_told(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_meta(tmp_path)


def test_no_bit_of_a_description_can_flip_unseen(tmp_path: Path) -> None:
    save_state(tmp_path, TENSORS, {"step": 7, "config": {"seed": 1, "lr": 0.1}})
    file, before = tmp_path / "state.json", read_meta(tmp_path)
    content = file.read_bytes()
    unseen = 0
    for position in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        file.write_bytes(flipped)
        try:
            now = read_meta(tmp_path)
        except DamagedCheckpoint:
            continue
        unseen += 1
        assert {key: now.get(key) for key in before} == before  # white space, or the name of the checksum itself
    assert unseen < len(content)


def test_a_damaged_checkpoint_is_told_the_same_in_another_process(tmp_path: Path) -> None:
    error = DamagedCheckpoint("state.json: damaged", tmp_path)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.folder) == (
        f"state.json: damaged; delete {tmp_path} to go on from the checkpoint before it",
        str(tmp_path),
    )


def test_a_description_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    files = {"../state.safetensors": {"bytes": 1, "sha256": ""}}
    (tmp_path / "state.json").write_text(json.dumps({"format": 2, "files": files, "sharded": {}}))
    with pytest.raises(UserError, match=r"names of files expected such as state\.safetensors"):
        read_meta(tmp_path)


def test_a_folder_that_is_written_again_keeps_no_file_of_before(tmp_path: Path) -> None:
    (tmp_path / "state-00003-of-00004.safetensors").write_bytes(b"a piece of four")
    save_state(tmp_path, TENSORS, {})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["state.json", "state.safetensors"]


def test_a_checkpoint_of_the_first_format_is_read(tmp_path: Path) -> None:
    save_state(tmp_path, TENSORS, {"step": 7})
    meta = json.loads((tmp_path / "state.json").read_text())
    (own,) = meta.pop("files").values()
    del meta["sharded"], meta["description_sha256"]
    (tmp_path / "state.json").write_text(json.dumps({**meta, **own, "format": 1}))
    tensors, meta = load_state(tmp_path)
    assert torch.equal(tensors["a"], TENSORS["a"])
    assert meta["step"] == 7


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_state(tmp_path / "file" / "checkpoint", TENSORS, {})


def test_the_newest_whole_checkpoint_of_a_run_is_found(tmp_path: Path) -> None:
    for step in (5, 40, 300):
        save_state(tmp_path / checkpoint_name(step), TENSORS, {"step": step})
    (tmp_path / checkpoint_name(300) / "state.json").unlink()  # killed before it was whole
    assert find_checkpoint(tmp_path).name == checkpoint_name(40)
    assert find_checkpoint(tmp_path / checkpoint_name(5)).name == checkpoint_name(5)


def test_a_folder_without_a_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint found"):
        find_checkpoint(tmp_path)


def test_the_description_is_plain_json(tmp_path: Path) -> None:
    save_state(tmp_path, TENSORS, {"config": {"seed": 1}})
    assert json.loads((tmp_path / "state.json").read_text())["config"] == {"seed": 1}
