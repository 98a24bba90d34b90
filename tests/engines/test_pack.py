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
from passreid_ray.engines.pack import PackConfig, left_out, run, size_text, written_settings
from passreid_ray.engines.pack_shard import ShardTask, pack_shard
from passreid_ray.errors import UserError
from tests.data.pictures import write_images

NUM_IMAGES = 40
BAD = (3, 21)
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
    needed = size_text(sum(shard.bytes for shard in whole.shards[:2]) / 30 * 8)
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


def test_too_many_bad_images_end_the_job_with_reasons_and_a_larger_share_keeps_the_shards(
    cluster: None, crops: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"2 of 40 images cannot be used.*first: 003\.png: not a JPEG") as error:
        run(_config(crops, tmp_path / "out", max_bad_share=0.04), _silent())
    assert "quarantine.jsonl" in str(error.value)
    before = _times(tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    run(_config(crops, tmp_path / "out", max_bad_share=0.05), _silent())
    assert _times(tmp_path / "out") == before


def test_a_folder_of_other_settings_data_or_things_is_refused_before_anything_is_written(
    crops: Path, tmp_path: Path
) -> None:
    config = _config(crops, tmp_path / "out")
    pack.claimed(config, open_rows(config.data))
    claim = (tmp_path / "out" / "pack.json").read_bytes()
    for changed, message in [
        ({"rows_per_group": 5}, "packed with rows_per_group = 4, now it is 5"),
        ({"data": {"kind": "synthetic"}}, "packed with data = "),
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
    pack.claimed(config, open_rows(config.data))
    write_images(tmp_path / "in", ["c.png"])
    with pytest.raises(UserError, match="was packed from other data"):
        run(config, _silent())


def test_an_output_that_cannot_be_written_is_refused(crops: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written.*set output"):
        run(_config(crops, tmp_path / "file" / "out"), _silent())


def test_a_small_disk_is_told_beforehand(crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(crops, tmp_path / "out")
    rows = open_rows(config.data)
    folder = pack.claimed(config, rows)
    per_row = pack.sampled_bytes_per_row(rows, config)
    good = [number for number in range(NUM_IMAGES) if number not in BAD]
    assert per_row == pytest.approx(np.mean([len(rows.image_bytes(number)) for number in good]))
    for free_bytes, is_told in [(1000, True), (10**6, False)]:
        console = _silent()
        monkeypatch.setattr(pack.shutil, "disk_usage", lambda _, free=free_bytes: type("Usage", (), {"free": free}))
        pack.warn_when_disk_is_small(folder, per_row * len(rows), console)
        assert ("warning: about" in _said(console)) is is_told


def test_no_image_that_can_be_used_makes_no_estimate(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    config = _config(tmp_path, tmp_path / "out")
    assert pack.sampled_bytes_per_row(open_rows(config.data), config) == 0.0


def test_copies_of_a_bad_image_are_bad(crops: Path) -> None:
    rows = open_rows(_config(crops, crops).data)
    repeats_M2 = np.array([[5, 4], [9, 3], [12, 3]])
    bad, duplicates_D = left_out([BadRow(row=3, image_id="003.png", reason="empty")], repeats_M2, rows)
    assert [(row.row, row.image_id) for row in bad] == [(3, "003.png"), (9, "009.png"), (12, "012.png")]
    assert bad[2].reason == "same bytes as 003.png: empty"
    assert duplicates_D.tolist() == [5]


def test_written_settings_hold_no_credentials() -> None:
    config = build(
        PackConfig,
        {"data": {"kind": "folder", "root": "s3://key:secret@bucket/crops"}, "output": "s3://key:secret@bucket/packed"},
    )
    written = json.dumps(written_settings(config))
    assert "s3://bucket/crops" in written
    assert "secret" not in written


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (3.4e6, "3.4 MB"), (5e9, "5.0 GB"), (2e15, "2000.0 TB")],
)
def test_sizes_are_told_in_the_unit_that_fits(size: float, text: str) -> None:
    assert size_text(size) == text


def test_progress_outside_a_terminal_is_lines_with_rate_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 10.0, 20.0, 40.0])
    monkeypatch.setattr(pack.time, "monotonic", lambda: next(now))
    console = _silent()
    progress = pack.PackProgress(console)  # not entered: only lines are looked at
    progress("packing", 100, 1000)
    progress("packing", 200, 1000, 1000)
    progress("packing", 300, 1000, 2000)
    progress("packing", 500, 1000, 4000)
    assert _said(console) == "packing: 500 of 1,000  10 images/s, 7.0 kB  0:00:50 left\n"


def test_the_bad_share_is_of_all_rows(crops: Path, tmp_path: Path) -> None:
    bad = [BadRow(row=number, image_id=str(number), reason="empty") for number in range(5)]
    pack.check_bad(bad, 50, _config(crops, tmp_path, max_bad_share=0.1))
    with pytest.raises(UserError, match=r"5 of 49 .*the first: 0: empty; 1: empty; 2: empty\. All"):
        pack.check_bad(bad, 49, _config(crops, tmp_path, max_bad_share=0.1))


def test_a_full_disk_names_what_is_needed_by_the_shards_that_are_there(crops: Path, tmp_path: Path) -> None:
    config = _config(crops, tmp_path / "out")
    folder = PackFolder(*locate(tmp_path / "out"), str(tmp_path / "out"), "s")
    assert "0 of 3 shards are whole and stay, about 4.0 kB are still" in pack.full_disk(folder, config, 40, {}, 100.0)
    write_images(tmp_path / "in", [f"{number:02d}.png" for number in range(16)])
    (tmp_path / "out").mkdir()
    rows = open_rows(_config(tmp_path / "in", tmp_path).data)
    task = ShardTask(0, slice(0, 16), np.empty(0, np.int64), 4, pack.image_rule(config), "s")
    sidecar = pack_shard(rows, task, *locate(tmp_path / "out"))
    needed = size_text(sidecar.shard.bytes / 16 * 24)
    assert f"1 of 3 shards are whole and stay, about {needed}" in pack.full_disk(folder, config, 40, {0: sidecar}, 1.0)
