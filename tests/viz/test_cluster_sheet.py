from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from passreid_ray.viz.cluster_sheet import CROP_SIZE_PX, MAX_CROPS, OTHER, SAME, cluster_sheet

Colour = tuple[int, int, int]
BLUE: Colour = (20, 60, 250)
ORANGE: Colour = (250, 140, 10)


def crop(colour: Colour, height: int = 128, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def saved(
    folder: Path, clusters: Sequence[tuple[str, Sequence[np.ndarray]]], frames: list[list[bool | None]] | None = None
) -> np.ndarray:
    cluster_sheet(clusters, folder / "sheet.png", frames)
    assert [path.name for path in folder.iterdir()] == ["sheet.png"]
    with Image.open(folder / "sheet.png") as picture:
        return np.asarray(picture.convert("RGB"))


def extent(sheet: np.ndarray, colour: Colour) -> tuple[int, int, int]:
    """(height, width, number of pixels) of what has exactly this colour."""
    rows, columns = np.nonzero((sheet == colour).all(axis=2))
    return int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1, len(rows)


def test_the_sheet_grows_with_clusters_crops_and_captions(tmp_path: Path) -> None:
    blue = crop(BLUE)
    one = saved(tmp_path, [("cluster 1", [blue])]).shape
    three = saved(tmp_path, [("cluster 1", [blue])] * 3).shape
    wide = saved(tmp_path, [("cluster 1", [blue] * 4)]).shape
    worded = saved(tmp_path, [("cluster 1: a caption with many words", [blue])]).shape
    assert three[0] > one[0] + 2 * CROP_SIZE_PX[0]
    assert wide[1] > one[1] + 3 * CROP_SIZE_PX[1]
    assert worded[1] > one[1] + 50
    assert three[1] == one[1]
    assert wide[0] == worded[0] == one[0]


@pytest.mark.parametrize(
    ("size", "shown"), [((128, 64), (144, 72)), ((20, 10), (144, 72)), ((300, 60), (144, 29)), ((50, 100), (36, 72))]
)
def test_crops_of_any_size_are_shown_whole_and_keep_their_shape(
    tmp_path: Path, size: tuple[int, int], shown: tuple[int, int]
) -> None:
    sheet = saved(tmp_path, [("cluster 1", [crop(BLUE, *size)])])
    assert extent(sheet, BLUE) == (*shown, shown[0] * shown[1])


def test_crops_stand_in_their_order_from_left_to_right_and_too_many_are_left_out(tmp_path: Path) -> None:
    sheet = saved(tmp_path, [("cluster 1", [crop(BLUE), *[crop(ORANGE)] * 20])])
    blue, orange = (np.nonzero((sheet == colour).all(axis=2))[1] for colour in (BLUE, ORANGE))
    assert blue.max() < orange.min()
    assert len(orange) == (MAX_CROPS - 1) * len(blue)


def test_frames_tell_the_clusters_person_from_others(tmp_path: Path) -> None:
    clusters = [("cluster 1", [crop(BLUE), crop(ORANGE), crop(BLUE)])]
    plain = saved(tmp_path, clusters)
    framed = saved(tmp_path, clusters, [[True, False, None]])
    assert not (plain == SAME).all(axis=2).any()
    assert not (plain == OTHER).all(axis=2).any()
    sheet = framed[: len(plain) - 1]  # without the legend below
    for frame in (SAME, OTHER):
        height, width, _ = extent(sheet, frame)
        assert (height, width) == (CROP_SIZE_PX[0] + 6, CROP_SIZE_PX[1] + 6)
    same, orange, other = (np.nonzero((sheet == colour).all(axis=2))[1] for colour in (SAME, ORANGE, OTHER))
    assert same.max() < other.min() < orange.min() <= orange.max() < other.max()
    assert extent(framed, ORANGE)[2] == extent(plain, ORANGE)[2]


def test_a_sheet_without_clusters_is_still_a_picture(tmp_path: Path) -> None:
    assert saved(tmp_path, []).size > 0


def test_frames_must_belong_to_the_crops(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="argument 2"):
        saved(tmp_path, [("cluster 1", [crop(BLUE)] * 2)], [[True]])
