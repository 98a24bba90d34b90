"""Looking at a data set from end to end."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow.fs import LocalFileSystem
from rich.console import Console

from passreid_ray.config import build
from passreid_ray.data import SyntheticSource, open_rows
from passreid_ray.data.manifest import MANIFEST_FILE, Manifest, fingerprint_of
from passreid_ray.data.packed import SCHEMA, shard_name, write_shard
from passreid_ray.engines import inspect_data
from passreid_ray.engines.data_report import DataReport
from passreid_ray.engines.image_facts import look_at_rows
from passreid_ray.engines.inspect_data import InspectConfig, look_at_images, numbers_to_look_at, run
from passreid_ray.engines.row_blocks import RowBlocks
from passreid_ray.errors import UserError
from tests.data.pictures import encoded, gradient

SILENT = Console(quiet=True)


def crops(root: Path, *, leaks: bool = False) -> Path:
    """A labelled set of 20 crops with a bad one, a grey one and a copy, which is in another split if ``leaks``."""
    root.mkdir()
    rng = np.random.default_rng(0)
    lines = ["image,person_id,camera_id,split"]
    for number in range(20):
        split = "train" if number < 10 else ("query" if number < 15 else "gallery")
        tiles = rng.integers(0, 255, (8, 4, 3), np.uint8)
        pixels = np.repeat(np.repeat(tiles, 16, axis=0), 16, axis=1)
        if number == 3:
            pixels = np.repeat(pixels[:, :, :1], 3, axis=2)
        (root / f"{number:02d}.png").write_bytes(encoded(pixels))
        person = number % 5 + (0 if split == "train" else 5)
        lines.append(f"{number:02d}.png,p{person},c{number // 5},{split}")
    (root / "07.png").write_bytes(b"hello")
    (root / "copy.png").write_bytes((root / "00.png").read_bytes())
    lines.append(f"copy.png,p0,c2,{'gallery' if leaks else 'train'}")
    (root / "labels.csv").write_text("\n".join(lines))
    return root


def config(output: Path, root: Path, **settings: Any) -> InspectConfig:
    data = {"kind": "labels_csv", "root": str(root)}
    return build(InspectConfig, {"output": str(output), "data": data, **settings})


def packed(root: Path) -> Path:
    """A packed set of one image; its shard."""
    columns = [["a"], [None], [None], [None], [encoded(gradient())], [16], [24], [bytes(32)], [0]]
    table = pa.table(
        [pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA
    )
    shard = write_shard(LocalFileSystem(), str(root), shard_name(0), [table])
    manifest = Manifest(
        rows=shard.rows,
        bytes=shard.bytes,
        num_identities=0,
        num_cameras=0,
        rows_per_group=1,
        shards=[shard],
        fingerprint=fingerprint_of([shard]),
        num_bad=0,
        num_duplicates=0,
        settings={},
    )
    (root / MANIFEST_FILE).write_text(manifest.model_dump_json())
    return root / shard.file


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def said(config: InspectConfig) -> tuple[DataReport, str]:
    console = Console(record=True, width=200, soft_wrap=True, file=StringIO())
    return run(config, console), console.export_text()


def test_a_small_set_is_judged_without_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_data, "connect", lambda *_: pytest.fail("Ray is not needed for 21 images"))
    output = tmp_path / "out"
    report, text = said(config(output, crops(tmp_path / "crops")))
    assert (report.images.looked_at, report.images.bad, report.images.grey) == (21, 1, 1)
    assert (report.duplicates.same_copies, report.labels.people.people) == (1, 10)
    assert {path.name for path in output.iterdir()} == {
        "config.toml",
        "report.json",
        "quarantine.jsonl",
        "duplicates.jsonl",
        "contact_sheet.png",
        "duplicates.png",
    }
    (bad,) = records(output / "quarantine.jsonl")
    assert bad["image_id"] == "07.png"
    assert "not a JPEG" in bad["reason"]
    assert records(output / "duplicates.jsonl") == [{"kind": "same", "image_ids": ["00.png", "copy.png"]}]
    assert "cannot be used: 07.png: not a JPEG" in text
    assert "warning: 1 image (5.0%) with the same bytes as another one" in text
    assert "error" not in text


def test_the_report_holds_the_numbers_and_the_findings(tmp_path: Path) -> None:
    report = run(config(tmp_path / "out", crops(tmp_path / "crops")), SILENT)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["images"]["height_px"]["percentiles"]["p50"] == report.images.height_px.median == 128
    assert written["labels"]["splits"] == {"gallery": 5, "query": 5, "train": 11}
    assert written["duplicates"]["examples"] == [{"image_ids": ["00.png", "copy.png"], "bits": None}]
    assert {finding["level"] for finding in written["findings"]} == {"warning", "note"}
    assert written["images_per_second"] > 0


def test_a_leak_is_an_error_after_all_was_written(tmp_path: Path) -> None:
    root = crops(tmp_path / "crops", leaks=True)
    with pytest.raises(UserError, match=r"^data: the same image is in more than one split, gallery \+ train: 1"):
        run(config(tmp_path / "out", root), SILENT)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["findings"][0]["level"] == "error"
    assert written["labels"]["people_in_training_and_test"] == 1
    assert (tmp_path / "out" / "duplicates.png").stat().st_size > 1000


def test_too_many_bad_images_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 of 21 images \(4.76%\) cannot be used"):
        run(config(tmp_path / "out", crops(tmp_path / "crops"), plan={"max_bad_share": 0.04}), SILENT)


def test_a_second_look_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(config(output, crops(tmp_path / "crops")), SILENT)
    data = {"kind": "synthetic", "num_people": 4, "images_per_person": 4}
    run(build(InspectConfig, {"output": str(output), "data": data}), SILENT)
    assert {path.name for path in output.iterdir()} == {"config.toml", "report.json", "contact_sheet.png"}


def test_nothing_is_shown_where_no_image_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "crops").mkdir()
    (tmp_path / "crops" / "a.jpg").write_bytes(b"")
    data = {"kind": "folder", "root": str(tmp_path / "crops")}
    with pytest.raises(UserError, match="1 of 1 images"):
        run(build(InspectConfig, {"output": str(tmp_path / "out"), "data": data}), SILENT)
    assert not (tmp_path / "out" / "contact_sheet.png").exists()


def test_a_labelled_sheet_has_a_row_per_person_and_a_column_per_camera(tmp_path: Path) -> None:
    sizes = []
    for num_people, num_cameras in ((4, 2), (8, 2), (8, 4)):
        data = {"kind": "synthetic", "num_people": num_people, "num_cameras": num_cameras, "images_per_person": 4}
        run(build(InspectConfig, {"output": str(tmp_path), "data": data}), SILENT)
        with Image.open(tmp_path / "contact_sheet.png") as sheet:
            sizes.append(sheet.size)
    (width, height), (same_width, higher), (wider, same_height) = sizes
    assert (same_width, same_height) == (width, higher)
    assert higher > 1.7 * height
    assert wider > width + 150


@pytest.mark.parametrize(
    ("num_rows", "sample", "expected"), [(5, None, [0, 1, 2, 3, 4]), (5, 9, [0, 1, 2, 3, 4]), (9, 3, [0, 4, 8])]
)
def test_a_sample_is_spread_over_the_rows(num_rows: int, sample: int | None, expected: list[int]) -> None:
    assert numbers_to_look_at(num_rows, sample).tolist() == expected


def test_labels_are_counted_in_all_rows_of_a_sample(tmp_path: Path) -> None:
    report, text = said(config(tmp_path / "out", crops(tmp_path / "crops"), sample=4))
    assert (report.images.looked_at, report.labels.images) == (4, 21)
    assert "4 of 21 images were looked at" in text


def test_joined_sources_are_opened_once_and_judged_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def counted(source: Any) -> Any:
        opened.append(source.kind)
        return open_rows(source)

    monkeypatch.setattr(inspect_data, "open_rows", counted)
    monkeypatch.setattr(inspect_data, "check_known_set", lambda rows, kind: [f"{kind} of {len(rows)}"])
    parts = [{"kind": "synthetic", "num_people": people, "images_per_person": 4} for people in (4, 6)]
    source = build(InspectConfig, {"data": {"kind": "joined", "sources": parts}}).data
    rows, lines = inspect_data.opened(source)
    assert opened == ["synthetic", "synthetic"]
    assert rows.fingerprint() == open_rows(source).fingerprint()
    assert lines == ["synthetic of 16 (data.sources.0)", "synthetic of 24 (data.sources.1)"]


def test_sums_are_only_compared_where_there_are_some(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="verify: only packed data has sums to compare with, not kind labels_csv"):
        run(config(tmp_path / "out", crops(tmp_path / "crops"), verify=True), SILENT)
    pq.write_table(pa.table({"image_id": ["a"], "image": [b""]}), tmp_path / "mine.parquet")
    data = {"kind": "parquet", "path": str(tmp_path)}
    with pytest.raises(UserError, match=r"verify: .* has no manifest\.json"):
        run(build(InspectConfig, {"output": str(tmp_path / "out"), "data": data, "verify": True}), SILENT)


def test_packed_shards_are_checked_and_their_sums_when_asked(tmp_path: Path) -> None:
    shard_file = packed(tmp_path)
    data = build(InspectConfig, {"data": {"kind": "parquet", "path": str(tmp_path)}}).data
    inspect_data.check_packed(data, verify=True)
    content = bytearray(shard_file.read_bytes())
    content[10] ^= 1
    shard_file.write_bytes(content)
    inspect_data.check_packed(data, verify=False)
    with pytest.raises(UserError, match=r"shard-00000\.parquet was edited or damaged"):
        inspect_data.check_packed(data, verify=True)
    shard_file.write_bytes(content[:-1])
    with pytest.raises(UserError, match="cut short"):
        inspect_data.check_packed(data, verify=False)


def test_tasks_find_what_one_process_finds(cluster: None) -> None:
    rows = open_rows(SyntheticSource(num_people=6, images_per_person=4))
    numbers_N = np.arange(1, len(rows))
    found_N, bad = look_at_images(rows, numbers_N, RowBlocks(len(numbers_N), 10, lambda *_: None))
    expected_N, _ = look_at_rows(slice(0, len(numbers_N)), rows, numbers_N)
    assert found_N.tobytes() == expected_N.tobytes()
    assert bad == []
