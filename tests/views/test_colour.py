from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import functional

from passreid_ray.views import colour
from tests.views.images import noisy_image

# torchvision takes PIL images, its annotations know tensors only.
F: Any = functional


def equal(left: Image.Image, right: Image.Image) -> bool:
    return np.array_equal(np.asarray(left), np.asarray(right))


def test_a_hue_shift_of_every_colour_there_is_equals_torchvisions() -> None:
    green, blue = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    for red in range(256):
        image = Image.fromarray(np.stack([np.full_like(green, red), green, blue], axis=-1))
        turns = (red % 21 - 10) / 100  # -0.1..0.1, the official range
        assert equal(colour.shift_hue(image, turns), F.adjust_hue(image, turns)), red


@pytest.mark.parametrize("turns", [-0.5, -0.1, -1 / 255, -0.003, 0.0, 0.003, 1 / 255, 0.1, 0.4999, 0.5])
def test_a_hue_shift_of_any_size_equals_torchvisions(turns: float) -> None:
    image = Image.fromarray(noisy_image(37, 61))
    assert equal(colour.shift_hue(image, turns), F.adjust_hue(image, turns))


@pytest.mark.parametrize("factor", [0.0, 0.6, 0.9999, 1.0, 1.2345, 1.4, 3.0])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (colour.adjust_brightness, F.adjust_brightness),
        (colour.adjust_contrast, F.adjust_contrast),
        (colour.adjust_saturation, F.adjust_saturation),
    ],
)
def test_brightness_contrast_and_saturation_equal_torchvisions(ours: Callable, theirs: Callable, factor: float) -> None:
    for seed in range(5):
        image = Image.fromarray(noisy_image(40 + seed, 20 + seed, seed))
        assert equal(ours(image, factor), theirs(image, factor))


def test_grey_equals_torchvisions() -> None:
    image = Image.fromarray(noisy_image(37, 61))
    assert equal(colour.to_grey(image), F.rgb_to_grayscale(image, num_output_channels=3))
