"""The view of retrieval training: the whole image in its own proportions, with a cut-out that grows."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from passreid_ray.config import Section
from passreid_ray.views.boxes import Box, uniform
from passreid_ray.views.config import Probability, SizePx
from passreid_ray.views.pixels import to_image

Pixels = NDArray[np.uint8]

_CUTOUT_ASPECT = (0.5, 2.0)
"""Height / width of the cut-out's box, both as fractions of the image's."""


class Grid(NamedTuple):
    """Patches of a canvas that hold any of the image: ``rows`` from the top, ``columns`` from the left."""

    rows: int
    columns: int


class UndistortedViewConfig(Section):
    """Views that keep the proportions of the image; the cut-out follows arXiv:1801.05339, which gives no figures."""

    image_size_px: SizePx = (384, 192)
    """Height and width of the canvas: the image is scaled to fit into it. Whole patches each way."""
    flip_probability: Probability = 0.0
    """Chance that the image is mirrored; the paper saw no gain."""
    cutout_probability: Probability = 0.5
    """Chance that a box of the image is filled with random noise."""
    cutout_start: Probability = 0.0
    """Largest area of the box at the first step, as a fraction of the image's."""
    cutout_end: Probability = 0.3
    """Largest area of the box at the last step, as a fraction of the image's; it grows evenly in between."""

    def largest_cutout(self, progress: float) -> float:
        """Largest area of the cut-out as a fraction of the image's; ``progress`` is 0 at the first step, 1 at the last.

        Raises ``ValueError`` outside 0..1.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress: expected a number in 0..1, got {progress}")
        return self.cutout_start + (self.cutout_end - self.cutout_start) * progress


@dataclass(frozen=True, slots=True)
class CutOut:
    """A box in fractions of the image, and what fills it."""

    height: float
    width: float
    top: float
    """0 is as far up as the box can lie, 1 as far down."""
    left: float
    noise_seed: int

    def box(self, height_px: int, width_px: int) -> Box:
        """Pixels of the box in an image of that size: whole ones, never more than its fractions say; maybe none."""
        box_height, box_width = int(self.height * height_px), int(self.width * width_px)
        top = int(self.top * (height_px - box_height + 1))
        left = int(self.left * (width_px - box_width + 1))
        return Box(top, left, box_height, box_width)


@dataclass(frozen=True, slots=True)
class UndistortedDraw:
    """Every random decision of one view, in the order it is carried out."""

    flip: bool
    cutout: CutOut | None


class UndistortedView:
    """View of one image without distortion (Almazán et al., arXiv:1801.05339, section 3).

    A pure function of the image, the generator and the progress of training, so that equal generators give equal
    views in every process. ``fill``, ``(3,)``, is the colour beside the image. The cut-out's area is drawn evenly from
    0 to ``config.largest_cutout(progress)``.
    """

    def __init__(self, config: UndistortedViewConfig, fill: NDArray[np.uint8], patch_px: int = 16) -> None:
        self.config = config
        self.patch_px = patch_px
        self._fill = fill

    def __call__(self, image_HWC: Pixels, rng: np.random.Generator, progress: float) -> tuple[Pixels, Grid]:
        """Pixels of the view, ``(3, H, W)`` uint8 before normalisation, and its grid; see ``undistorted_pixels``.

        ``progress``: 0 at the first step of training, 1 at the last; ``ValueError`` outside. Raises ``UserError`` for
        anything but a non-empty uint8 RGB image.
        """
        return self.render(image_HWC, self.draw(rng, progress))

    def draw(self, rng: np.random.Generator, progress: float) -> UndistortedDraw:
        """The random decisions behind a view; they do not depend on the image."""
        largest = self.config.largest_cutout(progress)
        return UndistortedDraw(
            flip=rng.random() < self.config.flip_probability,
            cutout=_draw_cutout(largest, rng) if rng.random() < self.config.cutout_probability else None,
        )

    def render(self, image_HWC: Pixels, draw: UndistortedDraw) -> tuple[Pixels, Grid]:
        """Scale and change ``image_HWC`` as drawn."""
        pixels_3HW, grid = undistorted_pixels(image_HWC, self.config.image_size_px, self._fill, self.patch_px)
        height, width = scaled_size_px(image_HWC, self.config.image_size_px)
        if draw.flip:  # the image alone: it stays top left
            pixels_3HW[:, :height, :width] = pixels_3HW[:, :height, :width][:, :, ::-1].copy()
        if draw.cutout is not None:
            top, left, box_height, box_width = draw.cutout.box(height, width)
            noise = np.random.default_rng(draw.cutout.noise_seed)
            pixels_3HW[:, top : top + box_height, left : left + box_width] = noise.integers(
                0, 256, (3, box_height, box_width), np.uint8
            )
        return pixels_3HW, grid


def undistorted_pixels(
    image_HWC: Pixels, canvas_px: tuple[int, int], fill: NDArray[np.uint8], patch_px: int = 16
) -> tuple[Pixels, Grid]:
    """The image scaled by one factor to fit ``canvas_px`` = (height, width), top left; the rest is ``fill``, ``(3,)``.

    Bicubic, antialiased, as PIL; small images are scaled up. Returns the canvas, uint8 ``(3, H, W)``, and the patches
    of ``patch_px`` that hold any of the image. Raises ``UserError`` for anything but a non-empty uint8 RGB image.
    """
    image = to_image(image_HWC)
    height, width = scaled_size_px(image_HWC, canvas_px)
    canvas_3HW = np.empty((3, *canvas_px), np.uint8)
    canvas_3HW[:] = fill[:, None, None]
    scaled = image.resize((width, height), Image.Resampling.BICUBIC)
    canvas_3HW[:, :height, :width] = np.asarray(scaled).transpose(2, 0, 1)
    return canvas_3HW, Grid(math.ceil(height / patch_px), math.ceil(width / patch_px))


def scaled_size_px(image_HWC: Pixels, canvas_px: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the image on the canvas: its own proportions to the nearest pixel, at least one each way."""
    height, width = image_HWC.shape[:2]
    # In whole numbers, so that the side that decides is the canvas's to the pixel.
    if height * canvas_px[1] >= width * canvas_px[0]:
        return canvas_px[0], max(1, round(width * canvas_px[0] / height))
    return max(1, round(height * canvas_px[1] / width)), canvas_px[1]


def crop_to_grids(images_BCHW: Tensor, grids_B2: Tensor, patch_px: int) -> Tensor:
    """The canvases cut to the smallest that holds every grid: ``(B, C, rows * patch_px, columns * patch_px)``, a view.

    ``grids_B2``: rows and columns of each image, ints, best on the CPU (their maximum is read). Raises ``ValueError``
    when a grid is larger than the canvas.
    """
    rows, columns = torch.amax(grids_B2, dim=0).tolist()
    height, width = rows * patch_px, columns * patch_px
    if height > images_BCHW.shape[-2] or width > images_BCHW.shape[-1]:
        raise ValueError(
            f"grids: {rows} x {columns} patches of {patch_px} px do not fit on a canvas of "
            f"{images_BCHW.shape[-2]} x {images_BCHW.shape[-1]} px"
        )
    return images_BCHW[..., :height, :width]


def _draw_cutout(largest: float, rng: np.random.Generator) -> CutOut | None:
    """A box of random area, at most ``largest``; None when nothing may be cut."""
    area = uniform(rng, (0.0, largest))
    aspect = math.exp(uniform(rng, (math.log(_CUTOUT_ASPECT[0]), math.log(_CUTOUT_ASPECT[1]))))
    top, left, noise_seed = rng.random(), rng.random(), int(rng.integers(2**63))
    if area == 0:
        return None
    height = min(1.0, max(area, math.sqrt(area * aspect)))  # neither side above the image's
    return CutOut(height, area / height, top, left, noise_seed)
