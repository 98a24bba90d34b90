import dataclasses
import random
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from passreid_ray.errors import UserError
from passreid_ray.views import PartViews, ViewsConfig, normalize, view_rng
from tests.reference.official_views import official_band, official_normalize, official_view
from tests.views.images import noisy_image


@pytest.mark.parametrize("aspect", ["official", "person"])
@pytest.mark.parametrize(("height", "width"), [(128, 48), (131, 57), (256, 128)])
def test_all_views_equal_the_reference_pipeline_fed_with_the_same_decisions(
    aspect: Literal["official", "person"], height: int, width: int
) -> None:
    config = ViewsConfig(aspect=aspect)
    part_views = PartViews(config)
    pixels = noisy_image(height, width)
    views = part_views(pixels, np.random.default_rng(5))
    draws = list(part_views.draw(height, width, np.random.default_rng(5)))

    image = Image.fromarray(pixels)
    for index, draw in enumerate(draws):
        part, repeat = divmod(index - 2, 3)
        is_global = index < 2
        region = image if is_global else official_band(image, part)
        region_top = 0 if is_global else (0, int(0.25 * height), int(0.5 * height))[part]
        expected = official_normalize(
            official_view(
                region,
                box=(draw.box.top - region_top, *draw.box[1:]),
                size=(256, 128) if is_global else (128, 64),
                flip=draw.flip,
                jitter=dataclasses.astuple(draw.jitter) if draw.jitter else None,
                grey=draw.grey,
                blur_radius=draw.blur_radius_px,
                solarize=draw.solarize,
            )
        )
        found = views["global_views"][index] if is_global else views["local_views"][part, repeat]
        assert torch.equal(found, expected), index


def test_views_have_the_promised_shapes_and_types() -> None:
    config = ViewsConfig(global_size_px=(64, 32), local_size_px=(48, 16), num_parts=4, local_views_per_part=2)
    views = PartViews(config)(noisy_image(70, 30), np.random.default_rng(0))
    assert {name: (tuple(view.shape), view.dtype) for name, view in views.items()} == {
        "global_views": ((2, 3, 64, 32), torch.float32),
        "local_views": ((4, 2, 3, 48, 16), torch.float32),
    }


@pytest.mark.parametrize("num_parts", [1, 2, 5])
def test_local_views_show_their_own_band(num_parts: int) -> None:
    # Row r of the image has brightness r, so what a view shows tells where it was cut.
    height = 200
    config = ViewsConfig(num_parts=num_parts, jitter_probability=0, local_views_per_part=8, local_blur_probability=0)
    rows = np.broadcast_to(np.arange(height, dtype=np.uint8)[:, None, None], (height, 60, 3))
    local_views = PartViews(config).pixels(rows, np.random.default_rng(0))["local_views"]
    for part in range(num_parts):
        top = 0 if num_parts == 1 else part * 0.5 / (num_parts - 1) * height
        bottom = height if num_parts == 1 else top + 0.5 * height
        assert local_views[part].min() >= top - 2
        assert local_views[part].max() <= bottom + 1


def test_pixels_normalised_later_equal_the_views_to_the_last_bit() -> None:
    part_views = PartViews(ViewsConfig())
    image = noisy_image(128, 48)
    views = part_views(image, np.random.default_rng(1))
    pixels = part_views.pixels(image, np.random.default_rng(1))
    assert pixels.keys() == views.keys()
    for name, array in pixels.items():
        assert array.dtype == np.uint8
        assert torch.equal(normalize(torch.from_numpy(array), part_views.config), views[name])


def test_equal_generators_give_equal_views_and_others_do_not() -> None:
    part_views = PartViews(ViewsConfig())
    image = noisy_image(128, 48)

    def local_views(seed: int, epoch: int, image_id: str) -> np.ndarray:
        return part_views.pixels(image, view_rng(seed, epoch, image_id))["local_views"]

    first = local_views(0, 3, "a.jpg")
    assert np.array_equal(first, local_views(0, 3, "a.jpg"))
    for other in [(1, 3, "a.jpg"), (0, 4, "a.jpg"), (0, 3, "b.jpg")]:
        assert not np.array_equal(first, local_views(*other))


def generator_states() -> tuple:
    return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()


def test_neither_the_image_nor_any_global_generator_is_touched() -> None:
    image = noisy_image(128, 48)
    before = image.copy()
    image.setflags(write=False)
    states = generator_states()
    PartViews(ViewsConfig())(image, np.random.default_rng(0))
    assert np.array_equal(image, before)
    assert generator_states() == states


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (2, 3)])
def test_tiny_images_still_give_views(shape: tuple[int, int]) -> None:
    config = ViewsConfig(global_size_px=(32, 16), local_size_px=(16, 8))
    views = PartViews(config)(noisy_image(*shape), np.random.default_rng(0))
    assert all(torch.isfinite(view).all() for view in views.values())


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((10, 10), np.uint8),
        np.zeros((3, 10, 10), np.uint8),
        np.zeros((10, 10, 4), np.uint8),
        np.zeros((0, 10, 3), np.uint8),
        np.zeros((10, 10, 3), np.float32),
    ],
)
def test_what_is_not_an_rgb_image_is_refused_with_what_was_found(image: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"expected uint8 RGB pixels .* got \w+ \("):
        PartViews(ViewsConfig())(image, np.random.default_rng(0))
