"""The packing job: what it writes, what it leaves out, and that it goes on where it stopped."""

import errno
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from passreid_ray.config import build
from passreid_ray.data import Rows, open_rows
from passreid_ray.data.manifest import BadRow, Sidecar
from passreid_ray.data.pack_folder import PackFolder
from passreid_ray.data.packed import check_shards, read_manifest
from passreid_ray.data.storage import locate
from passreid_ray.engines import pack
from passreid_ray.engines.pack import PackConfig, check_shard_size, claimed, left_out, run, sampled_bytes_per_row
from passreid_ray.engines.pack_disk import size_text
from passreid_ray.engines.pack_shard import ShardTask, pack_shard
from passreid_ray.engines.shard_layout import LISTS_BYTES_PER_SHARD, ShardLayout
from passreid_ray.errors import UserError
from tests.data.pictures import encoded, write_images

NUM_IMAGES = 40
BAD = (3, 21)
LAYOUT = ShardLayout(NUM_IMAGES, 16, 100.0)
COPIES = {8: 2, 30: 2, 39: 38}
"""Images that have the bytes of another."""


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_images(tmp_path_factory.mktemp("crops"), [f"{number:03d}.png" for number in range(NUM_IMAGES)])
    for number in BAD:
        (root / f"{number:03d}.png").write_bytes(b"no image")
    for number, other in COPIES.items():
        (root / f"{number:03d}.png").write_bytes((root / f"{other:03d}.png").read_bytes())
    return root


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are packed one after the other in this process."""
    monkeypatch.setattr(pack, "connect", lambda _: None)
    monkeypatch.setattr(pack.ray, "put", lambda value: value)
    monkeypatch.setattr(pack, "_in_flight", lambda function, calls: ((key, function(*own)) for key, own in calls))


def _config(crops: Path, output: Path, **settings: Any) -> PackConfig:
    defaults = {"rows_per_group": 4, "groups_per_shard": 4, "max_bad_share": 0.1}
    return build(
        PackConfig, {"data": {"kind": "folder", "root": str(crops)}, "output": str(output), **defaults, **settings}
    )


def _silent() -> Console:
    return Console(file=io.StringIO(), width=200)


def _said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _times(output: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in output.glob("shard-*")}


def _packed_numbers(output: Path) -> list[int]:
    tables = [pq.read_table(path) for path in sorted(output.glob("*.parquet"))]
    return [int(image_id[:3]) for table in tables for image_id in table["image_id"].to_pylist()]


def test_packing_writes_three_shards_a_manifest_and_the_bad_images(cluster: None, crops: Path, tmp_path: Path) -> None:
    console = _silent()
    manifest = run(_config(crops, tmp_path / "out"), console)
    filesystem, root = locate(tmp_path / "out")
    assert read_manifest(filesystem, root) == manifest
    check_shards(manifest, filesystem, root, verify=True)
    assert [shard.row_groups for shard in manifest.shards] == [[4, 4, 4, 3], [4, 4, 4, 3], [4, 4]]
    assert (manifest.rows, manifest.num_bad, manifest.num_duplicates) == (38, 2, 0)
    assert manifest.bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.parquet"))
    assert _packed_numbers(tmp_path / "out") == [number for number in range(NUM_IMAGES) if number not in BAD]
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["image_id"] for line in lines] == ["003.png", "021.png"]
    assert "packed:   38 images of 0 people by 0 cameras" in _said(console)
    assert f"data.kind=parquet data.path={tmp_path / 'out'}" in _said(console)


def test_packed_rows_are_read_back_with_the_bytes_and_labels_of_the_source(cluster: None, tmp_path: Path) -> None:
    data = {"kind": "synthetic", "num_people": 4, "num_cameras": 3, "images_per_person": 6}
    config = build(PackConfig, {"data": data, "output": str(tmp_path / "out"), "rows_per_group": 5})
    manifest = run(config, _silent())
    source = open_rows(config.data)
    packed = open_rows(build(PackConfig, {"data": {"kind": "parquet", "path": str(tmp_path / "out")}}).data)
    for name in ("image_id", "person_id", "camera_id", "split"):
        assert packed.table[name].to_pylist() == source.table[name].to_pylist()
    assert [packed.image_bytes(i) for i in range(len(packed))] == [source.image_bytes(i) for i in range(len(source))]
    assert manifest.num_identities == len(set(source.person_ids) - {"-1"})
    assert manifest.num_cameras == len(set(source.camera_ids))


def test_of_the_same_bytes_the_first_image_stays(cluster: None, crops: Path, tmp_path: Path) -> None:
    manifest = run(_config(crops, tmp_path / "out", drop_duplicates=True), _silent())
    # Both bad images have the same bytes, and count as bad nevertheless.
    assert (manifest.rows, manifest.num_bad, manifest.num_duplicates) == (35, 2, 3)
    expected = [number for number in range(NUM_IMAGES) if number not in {*BAD, *COPIES}]
    assert _packed_numbers(tmp_path / "out") == expected
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert reasons[1] == f"same bytes as 003.png: {reasons[0]}"


def _pack_until_the_third(rows: Rows, task: ShardTask, address: str) -> Sidecar:
    if task.number == 2:
        raise OSError(errno.ENOSPC, "No space left on device")
    return pack_shard(rows, task, *locate(address))


def test_a_job_that_broke_off_goes_on_without_touching_finished_shards(
    cluster: None, crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(_config(crops, tmp_path / "whole"), _silent())
    config = _config(crops, tmp_path / "out")
    needed = size_text(sum(shard.bytes for shard in whole.shards[:2]) / 30 * 8 + 3 * LISTS_BYTES_PER_SHARD)
    with monkeypatch.context() as patch:
        patch.setattr(pack, "_pack_task", _pack_until_the_third)
        patch.setattr(pack, "TASKS_PER_CPU", 1e-9)  # one after another
        with pytest.raises(UserError, match=f"2 of 3 shards are whole and stay, about {needed} are"):
            run(config, _silent())
    with pytest.raises(UserError, match="is not packed to its end"):
        read_manifest(*locate(tmp_path / "out"))
    before = _times(tmp_path / "out")
    (tmp_path / "out" / "shard-00002.parquet.0123abcd.part").write_bytes(b"half a shard")
    console = _silent()
    manifest = run(config, console)
    assert "2 of 3 shards are there and stay" in _said(console)
    after = _times(tmp_path / "out")
    assert before.items() <= after.items()
    assert len(after) == 6
    assert not list((tmp_path / "out").glob("*.part"))
    assert (manifest.shards, manifest.fingerprint) == (whole.shards, whole.fingerprint)


def test_when_the_disk_is_full_the_tasks_beside_are_stopped_and_leave_no_beginnings(
    cluster: None, crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(_config(crops, tmp_path / "whole", groups_per_shard=1), _silent())
    config = _config(crops, tmp_path / "out", groups_per_shard=1)
    with monkeypatch.context() as patch:
        patch.setattr(pack, "_pack_task", _pack_until_the_third)
        with pytest.raises(UserError, match="no space left"):
            run(config, _silent())
    assert not list((tmp_path / "out").glob("*.part"))
    assert not (tmp_path / "out" / "shard-00002.parquet").exists()
    assert run(config, _silent()).shards == whole.shards


def test_a_whole_data_set_is_left_as_it_is_and_a_lost_shard_is_made_again(
    cluster: None, crops: Path, tmp_path: Path
) -> None:
    config = _config(crops, tmp_path / "out", drop_duplicates=True)
    manifest = run(config, _silent())
    before = _times(tmp_path / "out")
    assert run(config, _silent()) == manifest
    assert _times(tmp_path / "out") == before
    (tmp_path / "out" / "shard-00001.parquet").write_bytes(b"PAR1")
    assert run(config, _silent()) == manifest
    changed = {name for name, time in _times(tmp_path / "out").items() if before[name] != time}
    assert changed == {"shard-00001.parquet", "shard-00001.json"}


def test_images_that_cannot_be_used_are_told_before_anything_is_written(crops: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"2 of 40 images looked at cannot be used, the first: 003\.png: not a JPEG"):
        run(_config(crops, tmp_path / "out", max_bad_share=0.04), _silent())
    assert not (tmp_path / "out").exists()


def test_images_that_the_settings_make_unusable_are_told_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "in" / name).write_bytes(encoded(np.zeros((100, 10, 3), np.uint8)))
    with pytest.raises(UserError, match=r"none of the 2 images looked at can be packed, the first: a\.png: 10x100"):
        run(_config(tmp_path / "in", tmp_path / "out", longest_side_px=50), _silent())
    assert not (tmp_path / "out").exists()


def test_a_pack_stops_once_too_many_images_are_bad_and_a_larger_share_keeps_the_shards(
    in_process: None, tmp_path: Path
) -> None:
    crops = write_images(tmp_path / "in", [f"{number:03d}.png" for number in range(200)])
    probed = set(np.linspace(0, 199, 64, dtype=int).tolist())
    hidden = [number for number in range(200) if number not in probed]
    for number in hidden[:3]:
        (crops / f"{number:03d}.png").write_bytes(b"no image")
    config = {"rows_per_group": 5, "groups_per_shard": 4}
    with pytest.raises(UserError, match=r"3 of 200 images cannot be used.*first: 001\.png: not a JPEG") as error:
        run(_config(crops, tmp_path / "out", max_bad_share=0.01, **config), _silent())
    assert "quarantine.jsonl" in str(error.value)
    assert len((tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()) == 3
    before = _times(tmp_path / "out")
    assert sorted(before) == ["shard-00000.json", "shard-00000.parquet"]
    assert not (tmp_path / "out" / "manifest.json").exists()
    manifest = run(_config(crops, tmp_path / "out", max_bad_share=0.015, **config), _silent())
    assert (manifest.rows, len(manifest.shards)) == (197, 10)
    assert before.items() <= _times(tmp_path / "out").items()


def test_a_moved_source_is_packed_on(in_process: None, tmp_path: Path) -> None:
    write_images(tmp_path / "in", [f"{number:02d}.png" for number in range(10)])
    manifest = run(_config(tmp_path / "in", tmp_path / "out"), _silent())
    before = _times(tmp_path / "out")
    (tmp_path / "in").rename(tmp_path / "elsewhere")
    assert run(_config(tmp_path / "elsewhere", tmp_path / "out"), _silent()).shards == manifest.shards
    assert _times(tmp_path / "out") == before


def test_a_pack_that_finds_all_shards_names_no_speed(in_process: None, crops: Path, tmp_path: Path) -> None:
    first, second = _silent(), _silent()
    run(_config(crops, tmp_path / "out"), first)
    run(_config(crops, tmp_path / "out"), second)
    assert "images/s" in _said(first)
    assert "in 3 shards, all were there" in _said(second)
    assert "images/s" not in _said(second)


@pytest.mark.parametrize("name", ["pack.json", "duplicates.npy", "quarantine.jsonl", "manifest.json"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_whatever_a_full_disk_refuses_the_user_reads_how_much_is_needed(
    in_process: None, crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    config = _config(crops, tmp_path / "out", drop_duplicates=True)
    write = PackFolder.write

    def full_for_one(folder: PackFolder, own: str, content: bytes) -> None:
        if own == name:
            raise OSError(code, "full")
        write(folder, own, content)

    with monkeypatch.context() as patch:
        patch.setattr(PackFolder, "write", full_for_one)
        with pytest.raises(
            UserError, match=r"no space left in .*; \d of 3 shards .*, about \d+\.\d kB are still needed"
        ):
            run(config, _silent())
    assert run(config, _silent()).rows == 35


def test_a_full_disk_at_the_restart_names_the_shards_that_are_there(
    in_process: None, crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(crops, tmp_path / "out")
    run(config, _silent())

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PackFolder, "write", full)
    with pytest.raises(UserError, match=r"no space left in .*; 3 of 3 shards are whole"):
        run(config, _silent())


def _mistaken(kind: str) -> None:
    raise UserError("data: a shard was edited") if kind == "user" else OSError(errno.ENOSPC, "full")


def test_what_a_task_raised_for_the_user_or_by_the_disk_arrives_without_its_traceback(cluster: None) -> None:
    with pytest.raises(UserError) as error:
        list(pack._in_flight(_mistaken, iter([(0, ("user",))])))
    assert str(error.value) == "data: a shard was edited"
    with pytest.raises(OSError, match="full") as full:
        list(pack._in_flight(_mistaken, iter([(0, ("disk",))])))
    assert full.value.errno == errno.ENOSPC
    assert str(full.value) == f"[Errno {errno.ENOSPC}] full"


def test_shards_too_large_for_s3_are_refused_with_a_number_that_fits() -> None:
    config = build(PackConfig, {"output": "s3://bucket/packed"})  # shards of 128 x 128 images
    check_shard_size(config, ShardLayout(100, config.rows_per_shard, 1e6))
    check_shard_size(config, ShardLayout(10**6, config.rows_per_shard, 2e5))
    with pytest.raises(UserError, match=r"about 16\.4 GB.* set groups_per_shard=31$"):
        check_shard_size(config, ShardLayout(10**6, config.rows_per_shard, 1e6))
    fitting = build(PackConfig, {"output": "s3://bucket/packed", "groups_per_shard": 31})
    check_shard_size(fitting, ShardLayout(10**6, fitting.rows_per_shard, 1e6))
    check_shard_size(build(PackConfig, {"output": "packed"}), ShardLayout(10**6, config.rows_per_shard, 1e6))


def test_a_folder_of_other_settings_data_or_things_is_refused_before_anything_is_written(
    crops: Path, tmp_path: Path
) -> None:
    config = _config(crops, tmp_path / "out")
    claimed(config, open_rows(config.data), LAYOUT)
    claim = (tmp_path / "out" / "pack.json").read_bytes()
    for changed, message in [
        ({"rows_per_group": 5}, "packed with rows_per_group = 4, now it is 5"),
        ({"data": {"kind": "synthetic"}}, "was packed from other data"),
    ]:
        with pytest.raises(UserError, match=message):
            run(_config(crops, tmp_path / "out", **changed), _silent())
    with pytest.raises(UserError, match=r"is not empty and holds no pack\.json"):
        run(_config(crops, crops), _silent())
    with pytest.raises(UserError, match="is a file"):
        run(_config(crops, crops / "000.png"), _silent())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pack.json"]
    assert (tmp_path / "out" / "pack.json").read_bytes() == claim


def test_other_images_of_the_same_folder_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "in", ["a.png", "b.png"])
    config = _config(tmp_path / "in", tmp_path / "out")
    claimed(config, open_rows(config.data), LAYOUT)
    write_images(tmp_path / "in", ["c.png"])
    with pytest.raises(UserError, match="was packed from other data"):
        run(config, _silent())


def test_an_output_that_cannot_be_written_is_refused(crops: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written: .*set another output"):
        run(_config(crops, tmp_path / "file" / "out"), _silent())


def test_the_sampled_size_is_that_of_the_images_that_can_be_packed(crops: Path, tmp_path: Path) -> None:
    config = _config(crops, tmp_path / "out")
    rows = open_rows(config.data)
    good = [number for number in range(NUM_IMAGES) if number not in BAD]
    assert sampled_bytes_per_row(rows, config) == np.mean([len(rows.image_bytes(number)) for number in good])


def test_copies_of_a_bad_image_are_bad(crops: Path) -> None:
    rows = open_rows(_config(crops, crops).data)
    repeats_M2 = np.array([[5, 4], [9, 3], [12, 3]])
    bad, duplicates_D = left_out([BadRow(row=3, image_id="003.png", reason="empty")], repeats_M2, rows)
    assert [(row.row, row.image_id) for row in bad] == [(3, "003.png"), (9, "009.png"), (12, "012.png")]
    assert bad[2].reason == "same bytes as 003.png: empty"
    assert duplicates_D.tolist() == [5]


def test_the_bad_share_is_of_all_rows(crops: Path, tmp_path: Path) -> None:
    bad = [BadRow(row=number, image_id=str(number), reason="empty") for number in range(5)]
    pack.check_bad(bad, 50, _config(crops, tmp_path, max_bad_share=0.1))
    with pytest.raises(UserError, match=r"5 of 49 .*the first: 0: empty; 1: empty; 2: empty\. Those found"):
        pack.check_bad(bad, 49, _config(crops, tmp_path, max_bad_share=0.1))
