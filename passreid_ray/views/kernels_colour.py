"""Colour changes of views, pixel for pixel what ``views.colour`` does with Pillow."""

# Shape letters: V views of one size, N pixels of a plane.

import math

import numba
import numpy as np


@numba.njit(nogil=True, cache=True, error_model="numpy")
def change_colours(views_V3HW, order_V4, jitter_V4, grey_V) -> None:
    """Carry out each view's jitter in its order, then take the colours of those in ``grey_V``.

    uint8 ``views_V3HW``; int8 ``order_V4`` of 0 brightness, 1 contrast, 2 saturation, 3 hue, negative for none; float64
    ``jitter_V4`` holds their factors and the turns of the hue, NaN for none. All C-contiguous.
    """
    size = views_V3HW.shape[2] * views_V3HW.shape[3]
    pixels = views_V3HW.reshape(-1)
    for v in range(views_V3HW.shape[0]):
        start = v * 3 * size
        all_channels = pixels[start : start + 3 * size]
        red = pixels[start : start + size]
        green = pixels[start + size : start + 2 * size]
        blue = pixels[start + 2 * size : start + 3 * size]
        for place in range(4):
            change = order_V4[v, place]
            if change < 0 or math.isnan(jitter_V4[v, change]):
                continue
            amount = jitter_V4[v, change]
            if change == 0:
                _scale_distance(all_channels, 0, np.float32(amount))
            elif change == 1:
                _scale_distance(all_channels, _mean_grey(red, green, blue), np.float32(amount))
            elif change == 2:
                _saturate(red, green, blue, np.float32(amount))
            else:
                # int, then the low byte: what torchvision adds to an 8-bit hue.
                _shift_hue(red, green, blue, np.int32(int(amount * 255) & 255))
        if grey_V[v]:
            for i in range(size):
                grey = _grey(red[i], green[i], blue[i])
                red[i] = grey
                green[i] = grey
                blue[i] = grey


@numba.njit(nogil=True, cache=True)
def solarize_views(views_V3HW, solarize_V) -> None:
    """Invert the values from 128 on of the views in ``solarize_V``; equals ``PIL.ImageOps.solarize``."""
    size = views_V3HW.shape[1] * views_V3HW.shape[2] * views_V3HW.shape[3]
    pixels = views_V3HW.reshape(-1)
    for v in range(views_V3HW.shape[0]):
        if solarize_V[v]:
            view = pixels[v * size : (v + 1) * size]
            for i in range(size):
                view[i] = min(view[i], 255 - view[i])


@numba.njit(nogil=True)
def _grey(red, green, blue) -> int:
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


@numba.njit(nogil=True)
def _mean_grey(red, green, blue) -> int:
    total = 0
    for i in range(red.size):
        total += _grey(red[i], green[i], blue[i])
    return int(total / red.size + 0.5)


# Pillow's blend: float32, clipped, then cut off. Its shortcuts for 0 and 1 give the same.
@numba.njit(nogil=True)
def _scale_distance(pixels, origin, factor) -> None:
    start = np.float32(origin)
    for i in range(pixels.size):
        moved = start + factor * np.float32(pixels[i] - origin)
        pixels[i] = np.int32(min(max(moved, np.float32(0)), np.float32(255)))


@numba.njit(nogil=True)
def _saturate(red, green, blue, factor) -> None:
    for i in range(red.size):
        grey = _grey(red[i], green[i], blue[i])
        start = np.float32(grey)
        for channel in (red, green, blue):
            moved = start + factor * np.float32(channel[i] - grey)
            channel[i] = np.int32(min(max(moved, np.float32(0)), np.float32(255)))


# Pillow's conversions to 8-bit HSV and back, branch by branch turned into arithmetic, so that they become vector code.
# Types and their order matter: hue is cut off after a division in float32 and one in float64.
@numba.njit(nogil=True, error_model="numpy")
def _shift_hue(red, green, blue, shift) -> None:
    one, steps = np.float32(1), np.float32(255)
    for i in range(red.size):
        r, g, b = np.int32(red[i]), np.int32(green[i]), np.int32(blue[i])
        value = max(r, g, b)
        chroma = value - min(r, g, b)
        is_red = r == value
        is_green = g == value
        # Colours after and before the brightest one in the circle red, green, blue; red wins ties, then green.
        after = g if is_red else (b if is_green else r)
        before = b if is_red else (r if is_green else g)
        offset = 0.0 if is_red else (2.0 if is_green else 4.0)
        divisor = np.float32(max(chroma, 1))
        sixths = np.float32(offset + np.float32(value - before) / divisor - np.float32(value - after) / divisor)
        turns = sixths / 6.0 + 1.0
        fraction = np.float32(turns - math.floor(turns))
        hue = (np.int32(fraction * 255.0) + shift) & 255

        saturation = np.float32(np.int32(np.float32(chroma) / np.float32(max(value, 1)) * steps)) / steps
        spread = np.float32(value) * saturation
        rounded = np.float32(value) + np.float32(0.5)
        red_weight = np.float32(min(max(510 - abs(6 * hue - 765), 0), 255)) / steps
        green_weight = one - np.float32(min(max(510 - abs(6 * hue - 510), 0), 255)) / steps
        blue_weight = one - np.float32(min(max(510 - abs(6 * hue - 1020), 0), 255)) / steps
        red[i] = np.int32(rounded - spread * red_weight)
        green[i] = np.int32(rounded - spread * green_weight)
        blue[i] = np.int32(rounded - spread * blue_weight)
