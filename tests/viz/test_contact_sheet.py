"""The contact sheet: where crops stand, and how large."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from passreid_ray.viz.contact_sheet import CELL_SIZE_PX, contact_sheet

BLUE = (20, 60, 250)
ORANGE = (250, 140, 10)
Colour = tuple[int, int, int]


def crop(colour: Colour, height: int = 128, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def saved(folder: Path, grid: Sequence[Sequence[np.ndarray | None]], **names: Sequence[str]) -> np.ndarray:
    contact_sheet(grid, folder / "sheet.png", **names)
    assert [path.name for path in folder.iterdir()] == ["sheet.png"]
    with Image.open(folder / "sheet.png") as picture:
        return np.asarray(picture.convert("RGB"))


def box(sheet: np.ndarray, colour: Colour) -> tuple[int, int, int, int]:
    """(top, left, height, width) of what has exactly this colour, which must fill its box."""
    rows, columns = np.nonzero((sheet == colour).all(axis=2))
    height, width = int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1
    assert len(rows) == height * width
    return int(rows.min()), int(columns.min()), height, width


def test_crops_keep_their_proportion_to_each_other(tmp_path: Path) -> None:
    sheet = saved(tmp_path, [[crop(BLUE, 160, 80), crop(ORANGE, 40, 20)]])
    _, _, blue_height, blue_width = box(sheet, BLUE)
    _, _, orange_height, orange_width = box(sheet, ORANGE)
    assert blue_height / orange_height == pytest.approx(4, rel=0.1)
    assert blue_width / orange_width == pytest.approx(4, rel=0.1)


def test_the_largest_crops_fill_their_place_and_stay_whole(tmp_path: Path) -> None:
    usual = [[crop(ORANGE, 80, 40)] for _ in range(20)]
    sheet = saved(tmp_path, [*usual, [crop(BLUE, 800, 1600)]])
    assert box(sheet, BLUE)[2:] == (CELL_SIZE_PX[1] // 2, CELL_SIZE_PX[1])


def test_crops_stand_on_the_bottom_of_their_places_in_rows_and_columns(tmp_path: Path) -> None:
    small = crop(BLUE, 32, 16)
    place = saved(tmp_path, [[small, None], [None, crop(ORANGE, 160, 80)]])
    blue_top, blue_left, blue_height, _ = box(place, BLUE)
    orange_top, orange_left, _, _ = box(place, ORANGE)
    assert blue_left < orange_left
    assert blue_top + blue_height < orange_top
    moved = box(saved(tmp_path, [[crop(ORANGE, 160, 80), small]]), BLUE)
    assert moved[0] == blue_top
    assert moved[1] > blue_left
    beside = box(saved(tmp_path, [[crop(ORANGE, 160, 80), small]]), ORANGE)
    assert moved[0] + moved[2] == beside[0] + beside[2]


def test_names_make_room_for_themselves(tmp_path: Path) -> None:
    grid = [[crop(BLUE)], [crop(BLUE)]]
    plain = saved(tmp_path, grid).shape
    with_rows = saved(tmp_path, grid, row_names=["person 1\nseen twice", "person 2"]).shape
    with_columns = saved(tmp_path, grid, column_names=["camera 1"]).shape
    assert with_rows[1] > plain[1] + 50
    assert with_rows[0] == plain[0]
    assert with_columns[0] > plain[0] + 10
    assert with_columns[1] == plain[1]


def test_the_size_of_a_crop_is_written_below_it(tmp_path: Path) -> None:
    one, other = (saved(tmp_path, [[crop(BLUE, 128, width)]]) for width in (64, 63))
    assert (one[-45:] != other[-45:]).any()


def test_an_empty_grid_is_still_a_picture(tmp_path: Path) -> None:
    assert saved(tmp_path, [[None]]).size > 0


@pytest.mark.parametrize("names", [{"row_names": ["a", "b"]}, {"column_names": ["a", "b"]}])
def test_names_must_belong_to_rows_and_columns(tmp_path: Path, names: dict[str, list[str]]) -> None:
    with pytest.raises(ValueError, match=r"_names: 2 names for 1"):
        saved(tmp_path, [[crop(BLUE)]], **names)
