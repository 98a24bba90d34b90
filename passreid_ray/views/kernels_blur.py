"""Gaussian blur of views, pixel for pixel what Pillow's three passes of an extended box blur give."""

# Shape letters: V views of one size, N pixels of a line or a plane.

import math

import numba
import numpy as np

_PASSES = 3


# Pillow carries a running sum along each line; adding the pixels of the window anew is the same integer, and the
# compiler turns it into vector code. Radii of a few pixels at most (0 or 1 with the official settings) make it cheap.
# A whole plane is one long line to it: pixels above and below are a row away, pixels left and right are padded.
@numba.njit(nogil=True, cache=True, error_model="numpy")
def blur_views(views_V3HW, radius_V) -> None:
    """Blur each view by its Gaussian of standard deviation ``radius_V`` pixels; NaN leaves it as it is.

    uint8 ``views_V3HW`` and float64 ``radius_V``, both C-contiguous. Equals ``PIL.ImageFilter.GaussianBlur``.
    """
    height, width = views_V3HW.shape[2:]
    size = height * width
    planes = views_V3HW.reshape(-1)
    for v in range(views_V3HW.shape[0]):
        if math.isnan(radius_V[v]):
            continue
        box_radius = _box_radius(np.float32(radius_V[v]))
        reach = int(box_radius)
        bulk_weight = np.uint32(np.float32(1 << 24) / (box_radius * np.float32(2) + np.float32(1)))
        edge_weight = np.uint32(((1 << 24) - (2 * reach + 1) * np.int64(bulk_weight)) // 2)
        pad = reach + 1
        stride = width + 2 * pad
        one = np.empty((height + 2 * pad) * stride, np.uint8)
        other = np.empty(one.size, np.uint8)
        sums = np.empty(one.size if reach > 1 else 0, np.uint32)
        for channel in range(3):
            plane = planes[(v * 3 + channel) * size : (v * 3 + channel + 1) * size]

            for y in range(height):
                _copy(plane, y * width, one, y * stride + pad, width)
            source, target = one, other
            for _ in range(_PASSES):
                _pad_rows(source, height, width, pad)
                _box_pass(source, 1, reach, height * stride, bulk_weight, edge_weight, target, sums)
                source, target = target, source

            for y in range(height):
                _copy(source, y * stride + pad, target, (y + pad) * width, width)
            source, target = target, source
            for _ in range(_PASSES):
                _pad_columns(source, height, width, pad)
                _box_pass(source, width, reach, (height + 2 * pad) * width, bulk_weight, edge_weight, target, sums)
                source, target = target, source
            _copy(source, pad * width, plane, 0, size)


@numba.njit(nogil=True, error_model="numpy")
def _box_radius(radius) -> np.float32:
    """Radius of the box whose passes make the Gaussian (Gwosdek et al., SSVM 2011); all in float32, as in Pillow."""
    variance = np.float32(radius * radius / np.float32(_PASSES))
    length = np.float32(math.sqrt(12.0 * np.float64(variance) + 1.0))
    whole = np.float32(math.floor((np.float64(length) - 1.0) / 2.0))
    one, two, three, six = np.float32(1), np.float32(2), np.float32(3), np.float32(6)
    part = (two * whole + one) * (whole * (whole + one) - three * variance)
    part /= six * (variance - (whole + one) * (whole + one))
    return np.float32(whole + part)


@numba.njit(nogil=True)
def _copy(source, source_start, target, target_start, length) -> None:
    for i in range(length):
        target[target_start + i] = source[source_start + i]


# Pixels outside of the view repeat its border.
@numba.njit(nogil=True)
def _pad_rows(plane, height, width, pad) -> None:
    for y in range(height):
        start = y * (width + 2 * pad)
        for i in range(pad):
            plane[start + i] = plane[start + pad]
            plane[start + pad + width + i] = plane[start + pad + width - 1]


@numba.njit(nogil=True)
def _pad_columns(plane, height, width, pad) -> None:
    for row in range(pad):
        _copy(plane, pad * width, plane, row * width, width)
        _copy(plane, (height + pad - 1) * width, plane, (height + pad + row) * width, width)


@numba.njit(nogil=True)
def _box_pass(plane, step, reach, size, bulk_weight, edge_weight, out, sums) -> None:
    """Box blur along the axis whose neighbours are ``step`` apart; what it writes into the padding means nothing."""
    margin = (reach + 1) * step
    length = size - 2 * margin
    left, right = plane[:length], plane[2 * margin : 2 * margin + length]
    target = out[margin : margin + length]
    half = 1 << 23
    if reach == 0:
        a = plane[margin : margin + length]
        for i in range(length):
            target[i] = np.uint32(a[i] * bulk_weight + (left[i] + right[i]) * edge_weight + half) >> 24
    elif reach == 1:
        a = plane[margin - step : margin - step + length]
        b = plane[margin : margin + length]
        c = plane[margin + step : margin + step + length]
        for i in range(length):
            bulk = a[i] + b[i] + c[i]
            target[i] = np.uint32(bulk * bulk_weight + (left[i] + right[i]) * edge_weight + half) >> 24
    else:
        total = sums[:length]
        for i in range(length):
            total[i] = 0
        for offset in range(margin - reach * step, margin + reach * step + 1, step):
            a = plane[offset : offset + length]
            for i in range(length):
                total[i] += a[i]
        for i in range(length):
            target[i] = np.uint32(total[i] * bulk_weight + (left[i] + right[i]) * edge_weight + half) >> 24
