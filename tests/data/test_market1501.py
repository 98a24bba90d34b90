from pathlib import Path

import pytest

from passreid_ray.data.market1501 import Market1501Source, read_market1501
from passreid_ray.errors import UserError
from tests.data.pictures import write_images

_PATHS = [
    "bounding_box_train/0002_c1s1_000451_03.jpg",
    "bounding_box_train/0007_c3s3_077419_03.jpg",
    "query/0001_c1s1_001051_00.jpg",
    "bounding_box_test/-1_c2s1_000401_03.jpg",
    "bounding_box_test/0000_c4s1_000151_01.jpg",
    "bounding_box_test/0001_c6s1_001051_00.jpg.jpg",
]


def test_names_give_person_and_camera_and_folders_the_split(tmp_path: Path) -> None:
    write_images(tmp_path, _PATHS)
    (tmp_path / "query" / "Thumbs.db").touch()
    rows = read_market1501(Market1501Source(root=tmp_path))
    labels = zip(rows.image_ids, rows.person_ids, rows.camera_ids, rows.splits, strict=True)
    assert set(labels) == {
        (_PATHS[0], "0002", "1", "train"),
        (_PATHS[1], "0007", "3", "train"),
        (_PATHS[2], "0001", "1", "query"),
        (_PATHS[3], "-1", "2", "gallery"),
        (_PATHS[4], "0000", "4", "gallery"),
        (_PATHS[5], "0001", "6", "gallery"),
    }


def test_names_of_dukemtmc_are_understood(tmp_path: Path) -> None:
    write_images(tmp_path, ["query/0005_c2_f0046985.jpg"])
    rows = read_market1501(Market1501Source(root=tmp_path, splits=["query"]))
    assert (rows.person_ids[0], rows.camera_ids[0]) == ("0005", "2")


def test_only_the_folders_of_the_wanted_splits_are_needed(tmp_path: Path) -> None:
    write_images(tmp_path, _PATHS[:2])
    assert len(read_market1501(Market1501Source(root=tmp_path, splits=["train"]))) == 2
    with pytest.raises(UserError, match="query: expected a folder with Market-1501 images of split query"):
        read_market1501(Market1501Source(root=tmp_path))


def test_an_odd_name_is_named(tmp_path: Path) -> None:
    write_images(tmp_path, [*_PATHS, "query/holiday.jpg"])
    with pytest.raises(UserError, match=r"query/holiday\.jpg: Market-1501 names look like 0002_c1s1_000451_03\.jpg"):
        read_market1501(Market1501Source(root=tmp_path))


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path, _PATHS[:3])
    (tmp_path / "bounding_box_test").mkdir()
    with pytest.raises(UserError, match="bounding_box_test: no image"):
        read_market1501(Market1501Source(root=tmp_path))
