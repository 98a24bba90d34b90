"""Settings of the views."""

import math
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, model_validator

from passreid_ray.config import Section

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0)]
SizePx = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
Triple = tuple[float, float, float]

OFFICIAL_ASPECT = (3 / 4, 4 / 3)


def _positive(values: Triple) -> Triple:
    if min(values) <= 0:
        raise ValueError("expected three numbers above 0")
    return values


def _area_range(values: tuple[float, float]) -> tuple[float, float]:
    if not 0 < values[0] <= values[1] <= 1:
        raise ValueError("expected [low, high] with 0 < low <= high <= 1, fractions of the area")
    return values


def _aspect_range(values: tuple[float, float]) -> tuple[float, float]:
    if not 0 < values[0] <= values[1]:
        raise ValueError("expected [low, high] with 0 < low <= high, the ratio of two sides")
    return values


AreaRange = Annotated[tuple[float, float], AfterValidator(_area_range)]
AspectRange = Annotated[tuple[float, float], AfterValidator(_aspect_range)]
PositiveTriple = Annotated[Triple, AfterValidator(_positive)]


class PixelStatistics(Section):
    """What turns pixels 0..255 into network input: ``(pixel / 255 - mean) / std`` per channel."""

    mean: Triple = (0.485, 0.456, 0.406)
    """Mean of R, G, B on the scale 0..1; the default is ImageNet's."""
    std: PositiveTriple = (0.229, 0.224, 0.225)
    """Standard deviation of R, G, B on the scale 0..1; the default is ImageNet's."""

    @property
    def mean_colour(self) -> NDArray[np.uint8]:
        """``(3,)``: the mean as a colour, which normalises to about 0."""
        return np.clip(np.rint(np.asarray(self.mean) * 255), 0, 255).astype(np.uint8)


class ViewsConfig(PixelStatistics):
    """Part-aware multi-crop: two global views of the image, a few local views of each body band."""

    global_size_px: SizePx = (256, 128)
    """Height and width of a global view."""
    local_size_px: SizePx = (128, 64)
    """Height and width of a local view."""
    num_parts: Annotated[int, Field(ge=1)] = 3
    """P: horizontal bands of equal height, evenly spread from the top to the bottom of the image."""
    local_views_per_part: Annotated[int, Field(ge=1)] = 3
    """L: local views cut from each band."""
    part_height: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Height of a band as a fraction of the image height. A single part is always the whole image."""

    global_scale: AreaRange = (0.4, 1.0)
    """Area of a global view's box as a fraction of the image area."""
    local_scale: AreaRange = (0.1, 0.8)
    """Area of a local view's box as a fraction of its band's area."""
    aspect: Literal["official", "person"] = "person"
    """Width / height of the boxes: "official" is the reference's 3/4..4/3, too wide for upright person images, where
    most global boxes fall back to one fixed central crop; "person" uses the two ranges below."""
    person_global_aspect: AspectRange = (0.35, 0.7)
    """Width / height of a global view's box with aspect = "person"."""
    person_local_aspect: AspectRange = (0.35, 0.7)
    """Width / height of a local view's box with aspect = "person"."""

    flip_probability: Probability = 0.5
    """Chance that a view is mirrored."""
    jitter_probability: Probability = 0.8
    """Chance that brightness, contrast, saturation and hue are changed, in random order."""
    brightness: Strength = 0.4
    """Brightness factor is drawn from 1 - this .. 1 + this (not below 0)."""
    contrast: Strength = 0.4
    """Contrast factor is drawn from 1 - this .. 1 + this (not below 0)."""
    saturation: Strength = 0.2
    """Saturation factor is drawn from 1 - this .. 1 + this (not below 0)."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Hue shift is drawn from -this .. this, in turns of the colour circle."""
    grey_probability: Probability = 0.2
    """Chance that a view loses its colours."""
    blur_radius_px: tuple[float, float] = (0.1, 2.0)
    """Range of the Gaussian blur's standard deviation, in pixels of the view."""
    global_blur_probability: tuple[Probability, Probability] = (1.0, 0.1)
    """Chance that the first and the second global view is blurred."""
    global_solarize_probability: tuple[Probability, Probability] = (0.0, 0.2)
    """Chance that the first and the second global view is solarized (channel values from 128 on inverted)."""
    local_blur_probability: Probability = 0.5
    """Chance that a local view is blurred."""
    local_solarize_probability: Probability = 0.0
    """Chance that a local view is solarized."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.blur_radius_px
        if not 0 <= low <= high:
            raise ValueError(f"blur_radius_px: expected [low, high] with 0 <= low <= high, got {[low, high]}")
        covered = self.num_parts * self.part_height
        if self.num_parts > 1 and covered < 1 and not math.isclose(covered, 1):
            raise ValueError(
                f"part_height: {self.num_parts} bands of {self.part_height:g} leave gaps between them; "
                f"give at least {1 / self.num_parts:.3g}"
            )
        return self

    @property
    def global_aspect(self) -> tuple[float, float]:
        """Width / height range of a global view's box."""
        return OFFICIAL_ASPECT if self.aspect == "official" else self.person_global_aspect

    @property
    def local_aspect(self) -> tuple[float, float]:
        """Width / height range of a local view's box."""
        return OFFICIAL_ASPECT if self.aspect == "official" else self.person_local_aspect
