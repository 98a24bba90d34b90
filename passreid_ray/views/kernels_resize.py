"""Crop and bicubic resize of many boxes of one image, pixel for pixel what Pillow's two 8-bit passes give."""

# Shape letters: V boxes of one image, O pixels along one axis of the view, K taps, L length of a contiguous line.

import math

import numba
import numpy as np
import PIL
from numpy.typing import NDArray

# Pillow's Resample.c: weights are integers of this many fractional bits.
_BITS = 22
_SUPPORT = 2.0
# Pillow 13 (pull request 9549) starts with the vertical pass where it shrinks the height much more than the width.
_MAY_START_VERTICALLY = int(PIL.__version__.split(".")[0]) >= 13


def resize_boxes(
    image_size: tuple[int, int],
    planes: NDArray[np.uint8],
    boxes_V4: NDArray[np.int32],
    flip_V: NDArray[np.bool_],
    views_V3HW: NDArray[np.uint8],
    scratch: NDArray[np.uint8],
) -> None:
    """Write each box, resized to the size of the views and mirrored where ``flip_V`` says so, into ``views_V3HW``.

    ``planes``: what ``split_planes`` made of the image, whose height and width are ``image_size``. ``boxes_V4``: top,
    left, height, width, inside of the image: nothing checks it here. ``scratch``: at least ``scratch_size`` bytes.
    Arrays are C-contiguous. Equals Pillow's ``crop``, ``resize`` with ``BICUBIC`` and ``transpose``.
    """
    _resize_boxes(*image_size, planes, boxes_V4, flip_V, views_V3HW, scratch, _MAY_START_VERTICALLY)


def scratch_size(image_size: tuple[int, int], view_size: tuple[int, int]) -> int:
    """Bytes that ``resize_boxes`` needs between its passes: room for two planes."""
    (image_height, image_width), (view_height, view_width) = image_size, view_size
    return 2 * max(image_height * view_width, view_height * image_width, view_height * view_width)


@numba.njit(nogil=True, cache=True)
def split_planes(image_HWC, planes) -> None:
    """Fill the flat ``planes`` of ``6 * H * W`` bytes with the image as ``(3, W, H)`` and then as ``(3, H, W)``."""
    height, width = image_HWC.shape[:2]
    for y in range(height):
        for channel in range(3):
            start = ((3 + channel) * height + y) * width
            row = planes[start : start + width]
            for x in range(width):
                row[x] = image_HWC[y, x, channel]
    size = height * width
    for channel in range(3):
        upright = planes[(3 + channel) * size : (4 + channel) * size]
        _transpose(upright, height, width, planes[channel * size : (channel + 1) * size])


# Both passes add whole lines, which the compiler turns into vector code: rows in the vertical one, and columns, in a
# transposed plane, in the horizontal one. Each rounds to 8 bits, so their order matters.
@numba.njit(nogil=True, cache=True, error_model="numpy")
def _resize_boxes(
    image_height, image_width, planes, boxes_V4, flip_V, views_V3HW, scratch, may_start_vertically
) -> None:
    view_height, view_width = views_V3HW.shape[2:]
    view_size, image_size = view_height * view_width, image_height * image_width
    views = views_V3HW.reshape(-1)
    sums = np.empty(max(image_height, image_width, view_height, view_width), np.int32)
    half = scratch.size // 2
    one, other = scratch[:half], scratch[half:]
    for v in range(boxes_V4.shape[0]):
        top, left, height, width = boxes_V4[v]
        first_x, weights_x = _taps(width, view_width)
        first_y, weights_y = _taps(height, view_height)
        if flip_V[v]:
            first_x, weights_x = first_x[::-1].copy(), weights_x[::-1].copy()
        starts_vertically = may_start_vertically and height - view_height > max(0, 2 * (width - view_width))
        for channel in range(3):
            view = views[(v * 3 + channel) * view_size : (v * 3 + channel + 1) * view_size]
            if starts_vertically:
                start = (3 + channel) * image_size + top * image_width + left
                _filter_lines(planes, start, image_width, height, first_y, weights_y, one, width, sums)
                _transpose(one, view_height, width, other)
                _filter_lines(other, 0, view_height, width, first_x, weights_x, one, view_height, sums)
                _transpose(one, view_width, view_height, view)
            else:
                start = channel * image_size + left * image_height + top
                _filter_lines(planes, start, image_height, width, first_x, weights_x, one, height, sums)
                _transpose(one, view_width, height, other)
                _filter_lines(other, 0, view_width, height, first_y, weights_y, view, view_width, sums)


@numba.njit(nogil=True, error_model="numpy")
def _taps(in_size, out_size) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The first input pixel of each output pixel, ``(O,)``, and the integer weights from there on, ``(O, K)``."""
    scale = in_size / out_size
    filter_scale = max(scale, 1.0)
    support = _SUPPORT * filter_scale
    first_O = np.empty(out_size, np.int64)
    last_O = np.empty(out_size, np.int64)
    num_taps = 1
    for out in range(out_size):
        centre = (out + 0.5) * scale
        first_O[out] = max(0, int(centre - support + 0.5))
        last_O[out] = min(in_size, int(centre + support + 0.5))
        num_taps = max(num_taps, last_O[out] - first_O[out])
    weights_OK = np.zeros((out_size, num_taps), np.int32)
    exact_K = np.empty(num_taps)
    step = 1.0 / filter_scale
    for out in range(out_size):
        centre = (out + 0.5) * scale
        total = 0.0
        taps = last_O[out] - first_O[out]
        for tap in range(taps):
            exact_K[tap] = _bicubic((tap + first_O[out] - centre + 0.5) * step)
            total += exact_K[tap]
        for tap in range(taps):
            weight = (exact_K[tap] / total if total != 0 else exact_K[tap]) * (1 << _BITS)
            weights_OK[out, tap] = int(weight - 0.5) if weight < 0 else int(weight + 0.5)
    return first_O, weights_OK


@numba.njit(nogil=True)
def _bicubic(x) -> float:
    x = math.fabs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    if x < 2:
        return (((x - 5) * x + 8) * x - 4) * -0.5
    return 0.0


@numba.njit(nogil=True)
def _filter_lines(source, start, stride, lines, first_O, weights_OK, out, length, sums) -> None:
    """Each output line is a weighted sum of input lines: ``lines`` of them, ``stride`` apart from ``start`` on."""
    num_taps = weights_OK.shape[1]
    sums = sums[:length]
    for o in range(first_O.size):
        target = out[o * length : (o + 1) * length]
        weights = weights_OK[o]
        first = first_O[o]
        if num_taps == 4:
            a = _line(source, start, stride, lines, first, length)
            b = _line(source, start, stride, lines, first + 1, length)
            c = _line(source, start, stride, lines, first + 2, length)
            d = _line(source, start, stride, lines, first + 3, length)
            wa, wb, wc, wd = weights[0], weights[1], weights[2], weights[3]
            for i in range(length):
                total = np.int32((1 << (_BITS - 1)) + a[i] * wa + b[i] * wb + c[i] * wc + d[i] * wd)
                target[i] = min(max(total >> _BITS, 0), 255)
            continue
        sums[:] = 1 << (_BITS - 1)
        tap = 0
        while tap + 3 < num_taps:
            a = _line(source, start, stride, lines, first + tap, length)
            b = _line(source, start, stride, lines, first + tap + 1, length)
            c = _line(source, start, stride, lines, first + tap + 2, length)
            d = _line(source, start, stride, lines, first + tap + 3, length)
            wa, wb, wc, wd = weights[tap], weights[tap + 1], weights[tap + 2], weights[tap + 3]
            for i in range(length):
                sums[i] += np.int32(a[i] * wa + b[i] * wb + c[i] * wc + d[i] * wd)
            tap += 4
        while tap < num_taps:
            a = _line(source, start, stride, lines, first + tap, length)
            wa = weights[tap]
            for i in range(length):
                sums[i] += np.int32(a[i] * wa)
            tap += 1
        for i in range(length):
            target[i] = min(max(sums[i] >> _BITS, 0), 255)


@numba.njit(nogil=True)
def _line(source, start, stride, lines, index, length) -> NDArray[np.uint8]:
    # Past the last line the weights are zero: any line will do.
    begin = start + min(index, lines - 1) * stride
    return source[begin : begin + length]


@numba.njit(nogil=True)
def _transpose(source, rows, columns, out) -> None:
    """``out`` is the flat matrix ``source`` of ``rows`` x ``columns``, transposed; block by block for the cache."""
    for row_start in range(0, rows, 16):
        row_end = min(rows, row_start + 16)
        for column in range(columns):
            for row in range(row_start, row_end):
                out[column * rows + row] = source[row * columns + column]
