"""One view: the random decisions behind it, then its pixels; apart, so that each can be tested."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from passreid_ray.views.boxes import Box, random_box, uniform
from passreid_ray.views.colour import adjust_brightness, adjust_contrast, adjust_saturation, shift_hue, to_grey
from passreid_ray.views.config import ViewsConfig


class ViewKind(NamedTuple):
    """What differs between the first global, the second global and the local views."""

    size_px: tuple[int, int]
    scale: tuple[float, float]
    aspect: tuple[float, float]
    blur_probability: float
    solarize_probability: float


@dataclass(frozen=True, slots=True)
class Jitter:
    """Colour changes of one view; ``order`` lists 0 brightness, 1 contrast, 2 saturation, 3 hue. None: unchanged."""

    order: tuple[int, ...]
    brightness: float | None
    contrast: float | None
    saturation: float | None
    hue_turns: float | None


@dataclass(frozen=True, slots=True)
class ViewDraw:
    """Every random decision of one view, in the order it is carried out."""

    box: Box
    flip: bool
    jitter: Jitter | None
    grey: bool
    blur_radius_px: float | None
    solarize: bool


def global_kinds(config: ViewsConfig) -> tuple[ViewKind, ViewKind]:
    """The first and the second global view."""
    first, second = zip(config.global_blur_probability, config.global_solarize_probability, strict=True)
    shared = config.global_size_px, config.global_scale, config.global_aspect
    return ViewKind(*shared, *first), ViewKind(*shared, *second)


def local_kind(config: ViewsConfig) -> ViewKind:
    """A local view."""
    return ViewKind(
        config.local_size_px,
        config.local_scale,
        config.local_aspect,
        config.local_blur_probability,
        config.local_solarize_probability,
    )


def draw_view(region: Box, kind: ViewKind, config: ViewsConfig, rng: np.random.Generator) -> ViewDraw:
    """Draw the decisions of one view cut from ``region`` of the image; the box is in pixels of the whole image."""
    box = random_box(region.height, region.width, kind.scale, kind.aspect, rng)
    return ViewDraw(
        box=Box(region.top + box.top, region.left + box.left, box.height, box.width),
        flip=rng.random() < config.flip_probability,
        jitter=_draw_jitter(config, rng) if rng.random() < config.jitter_probability else None,
        grey=rng.random() < config.grey_probability,
        blur_radius_px=uniform(rng, config.blur_radius_px) if rng.random() < kind.blur_probability else None,
        solarize=rng.random() < kind.solarize_probability,
    )


def _draw_jitter(config: ViewsConfig, rng: np.random.Generator) -> Jitter:
    def factor(strength: float) -> float | None:
        return uniform(rng, (max(0.0, 1 - strength), 1 + strength)) if strength else None

    return Jitter(
        order=tuple(rng.permutation(4).tolist()),
        brightness=factor(config.brightness),
        contrast=factor(config.contrast),
        saturation=factor(config.saturation),
        hue_turns=uniform(rng, (-config.hue, config.hue)) if config.hue else None,
    )


def render_view(image: Image.Image, draw: ViewDraw, size_px: tuple[int, int]) -> Image.Image:
    """Cut, resize and change ``image`` as drawn: the steps of the reference, in its order."""
    (top, left, height, width), (view_height, view_width) = draw.box, size_px
    # Crop first: resize(box=...) would let the filter look at pixels outside the box.
    region = image.crop((left, top, left + width, top + height))
    view = region.resize((view_width, view_height), Image.Resampling.BICUBIC)
    if draw.flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if draw.jitter is not None:
        view = _apply_jitter(view, draw.jitter)
    if draw.grey:
        view = to_grey(view)
    if draw.blur_radius_px is not None:
        view = view.filter(ImageFilter.GaussianBlur(draw.blur_radius_px))
    if draw.solarize:
        view = ImageOps.solarize(view)
    return view


def _apply_jitter(view: Image.Image, jitter: Jitter) -> Image.Image:
    for change in jitter.order:
        match change:
            case 0 if jitter.brightness is not None:
                view = adjust_brightness(view, jitter.brightness)
            case 1 if jitter.contrast is not None:
                view = adjust_contrast(view, jitter.contrast)
            case 2 if jitter.saturation is not None:
                view = adjust_saturation(view, jitter.saturation)
            case 3 if jitter.hue_turns is not None:
                view = shift_hue(view, jitter.hue_turns)
            case _:
                pass
    return view
