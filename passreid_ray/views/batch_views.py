"""The part-aware multi-crop of many images at once, compiled: the views of ``PartViews``, several times as fast."""

# Shape letters: N images, V views of one image, P parts, L local views per part.

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from passreid_ray.errors import UserError
from passreid_ray.views.config import ViewsConfig
from passreid_ray.views.kernels_blur import blur_views
from passreid_ray.views.kernels_colour import change_colours, solarize_views
from passreid_ray.views.kernels_resize import resize_boxes, scratch_size, split_planes
from passreid_ray.views.view_draws import ViewDraws, draw_views, read_only

Pixels = NDArray[np.uint8]

_NUM_GLOBAL = 2


class BatchViews:
    """Augmented views of a batch of images, bit for bit those of ``PartViews`` for equal images and generators.

    A call works on one thread and needs the GIL for a small part of its time, so that several threads may call at
    once. The first call of a fresh installation compiles for some seconds.
    """

    def __init__(self, config: ViewsConfig) -> None:
        self.config = config

    def pixels(self, images: Sequence[Pixels], rngs: Sequence[np.random.Generator]) -> dict[str, Pixels]:
        """``{"global_views": (N, 2, 3, H, W), "local_views": (N, P, L, 3, h, w)}``, uint8, before normalisation.

        ``images``: uint8 RGB ``(height, width, 3)`` of any sizes. ``rngs``: one generator for each image. Raises
        ``UserError`` where an image is not such an array, or where there are not as many generators as images.
        """
        if len(images) != len(rngs):
            raise UserError(
                f"views: expected a generator for each image, got {len(images)} images and {len(rngs)} generators"
            )
        sizes_N2 = _checked_sizes(images)
        return render_views(self.config, images, draw_views(self.config, sizes_N2, rngs))


def render_views(config: ViewsConfig, images: Sequence[Pixels], draws: ViewDraws) -> dict[str, Pixels]:
    """The views that ``draws`` decides on, from ``draw_views`` with the same config; shaped as ``BatchViews.pixels``.

    Raises ``UserError`` where an image is not uint8 RGB, or where the draws are not those of such images and views.
    """
    sizes_N2 = _checked_sizes(images)
    num_local = config.num_parts * config.local_views_per_part
    _check_boxes(draws.boxes_NV4, sizes_N2, _NUM_GLOBAL + num_local)
    draws = draws.read_only()
    groups = [
        (np.empty((len(images), _NUM_GLOBAL, 3, *config.global_size_px), np.uint8), slice(_NUM_GLOBAL)),
        (np.empty((len(images), num_local, 3, *config.local_size_px), np.uint8), slice(_NUM_GLOBAL, None)),
    ]
    # One for all images, and none outside of this call: threads share nothing.
    planes = np.empty(max((image_HWC.size for image_HWC in images), default=0) * 2, np.uint8)
    scratch_bytes = (
        scratch_size(size, view_size)
        for size in set(map(tuple, sizes_N2.tolist()))
        for view_size in (config.global_size_px, config.local_size_px)
    )
    scratch = np.empty(max(scratch_bytes, default=0), np.uint8)
    for n, image_HWC in enumerate(images):
        split_planes(read_only(np.ascontiguousarray(image_HWC)), planes)
        for views_NV3HW, which in groups:
            _render_image(image_HWC.shape[:2], planes, draws, n, which, views_NV3HW[n], scratch)
    parts = config.num_parts, config.local_views_per_part
    return {
        "global_views": groups[0][0],
        "local_views": groups[1][0].reshape(len(images), *parts, 3, *config.local_size_px),
    }


def _render_image(
    image_size: tuple[int, int],
    planes: Pixels,
    draws: ViewDraws,
    n: int,
    which: slice,
    views_V3HW: Pixels,
    scratch: Pixels,
) -> None:
    """The views ``which`` of image ``n``, all of one size: the steps of ``augment.render_view``, in its order."""
    resize_boxes(image_size, planes, draws.boxes_NV4[n, which], draws.flip_NV[n, which], views_V3HW, scratch)
    change_colours(views_V3HW, draws.jitter_order_NV4[n, which], draws.jitter_NV4[n, which], draws.grey_NV[n, which])
    blur_views(views_V3HW, draws.blur_radius_NV[n, which])
    solarize_views(views_V3HW, draws.solarize_NV[n, which])


def _checked_sizes(images: Sequence[Pixels]) -> NDArray[np.int64]:
    for n, image_HWC in enumerate(images):
        if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3 or image_HWC.size == 0:
            raise UserError(
                f"image {n} of the batch: expected uint8 RGB pixels of shape (height, width, 3), got {image_HWC.dtype} "
                f"{image_HWC.shape}; decode it as RGB first"
            )
    return np.array([image_HWC.shape[:2] for image_HWC in images], np.int64).reshape(-1, 2)


def _check_boxes(boxes_NV4: NDArray[np.int32], sizes_N2: NDArray[np.int64], num_views: int) -> None:
    # The compiled loops check no index: a wrong box would read whatever lies in memory.
    if boxes_NV4.shape != (len(sizes_N2), num_views, 4):
        raise UserError(
            f"draws: expected those of {len(sizes_N2)} images with {num_views} views, got boxes of shape "
            f"{boxes_NV4.shape}; draw them with the same config and images"
        )
    start_NV2, extent_NV2 = boxes_NV4[..., :2], boxes_NV4[..., 2:]
    inside = (start_NV2 >= 0) & (extent_NV2 >= 1) & (start_NV2.astype(np.int64) + extent_NV2 <= sizes_N2[:, None])
    if not inside.all():
        n, v, _ = np.argwhere(~inside)[0]
        raise UserError(
            f"draws: box {boxes_NV4[n, v].tolist()} (top, left, height, width) leaves image {n} of the batch, which "
            f"has {sizes_N2[n].tolist()} rows and columns; draw the views with the sizes of these images"
        )
