"""The one view that fine-tuning and clustering train on: resize, flip, shift, random erasing."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from passreid_ray.views.boxes import Box, uniform
from passreid_ray.views.config import (
    AreaRange,
    AspectRange,
    PixelStatistics,
    PositiveTriple,
    Probability,
    SizePx,
    Triple,
)
from passreid_ray.views.evaluation import evaluation_pixels

_TRIES = 100  # as in the reference; torchvision's RandomErasing has 10

Pixels = NDArray[np.uint8]


class TrainingViewConfig(PixelStatistics):
    """Augmentation of labelled images; the defaults are those of the reference's tuning without labels."""

    mean: Triple = (0.5, 0.5, 0.5)
    """Mean of R, G, B on the scale 0..1."""
    std: PositiveTriple = (0.5, 0.5, 0.5)
    """Standard deviation of R, G, B on the scale 0..1."""
    image_size_px: SizePx = (256, 128)
    """Height and width of the view."""
    flip_probability: Probability = 0.5
    """Chance that the view is mirrored."""
    pad_px: Annotated[int, Field(ge=0)] = 10
    """The view is shifted by up to this many pixels each way, in both directions; what comes in is black."""
    erase_probability: Probability = 0.5
    """Chance that a box is erased."""
    erase_fill: Literal["mean", "noise"] = "mean"
    """The box is filled with the mean colour, or with noise of the pixels' mean and standard deviation."""
    erase_area: AreaRange = (0.02, 0.4)
    """Area of the erased box as a fraction of the view."""
    erase_aspect: AspectRange = (0.3, 3.33)
    """Height / width of the erased box."""


@dataclass(frozen=True, slots=True)
class TrainingDraw:
    """Every random decision of one view, in the order it is carried out."""

    flip: bool
    top_px: int
    """Where the view begins in the padded image."""
    left_px: int
    erased: Box | None
    """Box of the view that is filled."""
    noise_seed: int = 0
    """Of what fills it, if that is noise."""


class TrainingView:
    """Augmented view of one image, as TransReID and Cluster Contrast train on (the scripts of arXiv:2203.03931).

    A pure function of the image and the generator: nothing global is read or changed, so equal generators give equal
    views in every process.
    """

    def __init__(self, config: TrainingViewConfig) -> None:
        self.config = config
        self._fill = config.mean_colour

    def __call__(self, image_HWC: Pixels, rng: np.random.Generator) -> Pixels:
        """Pixels of the view, ``(3, H, W)`` uint8 before normalisation; see ``normalize``.

        ``image_HWC``: uint8 RGB of any size. Raises ``UserError`` for anything but a non-empty uint8 RGB image.
        """
        return self.render(image_HWC, self.draw(rng))

    def draw(self, rng: np.random.Generator) -> TrainingDraw:
        """The random decisions behind a view; they do not depend on the image."""
        config = self.config
        return TrainingDraw(
            flip=rng.random() < config.flip_probability,
            top_px=int(rng.integers(2 * config.pad_px + 1)),
            left_px=int(rng.integers(2 * config.pad_px + 1)),
            erased=self._draw_erased(rng) if rng.random() < config.erase_probability else None,
            noise_seed=int(rng.integers(2**63)) if config.erase_fill == "noise" else 0,
        )

    def render(self, image_HWC: Pixels, draw: TrainingDraw) -> Pixels:
        """Resize and change ``image_HWC`` as drawn: the steps of the reference, in its order."""
        height, width = self.config.image_size_px
        view_3HW = evaluation_pixels(image_HWC, self.config.image_size_px)
        if draw.flip:
            view_3HW = view_3HW[:, :, ::-1]
        pad = self.config.pad_px
        padded = np.pad(view_3HW, ((0, 0), (pad, pad), (pad, pad)))
        view_3HW = padded[:, draw.top_px : draw.top_px + height, draw.left_px : draw.left_px + width].copy()
        if draw.erased is not None:
            top, left, box_height, box_width = draw.erased
            view_3HW[:, top : top + box_height, left : left + box_width] = self._filling(draw)
        return view_3HW

    def _filling(self, draw: TrainingDraw) -> Pixels:
        """What the erased box is filled with, uint8 ``(3, 1, 1)`` or ``(3, h, w)``."""
        if self.config.erase_fill == "mean" or draw.erased is None:
            return self._fill[:, None, None]
        _, _, height, width = draw.erased
        noise_3HW = np.random.default_rng(draw.noise_seed).standard_normal((3, height, width), np.float32)
        mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (self.config.mean, self.config.std))
        # As the reference: standard normal after normalisation, but for the tails that no pixel value stands for.
        return np.clip(np.rint(255 * (mean + std * noise_3HW)), 0, 255).astype(np.uint8)

    def _draw_erased(self, rng: np.random.Generator) -> Box | None:
        """A box that is smaller than the view in both directions; None when no try gave one."""
        height, width = self.config.image_size_px
        for _ in range(_TRIES):
            area = height * width * uniform(rng, self.config.erase_area)
            aspect = uniform(rng, self.config.erase_aspect)
            box_height, box_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < box_height < height and 0 < box_width < width:
                top = int(rng.integers(height - box_height + 1))
                left = int(rng.integers(width - box_width + 1))
                return Box(top, left, box_height, box_width)
        return None
