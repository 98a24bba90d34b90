from math import lcm

import pytest

from passreid_ray.errors import UserError
from passreid_ray.train.shares import check_shared, num_pieces


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("most", [1, 2, 3, 5, 8])
def test_no_piece_is_larger_than_those_of_the_most_workers_and_none_is_left_over(most: int, micro_batches: int) -> None:
    batch_size = 2 * lcm(*range(1, most + 1), most * micro_batches)
    largest = batch_size // (most * micro_batches)
    for world_size in range(1, most + 1):
        num = num_pieces(batch_size, world_size, most, micro_batches)
        share = batch_size // world_size
        assert share % num == 0
        assert share // num <= largest
        fewer = [other for other in range(1, num) if share % other == 0]
        assert all(share // other > largest for other in fewer)  # not more pieces than needed


def test_the_most_workers_compute_what_the_settings_say() -> None:
    assert num_pieces(64, 8, 8) == 1
    assert num_pieces(64, 8, 8, micro_batches=4) == 4


def test_a_batch_that_every_number_of_workers_can_share_is_accepted() -> None:
    check_shared("batch_size", "images", 12, range(1, 4))
    check_shared("batch_size", "images", 7, range(1, 2))


@pytest.mark.parametrize(
    ("batch_size", "sizes", "micro_batches", "told"),
    [
        (16, range(1, 4), 1, r"16 images cannot be divided among 3 workers \(workers.num_workers=\[1, 3\]\)"),
        (14, range(1, 5), 1, "among 3 or 4 workers .* a multiple of 12: the nearest is 12"),
        (20, range(2, 6), 1, r"among 3 workers .* a multiple of 60: the nearest is 60"),
        (12, range(1, 4), 8, "among 3 workers .* in 8 micro-batches; make it a multiple of 24: the nearest is 24"),
        (10, range(3, 4), 1, "among 3 workers in 1 micro-batches; make it a multiple of 3: the nearest is 9"),
        (3, range(4, 5), 1, "the nearest is 4"),
    ],
)
def test_sizes_that_cannot_share_a_batch_are_named_with_the_nearest_batch_that_works(
    batch_size: int, sizes: range, micro_batches: int, told: str
) -> None:
    with pytest.raises(UserError, match=told):
        check_shared("batch_size", "images", batch_size, sizes, micro_batches=micro_batches)


def test_the_nearest_batch_is_made_of_whole_units() -> None:
    with pytest.raises(UserError, match="a multiple of 12: the nearest is 24"):
        check_shared("batch_size", "images", 20, range(1, 4), unit=4)
