"""The views of a batch on the device that trains: all views of one size by the same tensor operations."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from torch import Tensor

from passreid_ray.errors import UserError
from passreid_ray.views import device_colour
from passreid_ray.views.config import ViewsConfig
from passreid_ray.views.view_draws import ViewDraws

# Shape letters: N images, M views (of several images), O pixels along one side of a view, S pixels along one side of
# an image, K taps of the resampling filter.

_NUM_GLOBAL = 2
_WEIGHT_BITS = 22
"""Pillow's resampling weights are whole multiples of 2^-22."""
_LOW_BITS = 12
"""Weights are split into two whole numbers of at most 11 bits (and a sign): high * 2^12 + low."""
_JITTER = (
    device_colour.adjust_brightness,
    device_colour.adjust_contrast,
    device_colour.adjust_saturation,
    device_colour.shift_hue,
)
"""By the numbers that ``ViewDraws.jitter_order_NV4`` gives them."""


def views_on_device(
    images: Sequence[Tensor], draws: ViewDraws, config: ViewsConfig, *, chunk_views: int = 128
) -> tuple[Tensor, Tensor]:
    """Global views ``(N, 2, 3, H, W)`` and local views ``(N, P, L, 3, h, w)``, uint8, on the device of the images.

    ``images``: N uint8 RGB tensors ``(3, H, W)`` of any sizes on one device. ``draws``: from ``draw_views`` with the
    same config and the sizes of these images. The pixels are those of ``PartViews.pixels`` for the same draws, with
    TF32 on or off. About ``chunk_views`` views are made at a time, whole images of them; each takes the memory of the
    largest image beside it, 12 bytes a pixel. Nothing waits for a CUDA device, but for tables sent on the first call.

    Raises ``UserError`` for images or draws of another shape and for draws whose boxes do not fit the images.
    """
    if chunk_views < 1:
        raise UserError(f"chunk_views: expected at least 1, got {chunk_views}")
    num_local = config.num_parts * config.local_views_per_part
    _check(images, draws, _NUM_GLOBAL + num_local)
    global_draws, local_draws = _some_views(draws, slice(_NUM_GLOBAL)), _some_views(draws, slice(_NUM_GLOBAL, None))
    with torch.autocast(images[0].device.type, enabled=False):  # half precision would lose grey levels
        global_views = _views_of_one_size(images, global_draws, config.global_size_px, chunk_views)
        local_views = _views_of_one_size(images, local_draws, config.local_size_px, chunk_views)
    return global_views, local_views.unflatten(1, (config.num_parts, config.local_views_per_part))


def _check(images: Sequence[Tensor], draws: ViewDraws, num_views: int) -> None:
    if not images:
        raise UserError("images: none given; pass at least one")
    for index, image in enumerate(images):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
            raise UserError(
                f"image {index}: expected uint8 RGB pixels of shape (3, height, width), got {image.dtype} "
                f"{tuple(image.shape)}; decode it as RGB first"
            )
        if image.device != images[0].device:
            raise UserError(f"image {index}: on {image.device}, image 0 on {images[0].device}; move them to one device")
    shape = draws.boxes_NV4.shape[:2]
    if shape != (len(images), num_views):
        raise UserError(
            f"draws: made for {shape[0]} images of {shape[1]} views, got {len(images)} images and a config of "
            f"{num_views} views; draw them for these images with this config"
        )
    sizes_N12 = np.array([image.shape[1:] for image in images])[:, None]
    start_NV2, side_NV2 = draws.boxes_NV4[..., :2], draws.boxes_NV4[..., 2:]
    fits_N = ((start_NV2 >= 0) & (side_NV2 > 0) & (start_NV2 + side_NV2 <= sizes_N12)).all((1, 2))
    if not fits_N.all():
        index = int(fits_N.argmin())
        raise UserError(
            f"draws: a box of image {index} does not fit its {'x'.join(map(str, images[index].shape[1:]))} pixels; "
            "draw with the sizes of these images, in their order"
        )


def _some_views(draws: ViewDraws, which: slice) -> ViewDraws:
    fields = (field.name for field in dataclasses.fields(draws))
    return ViewDraws(**{name: getattr(draws, name)[:, which] for name in fields})


def _views_of_one_size(
    images: Sequence[Tensor], draws: ViewDraws, size_px: tuple[int, int], chunk_views: int
) -> Tensor:
    num_images, num_views = draws.flip_NV.shape
    views = torch.empty((num_images, num_views, 3, *size_px), dtype=torch.uint8, device=images[0].device)
    step = max(1, chunk_views // num_views)
    for start in range(0, num_images, step):
        chunk = slice(start, start + step)
        out_M3HW = views[chunk].flatten(0, 1)
        _resize_boxes(images[chunk], draws.take(chunk), out_M3HW)
        _change(out_M3HW, draws.take(chunk))
    return views


def _resize_boxes(images: Sequence[Tensor], draws: ViewDraws, out_M3HW: Tensor) -> None:
    """Fill ``out_M3HW`` with the box of each view, resized by Pillow's antialiased bicubic filter and mirrored."""
    device, size_px = out_M3HW.device, (out_M3HW.shape[2], out_M3HW.shape[3])
    canvas_size = [_canvas_side(max(image.shape[axis] for image in images)) for axis in (1, 2)]
    canvas_N3HW = torch.zeros((len(images), 3, *canvas_size), dtype=torch.uint8, device=device)
    for image, canvas in zip(images, canvas_N3HW, strict=True):
        canvas[:, : image.shape[1], : image.shape[2]] = image

    boxes_M4 = draws.boxes_NV4.reshape(-1, 4)
    flip_M = draws.flip_NV.ravel()
    image_M = np.repeat(np.arange(len(images)), draws.flip_NV.shape[1])
    rows_first_M = starts_with_rows(boxes_M4[:, 2], boxes_M4[:, 3], size_px)
    # Each pass rounds to 8 bits, so that their order shows.
    for rows_first in (False, True):
        which = np.flatnonzero(rows_first_M == rows_first)
        if not len(which):
            continue
        boxes_4M = boxes_M4[which].T
        index, image_index, *drawn = _send([which, image_M[which], *boxes_4M.astype(np.float64), flip_M[which]], device)
        top, left, height, width, flip = drawn
        columns = _sampling_matrix(left, width, flip, size_px[1], canvas_size[1], _num_taps(boxes_4M[3], size_px[1]))
        upright = torch.zeros_like(flip)
        rows = _sampling_matrix(top, height, upright, size_px[0], canvas_size[0], _num_taps(boxes_4M[2], size_px[0]))
        pixels_M3HW = canvas_N3HW.index_select(0, image_index)
        if rows_first:
            resized_M3HW = _resampled(pixels_M3HW.permute(0, 2, 1, 3), rows, columns).permute(0, 2, 1, 3)
        else:
            resized_M3HW = _resampled(pixels_M3HW.permute(0, 3, 1, 2), columns, rows).permute(0, 2, 3, 1)
        out_M3HW.index_copy_(0, index, resized_M3HW)


def starts_with_rows(
    height_M: NDArray[np.integer], width_M: NDArray[np.integer], size_px: tuple[int, int]
) -> NDArray[np.bool_]:
    """Whether Pillow resizes boxes of these sides to ``size_px`` rows first; before Pillow 13 it never does."""
    if int(PIL.__version__.split(".")[0]) < 13:
        return np.zeros(len(height_M), np.bool_)
    # From 13 on (pull request 9549): where that shrinks the height much more than the width.
    return height_M - size_px[0] > np.maximum(0, 2 * (width_M - size_px[1]))


def _resampled(pixels_MS3S: Tensor, first_M2OS: Tensor, second_M2OS: Tensor) -> Tensor:
    """Both passes over pixels ``(M, S, 3, S')``: uint8 ``(M, O, 3, O')``, the first on axis S, the second on S'."""
    num_views, _, num_first, _ = first_M2OS.shape
    pixels = pixels_MS3S.to(torch.float32).flatten(2)
    first = torch.bmm(first_M2OS.flatten(1, 2), pixels).view(num_views, 2, num_first * 3, -1)
    between = _levels(first[:, 0], first[:, 1]).to(torch.float32)
    second = torch.bmm(between, second_M2OS.flatten(1, 2).mT).unflatten(2, (2, -1))
    return _levels(second[:, :, 0], second[:, :, 1]).to(torch.uint8).unflatten(1, (num_first, 3))


def _canvas_side(longest: int) -> int:
    """At least one pixel more than the images have, for weights that count for nothing; a multiple of 8 for speed."""
    return (longest // 8 + 1) * 8


def _num_taps(length_M: NDArray[np.int32], num_out: int) -> int:
    """Pixels that the widest filter can touch: it reaches 2 pixels of the smaller of the two images to each side."""
    return 2 * math.ceil(2 * max(1.0, float(length_M.max()) / num_out)) + 1


def _sampling_matrix(
    start_M: Tensor, length_M: Tensor, flip_M: Tensor, num_out: int, canvas_side: int, num_taps: int
) -> Tensor:
    """``(M, 2, O, S)`` float32: the high and the low part of the weight of each pixel S in each pixel O of a view.

    Both are whole numbers of at most 11 bits, and pixels have 8: products are exact even in TF32, and so are their
    float32 sums when a side shrinks by 8 or less.
    """
    start_M1, length_M1, flip_M1 = start_M[:, None], length_M[:, None], flip_M[:, None]
    out_O = torch.arange(num_out, device=start_M.device, dtype=torch.float64)
    scale_M1 = length_M1 / num_out
    center_MO = (torch.where(flip_M1, num_out - 1 - out_O, out_O) + 0.5) * scale_M1
    stretch_M1 = scale_M1.clamp(min=1)
    first_MO = (center_MO - 2 * stretch_M1 + 0.5).clamp_(min=0).trunc_()
    last_MO = (center_MO + 2 * stretch_M1 + 0.5).trunc_().minimum(length_M1)
    pixel_MOK = first_MO[..., None] + torch.arange(num_taps, device=start_M.device, dtype=torch.float64)
    is_inside_MOK = pixel_MOK < last_MO[..., None]
    weight_MOK = _keys((pixel_MOK - center_MO[..., None] + 0.5) / stretch_M1[..., None]) * is_inside_MOK
    weight_MOK /= weight_MOK.sum(-1, keepdim=True)

    weight_MOK = (weight_MOK * (1 << _WEIGHT_BITS)).round_()
    high_MOK = (weight_MOK / (1 << _LOW_BITS)).round_()
    parts_M2OK = torch.stack([high_MOK, weight_MOK - high_MOK * (1 << _LOW_BITS)], dim=1).to(torch.float32)
    # Taps outside the box weigh 0 and all land on the last pixel of the canvas, which no image reaches.
    index_MOK = torch.where(is_inside_MOK, pixel_MOK + start_M1[..., None], canvas_side - 1).to(torch.int64)
    matrix_M2OS = torch.zeros((len(start_M), 2, num_out, canvas_side), device=start_M.device)
    return matrix_M2OS.scatter_(-1, index_MOK[:, None].expand_as(parts_M2OK), parts_M2OK)


def _keys(distance: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -0.5 (IEEE Trans. ASSP 29, 1981)."""
    x = distance.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def _levels(high: Tensor, low: Tensor) -> Tensor:
    """Weighted sums, given in two parts, rounded to 0..255; int32."""
    total = high.to(torch.int32).bitwise_left_shift_(_LOW_BITS).add_(low.to(torch.int32))
    return total.add_(1 << (_WEIGHT_BITS - 1)).bitwise_right_shift_(_WEIGHT_BITS).clamp_(0, 255)


class _Change(NamedTuple):
    """What is done to some of the views, ``views_M``, and how much of it."""

    views_M: NDArray[np.intp]
    amount_M: NDArray
    apply: Callable[[Tensor, Tensor], Tensor]


def _change(views_M3HW: Tensor, draws: ViewDraws) -> None:
    """Change colour, blur and solarize in place what drew it, in the order of ``augment.render_view``.

    Which views a change is for is known on the host, so that the device is never asked.
    """
    changes = [change for change in _drawn_changes(draws) if len(change.views_M)]
    sent = _send([array for change in changes for array in change[:2]], views_M3HW.device)
    for change, index_M, amount_M in zip(changes, sent[::2], sent[1::2], strict=True):
        views_M3HW.index_copy_(0, index_M, change.apply(views_M3HW.index_select(0, index_M), amount_M))


def _drawn_changes(draws: ViewDraws) -> Iterator[_Change]:
    order_M4, jitter_M4 = draws.jitter_order_NV4.reshape(-1, 4), draws.jitter_NV4.reshape(-1, 4)
    for order_M in order_M4.T:
        for kind, apply in enumerate(_JITTER):
            views_M = np.flatnonzero((order_M == kind) & ~np.isnan(jitter_M4[:, kind]))
            amount_M = jitter_M4[views_M, kind]
            is_hue = apply is device_colour.shift_hue
            yield _Change(views_M, device_colour.hue_steps(amount_M) if is_hue else amount_M.astype(np.float32), apply)
    nothing = np.empty(0)
    yield _Change(np.flatnonzero(draws.grey_NV), nothing, lambda views_M3HW, _: device_colour.to_grey(views_M3HW))
    radius_M = draws.blur_radius_NV.ravel()
    blurred_M = np.flatnonzero(~np.isnan(radius_M))
    yield _Change(blurred_M, device_colour.blur_weights(radius_M[blurred_M]), device_colour.gaussian_blur)
    yield _Change(np.flatnonzero(draws.solarize_NV), nothing, lambda views_M3HW, _: device_colour.solarize(views_M3HW))


def _send(arrays: Sequence[NDArray], device: torch.device) -> list[Tensor]:
    """The arrays on the device, by one copy that nothing waits for; whole numbers up to 2^53 arrive exactly."""
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    if not tensors:
        return []
    packed = torch.cat([tensor.flatten().to(torch.float64) for tensor in tensors])
    if device.type == "cuda":
        packed = packed.pin_memory()  # from pageable memory the copy waits for what the device is doing
    pieces = packed.to(device, non_blocking=True).split([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape).to(tensor.dtype) for piece, tensor in zip(pieces, tensors, strict=True)]
