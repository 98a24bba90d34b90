from pathlib import Path

import pytest

from passreid_ray.data.labels_csv import LabelsCsvSource, read_labels_csv
from passreid_ray.errors import UserError
from tests.data.pictures import write_images

_TABLE = """image,person_id,camera_id,split,half
im/1.png,7,1,train,query
im/2.png,7,2,train,gallery
im/3.png,8,1,query,train
im/4.png,,,,train
"""


def _write(root: Path, table: str = _TABLE, encoding: str = "utf-8") -> Path:
    write_images(root, [f"im/{number}.png" for number in (1, 2, 3, 4)])
    (root / "labels.csv").write_text(table, encoding=encoding)
    return root


def test_labels_come_from_the_columns_and_empty_cells_are_unknown(tmp_path: Path) -> None:
    rows = read_labels_csv(LabelsCsvSource(root=_write(tmp_path)))
    assert rows.image_ids.tolist() == ["im/1.png", "im/2.png", "im/3.png", "im/4.png"]
    assert rows.person_ids.tolist() == ["7", "7", "8", None]
    assert rows.camera_ids.tolist() == ["1", "2", "1", None]
    assert rows.splits.tolist() == ["train", "train", "query", None]
    assert int(rows.image(2)[0, 0, 0]) == 2


def test_the_split_can_come_from_another_column(tmp_path: Path) -> None:
    rows = read_labels_csv(LabelsCsvSource(root=_write(tmp_path), split_column="half"))
    assert rows.splits.tolist() == ["query", "gallery", "train", "train"]


def test_only_the_wanted_splits_are_kept_and_must_be_on_disk(tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / "im/1.png").unlink()
    rows = read_labels_csv(LabelsCsvSource(root=tmp_path, split_column="half", splits=["train"]))
    assert rows.image_ids.tolist() == ["im/3.png", "im/4.png"]


def test_only_the_image_column_is_needed(tmp_path: Path) -> None:
    rows = read_labels_csv(LabelsCsvSource(root=_write(tmp_path, "image\nim/2.png\n\nim/1.png\n")))
    assert rows.image_ids.tolist() == ["im/1.png", "im/2.png"]
    assert set(rows.person_ids) == set(rows.splits) == {None}


def test_cells_are_text_as_any_spreadsheet_writes_them(tmp_path: Path) -> None:
    table = 'image,person_id,camera_id\r\n"im/1.png",007,"a, ""b"""\r\nim/2.png,"two\nlines",NA\r\nim/3.png, 1,"" '
    rows = read_labels_csv(LabelsCsvSource(root=_write(tmp_path, table.rstrip())))
    assert rows.person_ids.tolist() == ["007", "two\nlines", " 1"]
    assert rows.camera_ids.tolist() == ['a, "b"', "NA", None]


def test_the_fingerprint_tells_images_of_another_size_under_the_same_names(tmp_path: Path) -> None:
    source = LabelsCsvSource(root=_write(tmp_path), splits=["train"])
    rows = read_labels_csv(source)
    assert rows.table["size_bytes"].to_pylist() == [len(rows.image_bytes(index)) for index in range(2)]
    (tmp_path / "im/3.png").write_bytes(b"x")
    assert read_labels_csv(source).fingerprint() == rows.fingerprint()
    (tmp_path / "im/2.png").write_bytes(b"x")
    assert read_labels_csv(source).fingerprint() != rows.fingerprint()


def test_a_byte_order_mark_from_a_spreadsheet_is_no_part_of_the_name(tmp_path: Path) -> None:
    assert len(read_labels_csv(LabelsCsvSource(root=_write(tmp_path, encoding="utf-8-sig")))) == 4


@pytest.mark.parametrize(
    ("table", "settings", "message"),
    [
        ("file,person_id\na,1\n", {}, "no column 'image'; columns found: file, person_id"),
        (_TABLE, {"split_column": "part"}, "no column 'part'; columns found: image, .*, half"),
        ("image\nim/1.png\n", {"splits": ["train"]}, "no column 'split'; columns found: image"),
        (_TABLE, {"splits": ["val"]}, "no image has split 'val'; splits found: query, train"),
        ("image,person_id\nim/1.png\n", {}, "row 1 has 1 cells, the header has 2"),
        ("image,person_id\n\nim/1.png,1\n\nim/2.png,1,1\nx\n", {}, "row 2 has 3 cells, the header has 2"),
        ("image,person_id\nim/1.png,3\n\n,3\n", {}, "row 2 names no image"),
        ("image\nim/1.png\nim/1.png\n", {}, "1 image ids are not unique, such as 'im/1.png'"),
        ("image,person_id\n,3\n", {}, "row 1 names no image"),
        ("image\n", {}, "no rows below the header"),
        ("image", {}, "no rows below the header"),
        ("", {}, "empty; expected a header"),
        ("\n\n", {}, "empty; expected a header"),
    ],
)
def test_a_wrong_table_is_explained(tmp_path: Path, table: str, settings: dict[str, object], message: str) -> None:
    _write(tmp_path, table)
    with pytest.raises(UserError, match=message):
        read_labels_csv(LabelsCsvSource.model_validate({"root": tmp_path, **settings}))


def test_images_that_are_not_there_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    _write(tmp_path, "image\nim/1.png\n" + "".join(f"gone{number}.png\n" for number in range(5)))
    with pytest.raises(UserError, match=r"5 of 6 images are not below .*: gone0.png, gone1.png, gone2.png, \.\.\."):
        read_labels_csv(LabelsCsvSource(root=tmp_path))


def test_a_missing_or_binary_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"labels.csv: no such table"):
        read_labels_csv(LabelsCsvSource(root=tmp_path))
    (tmp_path / "labels.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="not a readable CSV file"):
        read_labels_csv(LabelsCsvSource(root=tmp_path))
    (tmp_path / "labels.csv").write_bytes(b"image\nim/\xff.png\n")
    with pytest.raises(UserError, match="not a readable CSV file in UTF-8"):
        read_labels_csv(LabelsCsvSource(root=tmp_path))


@pytest.mark.parametrize("lead", ["../outside.png", "im/../../outside.png", "..\\outside.png", "{parent}/outside.png"])
def test_an_image_outside_of_the_root_is_refused_by_name(tmp_path: Path, lead: str) -> None:
    root = tmp_path / "root"
    write_images(tmp_path, ["outside.png"])
    image = lead.format(parent=tmp_path)
    _write(root, f"image\nim/1.png\n{image}\n")
    with pytest.raises(UserError, match=r"labels\.csv: .*outside\.png' leads out of .*; name images relative to it"):
        read_labels_csv(LabelsCsvSource(root=root))


def test_dots_within_a_name_lead_nowhere(tmp_path: Path) -> None:
    write_images(tmp_path, ["im/a..b.png"])
    (tmp_path / "labels.csv").write_text("image\nim/a..b.png\n")
    assert read_labels_csv(LabelsCsvSource(root=tmp_path)).image_ids.tolist() == ["im/a..b.png"]
