"""What clusters are made of: a sheet with a row of crops for each."""

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

MAX_CROPS = 10

CROP_SIZE_PX = (144, 72)
GAP_PX = 8
FRAME_PX = 3
MARGIN_PX = 24
FONT_PX = 15

BACKGROUND = (255, 255, 255)
CELL = (240, 241, 244)
LINE = (226, 228, 233)
INK = (28, 31, 38)
GREY_INK = (112, 118, 130)
SAME = (46, 160, 84)
OTHER = (214, 57, 57)

Frames = Sequence[bool | None]


def cluster_sheet(
    clusters: Sequence[tuple[str, Sequence[np.ndarray]]], path: Path, frames: Sequence[Frames] | None = None
) -> None:
    """Write a PNG with one row per cluster: its caption, then its first ``MAX_CROPS`` crops at one height.

    A cluster is (caption, crops); crops are uint8 RGB ``(H, W, 3)`` of any size. What follows a colon in a caption is
    set below it. ``frames`` says for each crop whether it shows the person of most of its cluster: True draws a green
    frame, False a red one, None none. The file appears whole or not at all.
    """
    shown = frames or [[None] * len(crops) for _, crops in clusters]
    height, width = CROP_SIZE_PX
    captions = [_caption_lines(caption) for caption, _ in clusters]
    caption_px = int(max((_font(bold).getlength(text) for lines in captions for text, bold in lines), default=0)) + 1
    num_columns = max((min(len(crops), MAX_CROPS) for _, crops in clusters), default=0)
    column_px = width + 2 * FRAME_PX + GAP_PX
    first_left = MARGIN_PX + caption_px + MARGIN_PX
    sheet_width = first_left + num_columns * column_px - GAP_PX + MARGIN_PX
    row_px = height + 2 * GAP_PX + 2 * FRAME_PX
    legend_px = 2 * FONT_PX + GAP_PX if frames else 0
    sheet = Image.new("RGB", (sheet_width, 2 * GAP_PX + len(clusters) * row_px + legend_px), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for row, (lines, (_, crops), marks) in enumerate(zip(captions, clusters, shown, strict=True)):
        top = GAP_PX + row * row_px
        if row:
            pen.line([(MARGIN_PX, top), (sheet_width - MARGIN_PX, top)], fill=LINE)
        _write_caption(pen, lines, MARGIN_PX, top + row_px // 2)
        for column, (crop, mark) in enumerate(list(zip(crops, marks, strict=True))[:MAX_CROPS]):
            left = first_left + column * column_px + FRAME_PX
            _draw_crop(sheet, pen, crop, mark, left, top + GAP_PX + FRAME_PX)
    if frames:
        _write_legend(pen, MARGIN_PX, sheet.height - legend_px)
    draft = path.with_name(f"{path.name}.part")
    sheet.save(draft, format="PNG")
    os.replace(draft, path)


def _draw_crop(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, crop_HWC: np.ndarray, mark: bool | None, left: int, top: int
) -> None:
    """The crop in the middle of its cell, as large as it fits."""
    height, width = CROP_SIZE_PX
    cell = (left, top, left + width - 1, top + height - 1)
    pen.rectangle(cell, fill=CELL)
    crop = Image.fromarray(crop_HWC)
    scale = min(height / crop.height, width / crop.width)
    size = max(1, round(crop.width * scale)), max(1, round(crop.height * scale))
    corner = left + (width - size[0]) // 2, top + (height - size[1]) // 2
    sheet.paste(crop.resize(size, Image.Resampling.LANCZOS), corner)
    if mark is not None:
        frame = (cell[0] - FRAME_PX, cell[1] - FRAME_PX, cell[2] + FRAME_PX, cell[3] + FRAME_PX)
        pen.rectangle(frame, outline=SAME if mark else OTHER, width=FRAME_PX)


def _caption_lines(caption: str) -> list[tuple[str, bool]]:
    """(text, is bold) of each line."""
    title, _, details = caption.partition(": ")
    return [(title, True), *((detail, False) for detail in details.split(", ") if detail)]


def _write_caption(pen: ImageDraw.ImageDraw, lines: list[tuple[str, bool]], left: int, middle: int) -> None:
    spacing = FONT_PX + GAP_PX
    first = middle - spacing * (len(lines) - 1) // 2
    for number, (text, bold) in enumerate(lines):
        place = left, first + number * spacing
        pen.text(place, text, fill=INK if bold else GREY_INK, font=_font(bold), anchor="lm")


def _write_legend(pen: ImageDraw.ImageDraw, left: int, top: int) -> None:
    middle = top + FONT_PX // 2
    for colour, text in ((SAME, "person of most of the cluster"), (OTHER, "another person")):
        pen.rectangle((left, top, left + FONT_PX, top + FONT_PX), outline=colour, width=FRAME_PX)
        left += FONT_PX + GAP_PX
        pen.text((left, middle), text, fill=GREY_INK, font=_font(bold=False), anchor="lm")
        left += int(_font(bold=False).getlength(text)) + MARGIN_PX


@lru_cache(maxsize=2)
def _font(bold: bool) -> ImageFont.FreeTypeFont:
    # Matplotlib brings this font along, so that captions look alike on every machine.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}", FONT_PX)
