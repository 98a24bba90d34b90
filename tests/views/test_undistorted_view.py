from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from passreid_ray.config import build
from passreid_ray.errors import UserError
from passreid_ray.views import (
    UndistortedView,
    UndistortedViewConfig,
    crop_to_grids,
    evaluation_pixels,
    undistorted_pixels,
    view_rng,
)
from tests.views.images import noisy_image

PLAIN = UndistortedViewConfig(cutout_probability=0)
CUT = UndistortedViewConfig(image_size_px=(64, 32), cutout_probability=1)
IMAGE = noisy_image(131, 57)
FILL, BLACK, IMAGENET_MEAN = np.array([(1, 2, 3), (0, 0, 0), (124, 116, 104)], np.uint8)


def test_the_scaled_image_lies_top_left_and_the_rest_is_filled() -> None:
    pixels, grid = undistorted_pixels(noisy_image(100, 20), (64, 32), FILL)
    assert np.array_equal(pixels[:, :, :13], evaluation_pixels(noisy_image(100, 20), (64, 13)))  # 20 * 64 / 100 = 12.8
    assert (pixels[:, :, 13:] == np.array(FILL)[:, None, None]).all()
    assert grid == (4, 1)
    assert (pixels.shape, pixels.dtype) == ((3, 64, 32), np.uint8)


def test_a_wide_image_fills_the_width() -> None:
    pixels, grid = undistorted_pixels(noisy_image(30, 60), (64, 32), FILL)
    assert np.array_equal(pixels[:, :16], evaluation_pixels(noisy_image(30, 60), (16, 32)))
    assert (pixels[:, 16:] == np.array(FILL)[:, None, None]).all()
    assert grid == (1, 2)


def test_small_images_are_scaled_up_and_an_image_of_the_canvas_size_keeps_its_pixels() -> None:
    small, grid = undistorted_pixels(noisy_image(8, 4), (64, 32), FILL)
    assert np.array_equal(small, evaluation_pixels(noisy_image(8, 4), (64, 32)))
    assert grid == (4, 2)
    same, _ = undistorted_pixels(noisy_image(64, 32), (64, 32), FILL)
    assert np.array_equal(same.transpose(1, 2, 0), noisy_image(64, 32))


def test_a_circle_stays_a_circle() -> None:
    rows, columns = np.mgrid[:90, :200]
    disc = ((rows - 45) ** 2 + (columns - 100) ** 2 <= 40**2).astype(np.uint8) * 255
    pixels, _ = undistorted_pixels(np.repeat(disc[:, :, None], 3, axis=2), (384, 192), BLACK)
    inside = pixels[0] > 127
    height, width = inside.any(axis=1).sum(), inside.any(axis=0).sum()
    assert abs(int(height) - int(width)) <= 1
    assert abs(int(height) - 81 * 192 / 200) <= 1


@pytest.mark.parametrize(("shape", "grid"), [((1, 5000), (1, 2)), ((5000, 1), (4, 1)), ((1, 1), (2, 2))])
def test_the_thinnest_image_has_a_pixel_and_a_patch_each_way(shape: tuple[int, int], grid: tuple[int, int]) -> None:
    image = np.full((*shape, 3), 200, np.uint8)
    pixels, found = undistorted_pixels(image, (64, 32), FILL)
    assert found == grid
    assert (pixels[:, 0, 0] == 200).all()


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    canvas=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    patch_px=st.sampled_from([8, 16]),
)
def test_the_grid_holds_the_image_and_no_more(shape: tuple[int, int], canvas: tuple[int, int], patch_px: int) -> None:
    canvas_px = (canvas[0] * patch_px, canvas[1] * patch_px)
    pixels, (rows, columns) = undistorted_pixels(np.full((*shape, 3), 200, np.uint8), canvas_px, BLACK, patch_px)
    is_image = (pixels == 200).all(axis=0)
    height, width = int(is_image[:, 0].sum()), int(is_image[0].sum())
    assert is_image[:height, :width].all()
    assert is_image.sum() == height * width
    assert height == canvas_px[0] or width == canvas_px[1]
    assert (rows - 1) * patch_px < height <= rows * patch_px <= canvas_px[0]
    assert (columns - 1) * patch_px < width <= columns * patch_px <= canvas_px[1]
    # One factor for both sides: they differ from it by the rounding of one side only.
    assert abs(height * shape[1] - width * shape[0]) <= max(shape) or 1 in (height, width)


def test_without_augmentation_it_is_the_image_over_the_mean_colour() -> None:
    pixels, grid = UndistortedView(PLAIN, IMAGENET_MEAN)(IMAGE, view_rng(0, 0, "a.jpg"), 0.5)
    expected, expected_grid = undistorted_pixels(IMAGE, (384, 192), IMAGENET_MEAN)  # 255 times ImageNet's mean
    assert np.array_equal(pixels, expected)
    assert grid == expected_grid


def test_a_flipped_view_mirrors_the_image_but_not_the_canvas() -> None:
    view = UndistortedView(PLAIN.model_copy(update={"flip_probability": 1.0}), IMAGENET_MEAN)
    pixels, grid = view(IMAGE, view_rng(0, 0, "a.jpg"), 0.0)
    plain, plain_grid = UndistortedView(PLAIN, IMAGENET_MEAN)(IMAGE, view_rng(0, 0, "a.jpg"), 0.0)
    width = round(57 * 384 / 131)
    assert width < 192
    assert np.array_equal(pixels[:, :, :width], plain[:, :, :width][:, :, ::-1])
    assert np.array_equal(pixels[:, :, width:], plain[:, :, width:])
    assert grid == plain_grid


@pytest.mark.parametrize(("step", "largest"), [(0, 0.0), (2048, 0.15), (4096, 0.3)])
def test_the_largest_cutout_grows_from_nothing_to_three_tenths(step: int, largest: float) -> None:
    assert UndistortedViewConfig().largest_cutout(step / 4096) == largest


def test_progress_outside_training_is_refused() -> None:
    for progress in (-0.01, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"progress: expected a number in 0\.\.1"):
            UndistortedView(CUT, IMAGENET_MEAN)(IMAGE, view_rng(0, 0, "a.jpg"), progress)


def test_nothing_is_cut_out_at_the_first_step() -> None:
    plain, _ = undistorted_pixels(IMAGE, (64, 32), IMAGENET_MEAN)
    for draw in range(50):
        assert np.array_equal(UndistortedView(CUT, IMAGENET_MEAN)(IMAGE, view_rng(0, draw, "a.jpg"), 0.0)[0], plain)


def changed_pixels(image: np.ndarray, config: UndistortedViewConfig, draw: int, progress: float) -> np.ndarray:
    """Where the view differs from the image, on the canvas."""
    view = UndistortedView(config, IMAGENET_MEAN)
    plan = view.draw(view_rng(3, draw, "a.jpg"), progress)
    plain, _ = undistorted_pixels(image, config.image_size_px, IMAGENET_MEAN)
    return (view.render(image, plan)[0] != plain).any(axis=0)


@settings(deadline=None, max_examples=150)
@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    draw=st.integers(0, 10_000),
    progress=st.floats(0, 1),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_the_changed_share_of_the_image_is_never_above_the_largest(
    shape: tuple[int, int], draw: int, progress: float, ends: tuple[float, float]
) -> None:
    config = CUT.model_copy(update={"cutout_start": ends[0], "cutout_end": ends[1]})
    image = np.full((*shape, 3), 200, np.uint8)
    changed = changed_pixels(image, config, draw, progress)
    is_image = (undistorted_pixels(image, (64, 32), BLACK)[0] == 200).all(axis=0)
    assert not changed[~is_image].any()
    assert changed.sum() <= config.largest_cutout(progress) * is_image.sum() + 1e-6


@pytest.mark.parametrize("progress", [0.5, 1.0])
def test_cutouts_come_near_the_largest_and_are_spread_evenly_below_it(progress: float) -> None:
    config = CUT.model_copy(update={"image_size_px": (256, 128)})
    image = np.zeros((256, 128, 3), np.uint8)
    largest = 0.3 * progress
    shares = np.array([changed_pixels(image, config, draw, progress).mean() for draw in range(300)])
    assert shares.max() <= largest
    assert shares.max() > 0.96 * largest
    assert abs(shares.mean() - largest / 2) < 0.09 * largest + 0.005  # 5 standard errors, and whole pixels


def test_cutouts_reach_every_edge_of_the_image_and_every_box_is_full_of_noise() -> None:
    covered = np.zeros((64, 32), bool)
    for draw in range(200):
        changed = changed_pixels(np.zeros((64, 32, 3), np.uint8), CUT, draw, 1.0)
        covered |= changed
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        if len(rows):
            assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    assert covered[[0, -1]].any(axis=1).all()  # every edge is reached, the corners seldom
    assert covered[:, [0, -1]].any(axis=0).all()
    assert covered.mean() > 0.95


def test_noise_has_every_value_and_differs_from_view_to_view() -> None:
    config = CUT.model_copy(update={"image_size_px": (256, 128), "cutout_start": 0.9, "cutout_end": 0.9})
    view, image = UndistortedView(config, IMAGENET_MEAN), np.zeros((256, 128, 3), np.uint8)
    noises = [view(image, view_rng(0, draw, "a.jpg"), 0.5)[0] for draw in range(8)]
    largest = max(noises, key=lambda pixels: int(pixels.any(axis=0).sum()))
    values = largest[:, largest.any(axis=0)]
    assert np.unique(values).size == 256
    assert abs(values.mean() - 127.5) < 2
    assert len({pixels.tobytes() for pixels in noises}) == 8


def test_half_of_the_views_are_cut_and_none_is_flipped_by_default() -> None:
    view = UndistortedView(UndistortedViewConfig(), IMAGENET_MEAN)
    draws = [view.draw(view_rng(0, draw, "a.jpg"), 1.0) for draw in range(1000)]
    assert abs(np.mean([draw.cutout is not None for draw in draws]) - 0.5) < 0.06  # 3.8 standard deviations
    assert not any(draw.flip for draw in draws)


def test_equal_generators_give_equal_views_and_others_do_not() -> None:
    view = UndistortedView(CUT, IMAGENET_MEAN)
    first, again, other = (view(IMAGE, view_rng(0, draw, "a.jpg"), 1.0)[0] for draw in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_image_itself_is_not_written_to() -> None:
    image = noisy_image(64, 32)
    before = image.copy()
    for draw in range(20):
        UndistortedView(CUT.model_copy(update={"flip_probability": 0.5}), IMAGENET_MEAN)(
            image, view_rng(0, draw, "a.jpg"), 1.0
        )
    assert np.array_equal(image, before)


def test_a_batch_is_cut_to_the_smallest_canvas_that_holds_all_of_its_grids() -> None:
    images = [noisy_image(100, 20), noisy_image(30, 60)]
    views = [undistorted_pixels(image, (96, 64), BLACK) for image in images]  # 96 x 19 and 32 x 64 pixels
    batch = torch.from_numpy(np.stack([pixels for pixels, _ in views]))
    grids = torch.tensor([grid for _, grid in views])
    assert grids.tolist() == [[6, 2], [2, 4]]
    assert crop_to_grids(batch, grids, 16).shape == (2, 3, 96, 64)
    assert torch.equal(crop_to_grids(batch[:1], grids[:1], 16), batch[:1, :, :, :32])
    assert torch.equal(crop_to_grids(batch[1:], grids[1:], 16), batch[1:, :, :32])


def test_a_grid_beyond_the_canvas_is_refused() -> None:
    with pytest.raises(ValueError, match="5 x 2 patches of 16 px do not fit on a canvas of 64 x 32 px"):
        crop_to_grids(torch.zeros(2, 3, 64, 32), torch.tensor([[5, 1], [1, 2]]), 16)


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 3))])
def test_anything_but_an_rgb_image_is_refused(image: np.ndarray) -> None:
    with pytest.raises(UserError, match="expected uint8 RGB pixels"):
        UndistortedView(PLAIN, IMAGENET_MEAN)(image, view_rng(0, 0, "a.jpg"), 0.5)


def test_the_pixels_are_those_of_pil() -> None:
    pixels, _ = undistorted_pixels(IMAGE, (384, 192), FILL)
    resized = Image.fromarray(IMAGE).resize((167, 384), Image.Resampling.BICUBIC)  # 57 * 384 / 131 = 167.1
    assert np.array_equal(pixels[:, :, :167].transpose(1, 2, 0), np.asarray(resized))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size_px": [384, 0]}, "image_size_px"),
        ({"flip_probability": 1.5}, "flip_probability"),
        ({"cutout_probability": -1}, "cutout_probability"),
        ({"cutout_start": -0.1}, "cutout_start"),
        ({"cutout_end": 1.1}, "cutout_end"),
        ({"cutout": 0.3}, "cutout.* did you mean"),
    ],
)
def test_nonsense_is_refused_with_the_name_of_the_setting(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(UndistortedViewConfig, values)
