"""The views of a batch made by tensor operations are, to the last bit, those that Pillow makes one by one."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from passreid_ray.errors import UserError
from passreid_ray.views import PartViews, ViewsConfig, colour, device_colour
from passreid_ray.views.device_views import _num_taps, _sampling_matrix, views_on_device
from passreid_ray.views.view_draws import ViewDraws, draw_views
from tests.views.images import noisy_image

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Small, large, upright and wide ones; the smallest give boxes of one pixel.
SIZES = [(128, 64), (131, 67), (1, 1), (8, 8), (3, 40), (40, 3), (60, 160), (300, 130), (341, 193), (500, 90)]
SMALL: dict[str, Any] = {"global_size_px": (64, 32), "local_size_px": (32, 16)}
UNCHANGED: dict[str, Any] = {
    "jitter_probability": 0,
    "grey_probability": 0,
    "flip_probability": 0,
    "global_blur_probability": (0, 0),
    "local_blur_probability": 0,
    "global_solarize_probability": (0, 0),
}


def _images(sizes: list[tuple[int, int]]) -> list[NDArray[np.uint8]]:
    return [noisy_image(*size, seed) for seed, size in enumerate(sizes)]


def _draws(config: ViewsConfig, sizes: list[tuple[int, int]]) -> ViewDraws:
    return draw_views(config, sizes, _rngs(len(sizes)))


def _rngs(count: int) -> list[np.random.Generator]:
    return [np.random.default_rng(100 + seed) for seed in range(count)]


def _tensors(images: list[NDArray[np.uint8]], device: str = "cpu") -> list[Tensor]:
    return [torch.from_numpy(image).permute(2, 0, 1).to(device) for image in images]


def _by_pillow(config: ViewsConfig, images: list[NDArray[np.uint8]]) -> tuple[Tensor, Tensor]:
    views = [PartViews(config).pixels(image, rng) for image, rng in zip(images, _rngs(len(images)), strict=True)]
    first, second = ([torch.from_numpy(each[name]) for each in views] for name in ("global_views", "local_views"))
    return torch.stack(first), torch.stack(second)


def _assert_equal(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"aspect": "official"},
        {**SMALL, "aspect": "official", "brightness": 1.5, "contrast": 2, "saturation": 2, "hue": 0.5},
        {**SMALL, "blur_radius_px": (0, 12), "local_blur_probability": 1},
        {**SMALL, "num_parts": 1, "local_views_per_part": 2, "brightness": 0, "hue": 0},
        {**SMALL, "local_solarize_probability": 0.5, "grey_probability": 0.5, "num_parts": 4},
        {**SMALL, **UNCHANGED},
        {**SMALL, **UNCHANGED, "flip_probability": 1},
    ],
    ids=str,
)
def test_views_equal_those_of_pillow(settings: dict) -> None:
    config = ViewsConfig(**settings)
    images = _images(SIZES)
    _assert_equal(views_on_device(_tensors(images), _draws(config, SIZES), config), _by_pillow(config, images))


@pytest.mark.parametrize("chunk_views", [1, 12, 10_000])
def test_the_size_of_a_chunk_changes_nothing(chunk_views: int) -> None:
    config = ViewsConfig(**SMALL)
    images = _images(SIZES)
    got = views_on_device(_tensors(images), _draws(config, SIZES), config, chunk_views=chunk_views)
    _assert_equal(got, _by_pillow(config, images))


def test_autocast_changes_nothing() -> None:
    config = ViewsConfig(**SMALL)
    images = _images(SIZES)
    with torch.autocast("cpu", torch.bfloat16):
        got = views_on_device(_tensors(images), _draws(config, SIZES), config)
    _assert_equal(got, _by_pillow(config, images))


def test_images_are_left_as_they_are() -> None:
    config = ViewsConfig(**SMALL)
    images = _tensors(_images(SIZES))
    before = [image.clone() for image in images]
    views_on_device(images, _draws(config, SIZES), config)
    assert all(torch.equal(image, kept) for image, kept in zip(images, before, strict=True))


@pytest.mark.parametrize("length", [1, 7, 64, 200, 512])
def test_sampling_weights_fit_tf32_and_add_up_to_one(length: int) -> None:
    start, sides = torch.tensor([3.0], dtype=torch.float64), torch.tensor([float(length)], dtype=torch.float64)
    matrix = _sampling_matrix(start, sides, torch.tensor([False]), 64, 520, _num_taps(np.array([length]), 64))
    assert matrix.abs().max() <= 2**11  # 11 bits are what TF32 keeps
    assert torch.equal(matrix, matrix.round())
    assert not matrix[..., :3].any()
    assert not matrix[..., 3 + length :].any()
    weights_OS = (matrix[0, 0].double() * 2**12 + matrix[0, 1]) / 2**22
    torch.testing.assert_close(weights_OS.sum(-1), torch.ones(64, dtype=torch.float64), rtol=0, atol=1e-5)


FACTORS = [0.0, 0.6, 0.9999, 1.0, 1.2345, 1.4, 3.0]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (device_colour.adjust_brightness, colour.adjust_brightness),
        (device_colour.adjust_contrast, colour.adjust_contrast),
        (device_colour.adjust_saturation, colour.adjust_saturation),
    ],
)
def test_each_view_is_changed_by_its_own_factor(ours: Callable, theirs: Callable) -> None:
    images = [noisy_image(37, 61, seed) for seed in range(len(FACTORS))]
    got = ours(torch.stack(_tensors(images)), torch.tensor(FACTORS))
    assert got.dtype == torch.uint8
    for view, image, factor in zip(got, images, FACTORS, strict=True):
        np.testing.assert_array_equal(_pixels(view), np.asarray(theirs(Image.fromarray(image), factor)))


def test_a_hue_shift_equals_that_of_one_image_for_every_colour() -> None:
    reds = np.arange(0, 256, 15)
    turns = np.linspace(-0.5, 0.5, len(reds))
    green, blue = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    images = [np.stack([np.full_like(green, red), green, blue], axis=-1) for red in reds]
    got = device_colour.shift_hue(torch.stack(_tensors(images)), torch.from_numpy(device_colour.hue_steps(turns)))
    for view, image, turn in zip(got, images, turns, strict=True):
        np.testing.assert_array_equal(_pixels(view), np.asarray(colour.shift_hue(Image.fromarray(image), turn)))


def test_grey_and_solarized_views_equal_pillows() -> None:
    image = noisy_image(37, 61)
    views = torch.stack(_tensors([image]))
    np.testing.assert_array_equal(
        _pixels(device_colour.to_grey(views)[0]), np.asarray(colour.to_grey(Image.fromarray(image)))
    )
    np.testing.assert_array_equal(
        _pixels(device_colour.solarize(views)[0]), np.asarray(ImageOps.solarize(Image.fromarray(image)))
    )


@pytest.mark.parametrize("size", [(40, 30), (5, 64), (1, 9)])
def test_blur_equals_pillows_even_when_it_is_wider_than_the_view(size: tuple[int, int]) -> None:
    radii = [0.0, 0.1, 0.5, 0.9, 1.0, 1.4142, 2.0, 5.0, 30.0]
    images = [noisy_image(*size, seed) for seed in range(len(radii))]
    weights = torch.from_numpy(device_colour.blur_weights(radii))
    got = device_colour.gaussian_blur(torch.stack(_tensors(images)), weights)
    for view, image, radius in zip(got, images, radii, strict=True):
        expected = Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius))
        np.testing.assert_array_equal(_pixels(view), np.asarray(expected))


def _pixels(view_3HW: Tensor) -> NDArray[np.uint8]:
    return view_3HW.permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "none given"),
        ([torch.zeros(3, 64, 32)], "image 0: expected uint8 RGB"),
        ([torch.zeros(64, 32, 3, dtype=torch.uint8)], "image 0: expected uint8 RGB"),
        ([torch.zeros(3, 0, 32, dtype=torch.uint8)], "image 0: expected uint8 RGB"),
        ([torch.zeros(3, 64, 32, dtype=torch.uint8)] * 2, "made for 1 images"),
        ([torch.zeros(3, 32, 64, dtype=torch.uint8)], "a box of image 0 does not fit its 32x64"),
    ],
)
def test_images_that_the_draws_are_not_for_are_refused(images: list[Tensor], message: str) -> None:
    config = ViewsConfig(**SMALL)
    with pytest.raises(UserError, match=message):
        views_on_device(images, _draws(config, [(64, 32)]), config)


def test_draws_of_another_number_of_views_are_refused() -> None:
    draws = _draws(ViewsConfig(**SMALL), [(64, 32)])
    with pytest.raises(UserError, match="of 11 views, got 1 images and a config of 5 views"):
        views_on_device([torch.zeros(3, 64, 32, dtype=torch.uint8)], draws, ViewsConfig(local_views_per_part=1))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("allow_tf32", [False, True])
def test_views_on_cuda_equal_those_of_pillow_and_wait_for_nothing(
    allow_tf32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allow_tf32)
    config = ViewsConfig()
    images = _images(SIZES)
    on_device, draws = _tensors(images, "cuda"), _draws(config, SIZES)
    views_on_device(on_device, draws, config)  # sends the tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = views_on_device(on_device, draws, config)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    _assert_equal(got, _by_pillow(config, images))
