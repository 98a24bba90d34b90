"""The random decisions behind the views of many images, as arrays: ``PartViews.draw``, five times as fast."""

# Shape letters: N images, V views of one image: the two global ones, then the L local ones of each of P parts.

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray

from passreid_ray.views.augment import ViewKind, global_kinds, local_kind
from passreid_ray.views.boxes import Box, central_box, part_bands
from passreid_ray.views.config import ViewsConfig

_TRIES = 10


@dataclass(frozen=True, slots=True)
class ViewDraws:
    """Every random decision of the views of N images; ``ViewDraw`` says it of one view."""

    boxes_NV4: NDArray[np.int32]
    """Top, left, height, width in pixels of the whole image."""
    flip_NV: NDArray[np.bool_]
    jitter_order_NV4: NDArray[np.int8]
    """Order of 0 brightness, 1 contrast, 2 saturation, 3 hue; -1 four times in a view without jitter."""
    jitter_NV4: NDArray[np.float64]
    """Factors of brightness, contrast and saturation, hue in turns; NaN: unchanged."""
    grey_NV: NDArray[np.bool_]
    blur_radius_NV: NDArray[np.float64]
    """Standard deviation in pixels of the view; NaN: no blur."""
    solarize_NV: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.boxes_NV4)

    def take(self, indices: Sequence[int] | NDArray[np.integer | np.bool_] | slice) -> "ViewDraws":
        """The draws of the images at ``indices``: integers, a mask or a slice."""
        return self._map(lambda array: array[indices])

    def read_only(self) -> "ViewDraws":
        """The same arrays as read-only views: what compiled code is given, so that it is compiled for one type only."""
        return self._map(read_only)

    def _map(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> "ViewDraws":
        names = (field.name for field in dataclasses.fields(self))
        return ViewDraws(**{name: change(getattr(self, name)) for name in names})


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    """A view of ``array`` that cannot be written through."""
    view = array.view()
    view.flags.writeable = False
    return view


def draw_views(config: ViewsConfig, sizes_N2: ArrayLike, rngs: Sequence[np.random.Generator]) -> ViewDraws:
    """What ``PartViews(config).draw`` decides for each image: the same numbers, and each generator ends where it would.

    ``sizes_N2``: height and width of each image, at least 1. ``rngs``: one generator for each image; one that serves
    several images is drawn from in their order.
    """
    sizes_N2 = np.asarray(sizes_N2, np.int64).reshape(-1, 2)
    kinds = [*global_kinds(config), *[local_kind(config)] * (config.num_parts * config.local_views_per_part)]
    settings = _settings(config, kinds)
    shape = len(sizes_N2), len(kinds)
    draws = ViewDraws(
        boxes_NV4=np.empty((*shape, 4), np.int32),
        flip_NV=np.empty(shape, np.bool_),
        jitter_order_NV4=np.empty((*shape, 4), np.int8),
        jitter_NV4=np.empty((*shape, 4), np.float64),
        grey_NV=np.empty(shape, np.bool_),
        blur_radius_NV=np.empty(shape, np.float64),
        solarize_NV=np.empty(shape, np.bool_),
    )
    arrays = tuple(getattr(draws, field.name) for field in dataclasses.fields(draws))
    regions: dict[tuple[int, int], NDArray[np.int64]] = {}
    for n, (size, rng) in enumerate(zip(sizes_N2.tolist(), rngs, strict=True)):
        height, width = size
        if (height, width) not in regions:
            regions[height, width] = _regions_V24(config, height, width)
        _draw_image(rng, n, regions[height, width], settings, arrays)
    return draws


class _Settings(NamedTuple):
    """What the kernel needs of the config, per view where views differ."""

    scale_V2: NDArray[np.float64]
    log_aspect_V2: NDArray[np.float64]
    blur_probability_V: NDArray[np.float64]
    solarize_probability_V: NDArray[np.float64]
    jitter_range_42: NDArray[np.float64]
    """NaN: this change is neither drawn nor made."""
    blur_range_2: NDArray[np.float64]
    flip_probability: float
    jitter_probability: float
    grey_probability: float


def _settings(config: ViewsConfig, kinds: list[ViewKind]) -> _Settings:
    strengths = config.brightness, config.contrast, config.saturation
    ranges = [(max(0.0, 1 - strength), 1 + strength) if strength else (math.nan, math.nan) for strength in strengths]
    ranges.append((-config.hue, config.hue) if config.hue else (math.nan, math.nan))
    return _Settings(
        scale_V2=np.array([kind.scale for kind in kinds]),
        # math.log, not np.log: the two may differ in the last bit.
        log_aspect_V2=np.array([[math.log(bound) for bound in kind.aspect] for kind in kinds]),
        blur_probability_V=np.array([kind.blur_probability for kind in kinds], np.float64),
        solarize_probability_V=np.array([kind.solarize_probability for kind in kinds], np.float64),
        jitter_range_42=np.array(ranges, np.float64),
        blur_range_2=np.array(config.blur_radius_px, np.float64),
        flip_probability=float(config.flip_probability),
        jitter_probability=float(config.jitter_probability),
        grey_probability=float(config.grey_probability),
    )


def _regions_V24(config: ViewsConfig, height: int, width: int) -> NDArray[np.int64]:
    """The region that each view is cut from, and the box (within the region) where no random one fits."""

    def region_and_fallback(region: Box, aspect: tuple[float, float]) -> tuple[Box, Box]:
        return region, central_box(region.height, region.width, aspect)

    regions = [region_and_fallback(Box(0, 0, height, width), config.global_aspect)] * 2
    for band in part_bands(height, width, config.num_parts, config.part_height):
        regions += [region_and_fallback(band, config.local_aspect)] * config.local_views_per_part
    return np.array(regions, np.int64)


# The draws of boxes.random_box and augment.draw_view, in their order.
@numba.njit(nogil=True, cache=True)
def _draw_image(rng, n, regions_V24, settings, arrays) -> None:
    boxes_NV4, flip_NV, jitter_order_NV4, jitter_NV4, grey_NV, blur_radius_NV, solarize_NV = arrays
    for v in range(regions_V24.shape[0]):
        _draw_box(rng, regions_V24[v], settings.scale_V2[v], settings.log_aspect_V2[v], boxes_NV4[n, v])
        flip_NV[n, v] = rng.random() < settings.flip_probability
        jitter_order_NV4[n, v] = -1
        jitter_NV4[n, v] = np.nan
        if rng.random() < settings.jitter_probability:
            _draw_order(rng, jitter_order_NV4[n, v])
            for change in range(4):
                low, high = settings.jitter_range_42[change]
                if not math.isnan(low):
                    jitter_NV4[n, v, change] = low + (high - low) * rng.random()
        grey_NV[n, v] = rng.random() < settings.grey_probability
        blur_radius_NV[n, v] = np.nan
        if rng.random() < settings.blur_probability_V[v]:
            low, high = settings.blur_range_2
            blur_radius_NV[n, v] = low + (high - low) * rng.random()
        solarize_NV[n, v] = rng.random() < settings.solarize_probability_V[v]


# rng.permutation(4), which takes numba four seconds to compile: NumPy's shuffle, with its rejection under a mask.
@numba.njit(nogil=True)
def _draw_order(rng, order_4) -> None:
    for i in range(4):
        order_4[i] = i
    for last in range(3, 0, -1):
        mask = 3 if last > 1 else 1
        other = rng.integers(0, 1 << 32) & mask
        while other > last:
            other = rng.integers(0, 1 << 32) & mask
        order_4[last], order_4[other] = order_4[other], order_4[last]


@numba.njit(nogil=True)
def _draw_box(rng, region_24, scale_2, log_aspect_2, box_4) -> None:
    top, left, height, width = region_24[0]
    for _ in range(_TRIES):
        area = height * width * (scale_2[0] + (scale_2[1] - scale_2[0]) * rng.random())
        ratio = math.exp(log_aspect_2[0] + (log_aspect_2[1] - log_aspect_2[0]) * rng.random())
        box_width = round(math.sqrt(area * ratio))
        box_height = round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            box_4[0] = top + rng.integers(0, height - box_height + 1)
            box_4[1] = left + rng.integers(0, width - box_width + 1)
            box_4[2] = box_height
            box_4[3] = box_width
            return
    box_4[0] = top + region_24[1, 0]
    box_4[1] = left + region_24[1, 1]
    box_4[2] = region_24[1, 2]
    box_4[3] = region_24[1, 3]
