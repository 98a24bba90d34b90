from pathlib import Path

import pytest

from passreid_ray.data.msmt17 import MSMT17Source, read_msmt17
from passreid_ray.errors import UserError
from tests.data.pictures import write_images

_LISTED = {
    "train": ["0000/0000_000_01_0303morning_0008_0.jpg", "0001/0001_000_14_0302noon_0012_1.jpg"],
    "val": ["0000/0000_021_05_0303morning_0037_0.jpg"],
    "query": ["0000/0000_003_02_0303afternoon_0100_0.jpg"],
    "gallery": ["0000/0000_009_15_0303afternoon_0200_0.jpg"],
}


def _write(root: Path, train: str, test: str) -> Path:
    for split, paths in _LISTED.items():
        folder = train if split in ("train", "val") else test
        write_images(root / folder, paths)
        (root / f"list_{split}.txt").write_text("".join(f"{path} {int(path[:4])}\n" for path in paths))
    return root


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("mask_train_v2", "mask_test_v2")])
def test_both_layouts_are_read(tmp_path: Path, train: str, test: str) -> None:
    rows = read_msmt17(MSMT17Source(root=_write(tmp_path, train, test)))
    labels = zip(rows.image_ids, rows.person_ids, rows.camera_ids, rows.splits, strict=True)
    assert set(labels) == {
        (f"{train}/0000/0000_000_01_0303morning_0008_0.jpg", "train/0000", "01", "train"),
        (f"{train}/0001/0001_000_14_0302noon_0012_1.jpg", "train/0001", "14", "train"),
        (f"{train}/0000/0000_021_05_0303morning_0037_0.jpg", "train/0000", "05", "val"),
        (f"{test}/0000/0000_003_02_0303afternoon_0100_0.jpg", "test/0000", "02", "query"),
        (f"{test}/0000/0000_009_15_0303afternoon_0200_0.jpg", "test/0000", "15", "gallery"),
    }
    assert rows.image(0).shape == (16, 12, 3)


def test_only_the_lists_of_the_wanted_splits_are_needed(tmp_path: Path) -> None:
    _write(tmp_path, "train", "test")
    (tmp_path / "list_query.txt").unlink()
    assert len(read_msmt17(MSMT17Source(root=tmp_path, splits=["train", "val"]))) == 3
    with pytest.raises(UserError, match=r"list_query\.txt: MSMT17's list of images cannot be read"):
        read_msmt17(MSMT17Source(root=tmp_path))


def test_listed_images_that_are_missing_are_counted(tmp_path: Path) -> None:
    _write(tmp_path, "train", "test")
    (tmp_path / "train" / _LISTED["train"][0]).unlink()
    with pytest.raises(UserError, match=r"list_train\.txt: 1 of 2 images are not below .*: 0000/0000_000_01"):
        read_msmt17(MSMT17Source(root=tmp_path))


def test_without_image_folders_both_names_are_given(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a folder train or mask_train_v2; found neither"):
        read_msmt17(MSMT17Source(root=tmp_path))


def test_an_odd_name_and_an_empty_list_are_refused(tmp_path: Path) -> None:
    _write(tmp_path, "train", "test")
    write_images(tmp_path / "train", ["0000/me.jpg"])
    (tmp_path / "list_train.txt").write_text("0000/me.jpg 0\n")
    with pytest.raises(UserError, match=r"list_train\.txt: names look like .*; found '0000/me.jpg'"):
        read_msmt17(MSMT17Source(root=tmp_path))
    (tmp_path / "list_train.txt").write_text("\n")
    with pytest.raises(UserError, match=r"list_train\.txt: empty"):
        read_msmt17(MSMT17Source(root=tmp_path))


def test_an_image_outside_of_the_folders_is_refused_by_name(tmp_path: Path) -> None:
    _write(tmp_path, "train", "test")
    (tmp_path / "list_train.txt").write_text("../test/0000/0000_003_02_0303afternoon_0100_0.jpg 0\n")
    with pytest.raises(UserError, match=r"list_train.txt: '\.\./test/.*' leads out of .*train"):
        read_msmt17(MSMT17Source(root=tmp_path))
