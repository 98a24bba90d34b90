"""What a data set looks like: a grid of its crops, all at one scale, so that small ones look small."""

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from passreid_ray.viz.cluster_sheet import BACKGROUND, CELL, GAP_PX, GREY_INK, INK, MARGIN_PX

CELL_SIZE_PX = (160, 96)
"""Height and width of the place that a crop has."""
SCALE_PERCENTILE = 90
"""Crops up to this percentile of the sizes keep their proportions; larger ones are shrunk until they fit."""
MAX_SCALE = 4.0
FONT_PX = 14
SIZE_FONT_PX = 11
MAX_NAME_LETTERS = 28


def contact_sheet(
    grid: Sequence[Sequence[np.ndarray | None]],
    path: Path,
    *,
    row_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
) -> None:
    """Write a PNG with the crops of ``grid`` in rows and columns, each with its width x height in pixels below it.

    Crops are uint8 RGB ``(H, W, 3)`` of any size and are shown whole, all at one scale; None leaves a place empty.
    A row's name may have several lines, of which the first is bold. The file appears whole or not at all.

    Raises:
        ValueError: there are names, but not one for each row or column.
    """
    num_columns = max((len(row) for row in grid), default=0)
    for names, number, what in ((row_names, len(grid), "row"), (column_names, num_columns, "column")):
        if names and len(names) != number:
            raise ValueError(f"{what}_names: {len(names)} names for {number} {what}s")
    height, width = CELL_SIZE_PX
    lines = [[_short(line) for line in name.split("\n")] for name in row_names]
    widths = [_font(bold=not n).getlength(line) for own in lines for n, line in enumerate(own)]
    first_left = MARGIN_PX + (int(max(widths)) + 1 + MARGIN_PX if widths else 0)
    first_top = MARGIN_PX + (FONT_PX + GAP_PX if column_names else 0)
    column_px, row_px = width + GAP_PX, height + SIZE_FONT_PX + 2 * GAP_PX
    sheet_width = first_left + num_columns * column_px - GAP_PX + MARGIN_PX
    sheet = Image.new("RGB", (sheet_width, first_top + len(grid) * row_px - GAP_PX + MARGIN_PX), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    scale = _scale([crop for row in grid for crop in row if crop is not None])
    for column, name in enumerate(column_names):
        middle = first_left + column * column_px + width // 2
        pen.text((middle, MARGIN_PX), _short(name, 14), fill=INK, font=_font(bold=True), anchor="mt")
    for number, row in enumerate(grid):
        top = first_top + number * row_px
        if lines:
            _write_name(pen, lines[number], MARGIN_PX, top + height // 2)
        for column, crop in enumerate(row):
            _draw_crop(sheet, pen, crop, scale, first_left + column * column_px, top)
    draft = path.with_name(f"{path.name}.part")
    sheet.save(draft, format="PNG")
    os.replace(draft, path)


def _scale(crops: Sequence[np.ndarray]) -> float:
    """By how much all crops are enlarged; most of them fit their place then."""
    if not crops:
        return 1.0
    heights, widths = zip(*(crop.shape[:2] for crop in crops), strict=True)
    fitting = [
        place / float(np.percentile(sizes, SCALE_PERCENTILE))
        for place, sizes in zip(CELL_SIZE_PX, (heights, widths), strict=True)
    ]
    return min(*fitting, MAX_SCALE)


def _draw_crop(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, crop_HWC: np.ndarray | None, scale: float, left: int, top: int
) -> None:
    """The crop on the bottom of its place, as if people stood on one floor."""
    height, width = CELL_SIZE_PX
    pen.rectangle((left, top, left + width - 1, top + height - 1), fill=CELL)
    if crop_HWC is None:
        return
    crop = Image.fromarray(crop_HWC)
    scale = min(scale, height / crop.height, width / crop.width)
    size = max(1, round(crop.width * scale)), max(1, round(crop.height * scale))
    corner = left + (width - size[0]) // 2, top + height - size[1]
    sheet.paste(crop.resize(size, Image.Resampling.LANCZOS), corner)
    below = left + width // 2, top + height + GAP_PX // 2
    pen.text(below, f"{crop.width} x {crop.height}", fill=GREY_INK, font=_font(SIZE_FONT_PX), anchor="mt")


def _write_name(pen: ImageDraw.ImageDraw, lines: Sequence[str], left: int, middle: int) -> None:
    spacing = FONT_PX + GAP_PX
    first = middle - spacing * (len(lines) - 1) // 2
    for number, line in enumerate(lines):
        place, is_first = (left, first + number * spacing), number == 0
        pen.text(place, line, fill=INK if is_first else GREY_INK, font=_font(bold=is_first), anchor="lm")


def _short(name: str, letters: int = MAX_NAME_LETTERS) -> str:
    """``name``, or its end, which is what tells image ids apart."""
    return name if len(name) <= letters else f"…{name[1 - letters :]}"


@lru_cache(maxsize=4)
def _font(size_px: int = FONT_PX, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    # Matplotlib brings this font along, so that captions look alike on every machine.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}", size_px)
