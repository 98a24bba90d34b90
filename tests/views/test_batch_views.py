from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from passreid_ray.errors import UserError
from passreid_ray.views import PartViews, ViewsConfig, kernels_blur, kernels_colour, kernels_resize, view_rng
from passreid_ray.views.augment import render_view
from passreid_ray.views.batch_views import BatchViews, render_views
from passreid_ray.views.view_draws import ViewDraws, draw_views
from tests.views.images import noisy_image
from tests.views.test_view_draws import as_view_draw

SIZES = [(8, 8), (1, 1), (1, 40), (40, 1), (3, 2), (160, 60), (384, 128), (128, 64), (256, 128), (131, 57), (500, 333)]
NOTHING: dict[str, Any] = {
    "flip_probability": 0,
    "jitter_probability": 0,
    "grey_probability": 0,
    "global_blur_probability": (0, 0),
    "local_blur_probability": 0,
    "global_solarize_probability": (0, 0),
}
EVERYTHING: dict[str, Any] = {
    "jitter_probability": 1,
    "global_blur_probability": (1, 1),
    "local_blur_probability": 1,
    "global_solarize_probability": (0.5, 0.5),
    "local_solarize_probability": 0.5,
}
NO_JITTER = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
ALONE: dict[str, dict[str, Any]] = {
    "crop": {},
    "flip": {"flip_probability": 1},
    "brightness": {"jitter_probability": 1, **NO_JITTER, "brightness": 0.9},
    "contrast": {"jitter_probability": 1, **NO_JITTER, "contrast": 0.9},
    "saturation": {"jitter_probability": 1, **NO_JITTER, "saturation": 1.5},
    "hue": {"jitter_probability": 1, **NO_JITTER, "hue": 0.5},
    "grey": {"grey_probability": 1},
    "blur": {"global_blur_probability": (1, 1), "local_blur_probability": 1},
    "wide blur": {"global_blur_probability": (1, 1), "local_blur_probability": 1, "blur_radius_px": (2, 40)},
    "no blur": {"global_blur_probability": (1, 1), "local_blur_probability": 1, "blur_radius_px": (0, 0)},
    "solarize": {"global_solarize_probability": (1, 1), "local_solarize_probability": 1},
}


def assert_equal_to_part_views(config: ViewsConfig, images: list[NDArray[np.uint8]], seed: int = 0) -> None:
    views = BatchViews(config).pixels(images, [view_rng(seed, n, "a.jpg") for n in range(len(images))])
    part_views = PartViews(config)
    for n, image_HWC in enumerate(images):
        expected = part_views.pixels(image_HWC, view_rng(seed, n, "a.jpg"))
        assert expected.keys() == views.keys()
        for name, pixels in expected.items():
            assert views[name].dtype == np.uint8
            assert np.array_equal(views[name][n], pixels), (n, image_HWC.shape, name)


@pytest.mark.parametrize("aspect", ["official", "person"])
@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["default", "everything"])
def test_a_batch_of_any_sizes_equals_part_views_to_the_bit(
    aspect: Literal["official", "person"], changes: dict[str, Any]
) -> None:
    images = [noisy_image(*size, seed) for seed, size in enumerate(SIZES)]
    assert_equal_to_part_views(ViewsConfig(aspect=aspect, **changes), images)


@pytest.mark.parametrize("name", ALONE)
def test_each_change_alone_equals_part_views_to_the_bit(name: str) -> None:
    config = ViewsConfig(**{**NOTHING, **ALONE[name]}, global_size_px=(64, 32), local_size_px=(33, 17))
    assert_equal_to_part_views(config, [noisy_image(*size) for size in [(160, 60), (20, 90), (64, 32), (2, 5)]])


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 255), (1, 0, 0), (128, 127, 128)])
def test_extreme_colours_equal_part_views_to_the_bit(colour: tuple[int, int, int]) -> None:
    flat = np.full((90, 40, 3), colour, np.uint8)
    stripes = flat.copy()
    stripes[::2] = 255 - np.array(colour)  # the bicubic filter overshoots
    assert_equal_to_part_views(ViewsConfig(**EVERYTHING, brightness=2, contrast=2, saturation=2), [flat, stripes])


def test_greys_and_noise_of_two_values_equal_part_views_to_the_bit() -> None:
    ramp = np.repeat(np.arange(192, dtype=np.uint8)[:, None, None], 60, axis=1).repeat(3, axis=2)
    noise = (np.random.default_rng(0).integers(0, 2, (200, 70, 3)) * 255).astype(np.uint8)
    assert_equal_to_part_views(ViewsConfig(**EVERYTHING), [ramp, noise, noise[:, :, :1].repeat(3, axis=2)])


def test_every_hue_shift_of_many_colours_equals_part_views_to_the_bit() -> None:
    # A view as large as the image shows its pixels as they are: 32768 of all the colours there are.
    shades = np.arange(0, 256, 8, dtype=np.uint8)
    colours = np.stack(np.meshgrid(shades, shades, shades + np.uint8(7)), axis=-1).reshape(256, 128, 3)
    config = ViewsConfig(**{**NOTHING, **ALONE["hue"]}, global_scale=(1, 1), person_global_aspect=(0.5, 0.5))
    for seed in range(20):
        assert_equal_to_part_views(config, [colours], seed)


@st.composite
def images_and_boxes(draw: st.DrawFn) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    height, width = draw(st.integers(1, 300)), draw(st.integers(1, 150))
    boxes = []
    for _ in range(5):
        box_height, box_width = draw(st.integers(1, height)), draw(st.integers(1, width))
        boxes.append(
            [draw(st.integers(0, height - box_height)), draw(st.integers(0, width - box_width)), box_height, box_width]
        )
    return noisy_image(height, width, draw(st.integers(0, 9))), np.array([boxes], np.int32)


@settings(max_examples=60, deadline=None)
@given(case=images_and_boxes(), view_size=st.tuples(st.integers(1, 150), st.integers(1, 80)), seed=st.integers(0, 99))
def test_any_boxes_resized_to_any_size_equal_pillow_to_the_bit(
    case: tuple[NDArray[np.uint8], NDArray[np.int32]], view_size: tuple[int, int], seed: int
) -> None:
    image_HWC, boxes_NV4 = case
    config = ViewsConfig(num_parts=1, local_size_px=view_size, **EVERYTHING)
    drawn = draw_views(config, [image_HWC.shape[:2]], [view_rng(seed, 0, "a.jpg")])
    draws = ViewDraws(
        boxes_NV4, drawn.flip_NV, drawn.jitter_order_NV4, drawn.jitter_NV4, drawn.grey_NV, drawn.blur_radius_NV,
        drawn.solarize_NV,
    )  # fmt: skip
    views = render_views(config, [image_HWC], draws)
    found = [*views["global_views"][0], *views["local_views"][0, 0]]
    for v, view_3HW in enumerate(found):
        expected = render_view(Image.fromarray(image_HWC), as_view_draw(draws, 0, v), view_3HW.shape[1:])
        assert np.array_equal(view_3HW, np.asarray(expected).transpose(2, 0, 1)), v


def test_two_threads_at_once_give_the_views_of_one() -> None:
    images = [noisy_image(100 + 5 * n, 50 + n, n) for n in range(24)]
    batch_views = BatchViews(ViewsConfig())

    def local_views(_: int) -> NDArray[np.uint8]:
        return batch_views.pixels(images, [view_rng(0, n, "a.jpg") for n in range(len(images))])["local_views"]

    alone = local_views(0)
    with ThreadPoolExecutor(2) as threads:
        for views in threads.map(local_views, range(6)):
            assert np.array_equal(views, alone)


def test_read_only_and_strided_images_are_viewed_and_left_as_they_are() -> None:
    base = noisy_image(120, 100)
    strided = base[::2, ::-1]
    locked = base.copy()
    locked.setflags(write=False)
    assert_equal_to_part_views(ViewsConfig(), [strided, locked, base.transpose(1, 0, 2)])
    assert np.array_equal(base, noisy_image(120, 100))


def test_kernels_are_compiled_for_one_type_whatever_they_are_given() -> None:
    base = noisy_image(60, 40)
    locked = base.copy()
    locked.setflags(write=False)
    for image_HWC in (base, locked, base[:, ::-1], noisy_image(1, 1)):
        for size in ((32, 16), (1, 1)):
            config = ViewsConfig(global_size_px=size, local_size_px=(16, 8), num_parts=1, local_views_per_part=1)
            draws = draw_views(config, [image_HWC.shape[:2]], [view_rng(0, 0, "a.jpg")])
            render_views(config, [image_HWC], draws)
            render_views(config, [image_HWC], draws.take([0]).read_only())
    for kernel in (
        kernels_resize.split_planes,
        kernels_resize._resize_boxes,
        kernels_colour.change_colours,
        kernels_colour.solarize_views,
        kernels_blur.blur_views,
    ):
        assert len(kernel.signatures) == 1, kernel


def test_no_images_give_no_views_of_the_promised_shapes() -> None:
    views = BatchViews(ViewsConfig()).pixels([], [])
    assert {name: pixels.shape for name, pixels in views.items()} == {
        "global_views": (0, 2, 3, 256, 128),
        "local_views": (0, 3, 3, 3, 128, 64),
    }


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
def test_what_is_not_an_rgb_image_is_refused_with_its_place_and_what_was_found(image: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"image 1 of the batch: expected uint8 RGB pixels .* got \w+ \("):
        BatchViews(ViewsConfig()).pixels([noisy_image(9, 9), image], [view_rng(0, n, "a.jpg") for n in range(2)])


def test_as_many_generators_as_images_are_asked_for() -> None:
    with pytest.raises(UserError, match="2 images and 1 generators"):
        BatchViews(ViewsConfig()).pixels([noisy_image(9, 9)] * 2, [view_rng(0, 0, "a.jpg")])


def test_draws_of_another_image_or_config_are_refused() -> None:
    config = ViewsConfig()
    draws = draw_views(config, [(200, 100)], [view_rng(0, 0, "a.jpg")])
    with pytest.raises(UserError, match=r"leaves image 0 of the batch, which has \[20, 10\] rows and columns"):
        render_views(config, [noisy_image(20, 10)], draws)
    with pytest.raises(UserError, match="expected those of 2 images with 11 views"):
        render_views(config, [noisy_image(200, 100)] * 2, draws)
    with pytest.raises(UserError, match="expected those of 1 images with 5 views"):
        render_views(ViewsConfig(num_parts=1), [noisy_image(200, 100)], draws)
