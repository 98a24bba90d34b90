from pathlib import Path

import numpy as np
import torch
from PIL import Image

from passreid_ray.viz.attention import attention_picture


def saved(path: Path, images_BCHW: torch.Tensor, maps_BhTHW: torch.Tensor) -> np.ndarray:
    attention_picture(images_BCHW, maps_BhTHW, path)
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), dtype=float)


def test_there_is_a_row_per_crop_and_a_column_for_the_crop_and_every_token(tmp_path: Path) -> None:
    small = saved(tmp_path / "a.png", torch.rand(1, 3, 64, 32), torch.rand(1, 2, 2, 4, 2))
    large = saved(tmp_path / "b.png", torch.rand(3, 3, 64, 32), torch.rand(3, 2, 4, 4, 2))
    assert large.shape[0] > 2.5 * small.shape[0]
    assert large.shape[1] > 1.4 * small.shape[1]


def test_a_map_is_bright_where_the_token_looks(tmp_path: Path) -> None:
    maps_BhTHW = torch.zeros(1, 1, 2, 4, 2)
    maps_BhTHW[:, :, 0, 0], maps_BhTHW[:, :, 1, -1] = 1, 1  # CLS looks at the top, the part at the bottom
    pixels = saved(tmp_path / "a.png", torch.full((1, 3, 64, 32), 0.5), maps_BhTHW)
    dark_HW = (pixels.max(axis=2) - pixels.min(axis=2) < 1) & (pixels.mean(axis=2) > 250)
    columns = np.flatnonzero(~dark_HW.all(axis=0))
    groups = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1)
    crop, cls, part = sorted(sorted(groups, key=len)[-3:], key=lambda group: group[0])
    height = len(pixels)

    def brightness(group: np.ndarray, rows: slice) -> float:
        return pixels[rows, group[len(group) // 4] : group[-len(group) // 4]].mean()

    top, bottom = slice(height // 5, height // 3), slice(-height // 4, -height // 10)
    assert brightness(cls, top) > brightness(cls, bottom) + 20
    assert brightness(part, bottom) > brightness(part, top) + 20
    assert abs(brightness(crop, top) - brightness(crop, bottom)) < 1


def test_a_map_without_any_contrast_can_be_drawn(tmp_path: Path) -> None:
    assert np.isfinite(saved(tmp_path / "a.png", torch.rand(1, 3, 64, 32), torch.full((1, 2, 2, 4, 2), 0.1))).all()
