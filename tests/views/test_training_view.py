from typing import Any

import numpy as np
import pytest
import torch

from passreid_ray.config import build
from passreid_ray.errors import UserError
from passreid_ray.views import TrainingView, TrainingViewConfig, evaluation_pixels, normalize, view_rng
from tests.views.images import noisy_image

PLAIN = TrainingViewConfig(flip_probability=0, pad_px=0, erase_probability=0)
IMAGE = noisy_image(131, 57)


def views_of(config: TrainingViewConfig, image: np.ndarray, count: int) -> list[np.ndarray]:
    return [TrainingView(config)(image, view_rng(0, draw, "a.jpg")) for draw in range(count)]


def test_equal_generators_give_equal_views_and_others_do_not() -> None:
    view = TrainingView(TrainingViewConfig())
    first, again, other = (view(IMAGE, view_rng(0, draw, "a.jpg")) for draw in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_view_is_uint8_of_the_size_asked_for_whatever_the_image() -> None:
    for size_px in ((256, 128), (64, 48)):
        for image in (IMAGE, noisy_image(40, 300), np.zeros((1, 1, 3), np.uint8)):
            view = views_of(TrainingViewConfig(image_size_px=size_px), image, 1)[0]
            assert view.shape == (3, *size_px)
            assert view.dtype == np.uint8
            assert view.flags.c_contiguous


def test_without_augmentation_it_is_the_evaluation_view() -> None:
    assert np.array_equal(views_of(PLAIN, IMAGE, 1)[0], evaluation_pixels(IMAGE, (256, 128)))


def test_a_flipped_view_is_the_mirror_image() -> None:
    flipped = views_of(PLAIN.model_copy(update={"flip_probability": 1.0}), IMAGE, 1)[0]
    assert np.array_equal(flipped, evaluation_pixels(IMAGE, (256, 128))[:, :, ::-1])


def test_half_of_the_views_are_flipped() -> None:
    view = TrainingView(TrainingViewConfig())
    flips = [view.draw(view_rng(0, draw, "a.jpg")).flip for draw in range(1000)]
    assert abs(np.mean(flips) - 0.5) < 0.06  # 3.8 standard deviations


def test_a_shift_moves_the_image_by_every_offset_and_brings_in_black() -> None:
    config = PLAIN.model_copy(update={"image_size_px": (32, 16), "pad_px": 2})
    white = np.full((32, 16, 3), 255, np.uint8)
    white[8, 5] = 7  # a mark far from the border
    places = set()
    for view in views_of(config, white, 300):
        rows, columns = np.nonzero(view[0] == 7)
        down, right = int(rows[0]) - 8, int(columns[0]) - 5
        places.add((down, right))
        expected = np.zeros((32, 16), np.uint8)
        expected[max(0, down) : 32 + min(0, down), max(0, right) : 16 + min(0, right)] = 255
        expected[rows[0], columns[0]] = 7
        assert (view == expected).all()
    assert places == {(down, right) for down in range(-2, 3) for right in range(-2, 3)}


def test_erased_boxes_keep_to_the_ranges_and_lie_everywhere() -> None:
    config = PLAIN.model_copy(update={"erase_probability": 1.0})
    view = TrainingView(config)
    boxes = [view.draw(view_rng(0, draw, "a.jpg")).erased for draw in range(2000)]
    top, left, height, width = np.array([box for box in boxes if box is not None]).T
    assert len(top) == 2000
    share = height * width / (256 * 128)
    assert share.min() > 0.0195  # sides are whole pixels
    assert share.max() < 0.405
    assert share.min() < 0.03
    assert share.max() > 0.38
    assert (height / width).min() > 0.28
    assert (height / width).max() < 3.5
    assert top.min() == left.min() == 0
    assert (top + height).max() == 256
    assert (left + width).max() == 128


def test_half_of_the_views_are_erased_and_erased_pixels_are_zero_for_the_network() -> None:
    config = TrainingViewConfig(flip_probability=0, pad_px=0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    black = np.zeros((256, 128, 3), np.uint8)
    erased_shares = []
    for view in views_of(config, black, 200):
        is_erased = (view > 0).all(axis=0)
        erased_shares.append(is_erased.mean())
        values = normalize(torch.from_numpy(view), config)[:, torch.from_numpy(is_erased)]
        assert (values.abs() <= 1 / 255 / torch.tensor(config.std)[:, None]).all()
    shares = np.array(erased_shares)
    assert abs((shares > 0).mean() - 0.5) < 0.14
    assert ((shares == 0) | ((shares > 0.0195) & (shares < 0.405))).all()


def test_erasing_leaves_the_other_pixels_alone() -> None:
    config = PLAIN.model_copy(update={"erase_probability": 1.0})
    view, draw = TrainingView(config), TrainingView(config).draw(view_rng(0, 1, "a.jpg"))
    assert draw.erased is not None
    top, left, height, width = draw.erased
    inside = np.zeros((256, 128), bool)
    inside[top : top + height, left : left + width] = True
    pixels, plain = view.render(IMAGE, draw), evaluation_pixels(IMAGE, (256, 128))
    assert (pixels[:, inside] == 128).all()
    assert np.array_equal(pixels[:, ~inside], plain[:, ~inside])


def test_a_box_that_can_never_fit_is_not_erased() -> None:
    config = PLAIN.model_copy(update={"erase_probability": 1.0, "erase_area": (1.0, 1.0)})
    assert np.array_equal(views_of(config, IMAGE, 1)[0], evaluation_pixels(IMAGE, (256, 128)))


def test_the_image_itself_is_not_written_to() -> None:
    image = noisy_image(256, 128)
    before = image.copy()
    views_of(TrainingViewConfig(), image, 20)
    assert np.array_equal(image, before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size_px": [256, 0]}, "image_size_px"),
        ({"flip_probability": 1.5}, "flip_probability"),
        ({"pad_px": -1}, "pad_px"),
        ({"erase_probability": -0.1}, "erase_probability"),
        ({"erase_area": [0.4, 0.02]}, "erase_area: expected .low, high. with 0 < low <= high <= 1"),
        ({"erase_aspect": [0, 3]}, "erase_aspect: expected .low, high. with 0 < low <= high"),
        ({"std": [0.5, 0, 0.5]}, "std: expected three numbers above 0"),
        ({"pad": 3}, "pad.* did you mean"),
    ],
)
def test_nonsense_is_refused_with_the_name_of_the_setting(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(TrainingViewConfig, values)


def test_noise_of_the_pixels_mean_and_deviation_fills_the_erased_box_when_asked() -> None:
    config = TrainingViewConfig(
        erase_probability=1, erase_fill="noise", pad_px=0, flip_probability=0, mean=(0.4, 0.5, 0.6), std=(0.1, 0.1, 0.1)
    )
    view, image = TrainingView(config), np.zeros((256, 128, 3), np.uint8)
    draw = view.draw(np.random.default_rng(0))
    assert draw.erased is not None
    top, left, height, width = draw.erased
    pixels = view.render(image, draw)
    box = pixels[:, top : top + height, left : left + width].reshape(3, -1) / 255
    np.testing.assert_allclose(box.mean(axis=1), config.mean, atol=0.01)
    np.testing.assert_allclose(box.std(axis=1), config.std, atol=0.01)
    pixels[:, top : top + height, left : left + width] = 0
    assert not pixels.any()
    assert np.array_equal(view.render(image, draw), view.render(image, draw))
