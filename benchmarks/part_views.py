"""Time of ``PartViews`` and ``BatchViews`` against the reference's torchvision and PIL calls, on the same decisions.

Run from the repository: ``OMP_NUM_THREADS=1 python -m benchmarks.part_views``
"""

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from passreid_ray.views import PartViews, ViewsConfig
from passreid_ray.views.batch_views import BatchViews
from tests.reference.official_views import official_normalize, official_view
from tests.views.images import noisy_image

REPEATS = 3


def official(part_views: PartViews, image_HWC: np.ndarray, rng: np.random.Generator) -> list[torch.Tensor]:
    """The reference's list of 2 + 9 normalised views. Boxes are in pixels of the image, so no band is cut first."""
    image = Image.fromarray(image_HWC)
    sizes = 2 * [part_views.config.global_size_px] + 9 * [part_views.config.local_size_px]
    return [
        official_normalize(
            official_view(
                image,
                box=draw.box,
                size=size,
                flip=draw.flip,
                jitter=dataclasses.astuple(draw.jitter) if draw.jitter else None,
                grey=draw.grey,
                blur_radius=draw.blur_radius_px,
                solarize=draw.solarize,
            )
        )
        for draw, size in zip(part_views.draw(image.height, image.width, rng), sizes, strict=True)
    ]


def milliseconds_per_image(function: Callable[[np.ndarray, np.random.Generator], object], images: list) -> float:
    """CPU time, the best of a few repeats with the same random decisions."""
    times = []
    for _ in range(REPEATS):
        rng = np.random.default_rng(0)
        start = time.process_time()
        for image_HWC in images:
            function(image_HWC, rng)
        times.append(time.process_time() - start)
    return 1000 * min(times) / len(images)


def main() -> None:
    """Print CPU milliseconds per image on one thread."""
    torch.set_num_threads(1)
    part_views = PartViews(ViewsConfig(aspect="official"))
    sizes = np.random.default_rng(0)
    images = [noisy_image(int(sizes.integers(160, 385)), int(sizes.integers(60, 129)), seed) for seed in range(60)]
    reference = milliseconds_per_image(lambda image, rng: official(part_views, image, rng), images)
    print(f"{len(images)} images -> 2 views of 256x128 and 9 of 128x64; CPU ms per image, one thread")
    print(f"torchvision and PIL calls    {reference:6.2f}")
    batch_views = BatchViews(part_views.config)
    rows: list[tuple[str, Callable]] = [
        ("PartViews, normalised", part_views),
        ("PartViews.pixels", part_views.pixels),
        ("BatchViews.pixels", lambda image, rng: batch_views.pixels([image], [rng])),
    ]
    batch_views.pixels(images[:1], [np.random.default_rng(0)])  # compiles
    for name, function in rows:
        ours = milliseconds_per_image(function, images)
        print(f"{name:28} {ours:6.2f}   {reference / ours:.2f} times as fast")


if __name__ == "__main__":
    main()
