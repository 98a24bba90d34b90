"""The part-aware multi-crop of PASS: pixels -> global views of the image and local views of each body band."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from passreid_ray.views.augment import ViewDraw, draw_view, global_kinds, local_kind, render_view
from passreid_ray.views.boxes import Box, part_bands
from passreid_ray.views.config import ViewsConfig
from passreid_ray.views.pixels import normalize, to_image

Pixels = NDArray[np.uint8]


class PartViews:
    """Augmented views of one image: PASS (arXiv:2203.03931), the augmentations of DINO (arXiv:2104.14294).

    A pure function of the image and the generator: nothing global is read or changed, so equal generators give equal
    views in every process. With ``aspect="official"`` the views are drawn and rendered as the reference code does.
    """

    def __init__(self, config: ViewsConfig) -> None:
        self.config = config
        self._global_kinds = global_kinds(config)
        self._local_kind = local_kind(config)

    def __call__(self, image_HWC: Pixels, rng: np.random.Generator) -> dict[str, Tensor]:
        """``{"global_views": (2, 3, H, W), "local_views": (P, L, 3, h, w)}``, float32, normalised with mean and std.

        ``image_HWC``: uint8 RGB of any size. Global view 0 and 1 differ in blur and solarization; local view ``[p, l]``
        is cut from the band of part ``p``. Raises ``UserError`` for anything but a non-empty uint8 RGB image.
        """
        views = self.pixels(image_HWC, rng)
        return {name: normalize(torch.from_numpy(pixels), self.config) for name, pixels in views.items()}

    def pixels(self, image_HWC: Pixels, rng: np.random.Generator) -> dict[str, Pixels]:
        """The same views as uint8 arrays before normalisation: a quarter of the bytes to stream between processes.

        ``normalize`` finishes them on the training device; the result equals calling the object to the last bit.
        """
        image = to_image(image_HWC)
        draws = list(self.draw(image.height, image.width, rng))
        num_global = len(self._global_kinds)
        config = self.config
        return {
            "global_views": _render(image, draws[:num_global], config.global_size_px),
            "local_views": _render(image, draws[num_global:], config.local_size_px).reshape(
                config.num_parts, config.local_views_per_part, 3, *config.local_size_px
            ),
        }

    def draw(self, height: int, width: int, rng: np.random.Generator) -> Iterator[ViewDraw]:
        """The random decisions behind an image's views: global ones first, then the local ones of each part."""
        whole = Box(0, 0, height, width)
        for kind in self._global_kinds:
            yield draw_view(whole, kind, self.config, rng)
        for band in part_bands(height, width, self.config.num_parts, self.config.part_height):
            for _ in range(self.config.local_views_per_part):
                yield draw_view(band, self._local_kind, self.config, rng)


def _render(image: Image.Image, draws: list[ViewDraw], size_px: tuple[int, int]) -> Pixels:
    views_N3HW = np.empty((len(draws), 3, *size_px), np.uint8)
    for view, draw in zip(views_N3HW, draws, strict=True):
        view[:] = np.asarray(render_view(image, draw, size_px)).transpose(2, 0, 1)
    return views_N3HW
