import numpy as np
import pytest

from passreid_ray.views.block_masks import block_masks


def masks_of(num: list[int] | np.ndarray, grid: tuple[int, int], own: np.ndarray | slice = slice(None)) -> np.ndarray:
    return block_masks(np.asarray(num), grid, np.random.default_rng(3), own)


@pytest.mark.parametrize("grid", [(16, 8), (4, 2), (1, 9), (14, 14)])
def test_a_mask_has_the_number_of_patches_that_is_asked_for(grid: tuple[int, int]) -> None:
    num = np.arange(grid[0] * grid[1] + 1)
    masks_NRC = masks_of(num, grid)
    assert masks_NRC.shape == (len(num), *grid)
    np.testing.assert_array_equal(masks_NRC.sum(axis=(1, 2)), num)


def like_neighbours(masks_NRC: np.ndarray) -> float:
    """Share of neighbouring patches that are both hidden or both seen."""
    down = masks_NRC[:, 1:] == masks_NRC[:, :-1]
    across = masks_NRC[:, :, 1:] == masks_NRC[:, :, :-1]
    return (down.sum() + across.sum()) / (down.size + across.size)


def test_masks_are_made_of_blocks() -> None:
    num = np.full(300, 38)
    masks_NRC = masks_of(num, (16, 8))
    scattered_NRC = np.random.default_rng(0).permuted(masks_NRC.reshape(300, -1), axis=1).reshape(masks_NRC.shape)
    assert like_neighbours(masks_NRC) > 0.75 > 0.65 > like_neighbours(scattered_NRC)
    # Nearly every hidden patch is in a hidden square of two by two.
    squares = masks_NRC[:, 1:, 1:] & masks_NRC[:, :-1, 1:] & masks_NRC[:, 1:, :-1] & masks_NRC[:, :-1, :-1]
    in_square = np.zeros_like(masks_NRC)
    for rows in (slice(1, None), slice(None, -1)):
        for columns in (slice(1, None), slice(None, -1)):
            in_square[:, rows, columns] |= squares
    assert in_square.sum() > 0.8 * masks_NRC.sum()


def test_every_patch_is_hidden_now_and_then_and_masks_differ() -> None:
    masks_NRC = masks_of(np.full(300, 38), (16, 8))
    assert 0.02 < masks_NRC.mean(axis=0).min() < masks_NRC.mean(axis=0).max() < 0.6
    assert len(np.unique(masks_NRC.reshape(300, -1), axis=0)) == 300


def test_some_masks_are_the_same_as_if_all_were_made() -> None:
    num = np.arange(5, 45)
    own = np.array([3, 4, 17, 39])
    np.testing.assert_array_equal(masks_of(num, (16, 8), own), masks_of(num, (16, 8))[own])


def test_no_masks_are_none() -> None:
    assert masks_of(np.arange(5), (16, 8), np.zeros(0, dtype=int)).shape == (0, 16, 8)
